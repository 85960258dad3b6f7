"""What a long evaluation has done so far, kept on disk, so that it goes on where it was stopped.

A folder holds the settings of the run and one file of JSON lines per process, a line per response that says which run
it is of. The lines of a batch are written and synced together; a last line that was cut short by a kill is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dopsd.errors import RunError, UsageError
from dopsd.files import plain, read_json, write_json

SETTINGS = "settings.json"
KEY = ("task", "gen_length", "tokens_per_step", "measure", "index")

Key = tuple[str, int, float, str, int]
Entry = dict[str, Any]


class Journal:
    """Entries by key, those of an earlier run included.

    Args:
        folder: where they are kept; None: in memory only.
        process: the number of this process, which writes a file of its own.
        run: names the run; other runs' lines are refused.
        check: raises ValueError, in a clause that says why, for an entry that can't be one of this run.

    Raises:
        RunError: a line that is damaged or can't be one of this run; the sentence names it.
    """

    def __init__(self, folder: Path | None, process: int, run: str, check: Callable[[Entry], None]) -> None:
        self.entries: dict[Key, Entry] = {}
        self.run = run
        self.file = None
        if folder is None:
            return
        for path in sorted(folder.glob("*.jsonl")):
            for line, text in enumerate(complete(path).splitlines()):
                try:
                    entry = json.loads(text)
                    if entry.pop("run") != run:
                        raise ValueError("it is of another run")
                    check(entry)
                    self.entries[key_of(entry)] = entry
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                    why = f"line {line + 1} can't be used ({type(error).__name__}: {error})"
                    raise RunError(f"{path}: {why}; --overwrite starts anew") from error
        own = folder / f"process-{process}.jsonl"
        self.file = own.open("ab")
        self.file.truncate(len(complete(own)))

    def add(self, entries: Sequence[Entry]) -> None:
        """Keep a batch of entries; on disk when this returns."""
        new = {key_of(entry): entry for entry in entries}
        self.entries |= new
        if self.file is not None:
            self.file.write("".join(json.dumps({"run": self.run, **entry}) + "\n" for entry in new.values()).encode())
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def key_of(entry: Entry) -> Key:
    """What an entry is filed under."""
    task, gen_length, tokens_per_step, measure, index = (entry[name] for name in KEY)
    return task, gen_length, tokens_per_step, measure, index


def complete(path: Path) -> bytes:
    """The lines of a file that were written to their end."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def check(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise :class:`~dopsd.errors.UsageError` if ``folder`` is a run's with other settings."""
    if (folder / SETTINGS).is_file():
        kept = read_json(folder / SETTINGS)
        given = plain(settings)
        for name in [*given, *(kept.keys() - given.keys())]:
            old, new = kept.get(name), given.get(name)
            if old != new:
                raise UsageError(
                    f"{name}={new!r} can't be used: the unfinished run in {folder} has {name}={old!r}; "
                    "the same command goes on with it, --overwrite starts anew"
                )


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make ``folder`` the place of a run with these settings, unless it is already."""
    folder.mkdir(exist_ok=True)
    if not (folder / SETTINGS).is_file():
        write_json(folder / SETTINGS, settings)


def remove(folder: Path) -> None:
    """Delete a journal's files and its folder, if there is one; files of others stay."""
    for pattern in ("*.jsonl", f"{SETTINGS}*"):
        for path in folder.glob(pattern):
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
