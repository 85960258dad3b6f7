"""Options that were called otherwise in the last release, whose commands, recipes and runs still work."""

from __future__ import annotations

import sys

# The last release's name: today's.
RENAMED = {"update_per_slice": "updates_per_batch"}


def todays_word(word: str) -> str:
    """A word of a command line, with today's name if it is an option that had another; says so on standard error."""
    name, equals, value = word.partition("=")
    today = RENAMED.get(name.removeprefix("--").replace("-", "_"))
    if today is None or not name.startswith("--"):
        return word
    print(f"{name} is called --{today} now; the old name will be gone in the next release", file=sys.stderr)
    return f"--{today}{equals}{value}"
