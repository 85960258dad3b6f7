"""``python -m dopsd.plan``: which sizes of a training run fit on a GPU, from a ``config.json`` alone."""

from dopsd import cli

if __name__ == "__main__":
    cli.start("dopsd.memory.command")
