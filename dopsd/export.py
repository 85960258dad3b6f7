"""``python -m dopsd.export``: a run's adapter merged into its base model, as a checkpoint in the base's own layout.

As a module of its own this is the command alone: in the package, ``dopsd.export`` is the function.
"""

from dopsd import cli

if __name__ == "__main__":
    cli.start("dopsd.merging")
