"""``python -m dopsd.sample``: completions of prompts, and how they were decoded."""

from dopsd import cli

if __name__ == "__main__":
    cli.start("dopsd.completions")
