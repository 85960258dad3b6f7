"""``python -m dopsd.evaluate``: accuracy of a model or adapter, and what its own future is worth to it.

As a module of its own this is the command alone: in the package, ``dopsd.evaluate`` is the function.
"""

from dopsd import cli

if __name__ == "__main__":
    cli.start("dopsd.evaluation.command")
