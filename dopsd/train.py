"""``python -m dopsd.train``: on-policy self-distillation from a recipe.

As a module of its own this is the command alone: in the package, ``dopsd.train`` is the function.
"""

from dopsd import cli

if __name__ == "__main__":
    cli.start("dopsd.run")
