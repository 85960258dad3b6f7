"""``python -m dopsd.inspect``: a run as one HTML page, with what it learnt step by step."""

from dopsd import cli

if __name__ == "__main__":
    cli.start("dopsd.inspector.command")
