"""Prompts of one's own: a text file that asks in place of a task's words.

``{column}`` stands for a row's value, and ``{{`` and ``}}`` for braces; nothing else may stand between braces. The text
is the user's turn. A file whose first line is ``[system]`` has the system's turn below it, up to a line ``[user]``, and
the user's below that. Its last line end is no part of it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from dopsd.errors import UsageError, must_be, require
from dopsd.files import write_bytes
from dopsd.tasks import Row, Task

# What a run's folder keeps it as.
COPY = "prompt.txt"
# Bytes of a file: far more than the context of a model.
LONGEST = 1 << 16
SYSTEM = "[system]\n"
TURNS = re.compile(r"\[system\]\n(.*?)\n\[user\]\n(.*)", re.DOTALL)
BRACES = "a brace that is meant is written twice: {{ or }}"

# A turn in pieces: what stands before a column, and its name; None behind the last one.
Pieces = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class PromptFile:
    """What rows are asked with.

    Args:
        name: the file's, as it was given.
        content: its bytes.
        user: the user's turn.
        system: the system's, if there is one.
    """

    name: str
    content: bytes
    user: Pieces
    system: Pieces | None

    @classmethod
    def read(cls, name: str) -> PromptFile:
        """The file of that name; UsageError if it can't be used with any row."""
        path = Path(name)
        must_be(path.is_file(), "prompt_file", name, "a text file")
        size = path.stat().st_size
        require(size <= LONGEST, "prompt_file", name, f"it has {size} bytes, and at most {LONGEST} are read")
        content = path.read_bytes()
        try:
            text = content.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"prompt_file={name!r} can't be used: it is no UTF-8 text: {error}") from error
        require(bool(text.strip()), "prompt_file", name, "it is empty")
        turns = TURNS.fullmatch(text)
        hint = "below its line [system] it has no line [user] with text behind it"
        require(turns is not None or not text.startswith(SYSTEM), "prompt_file", name, hint)
        system, user = (None, text) if turns is None else turns.groups()
        found = cls(name, content, pieces(user, name), None if system is None else pieces(system, name))
        hint = "it names no column, so that all rows would be asked the same: write {question}, say"
        require(bool(found.columns), "prompt_file", name, hint)
        return found

    @property
    def columns(self) -> list[str]:
        """The columns that it names, each once."""
        return list(dict.fromkeys(column for _, column in (*(self.system or ()), *self.user) if column is not None))

    @property
    def sha256(self) -> str:
        """The hash of the file."""
        return hashlib.sha256(self.content).hexdigest()

    def keep(self, folder: Path) -> None:
        """Write a copy of the file into a run's folder."""
        write_bytes(folder / COPY, self.content)

    def check(self, task: Task, rows: Sequence[Row]) -> None:
        """Raise UsageError unless each row has the columns that the file names."""
        for number, row in enumerate(rows):
            there = task.fields(row)
            missing = ", ".join(repr(column) for column in self.columns if column not in there)
            hint = f"row {number} has no column {missing}; it has {', '.join(there)} ({BRACES})"
            require(not missing, "prompt_file", self.name, hint)

    def turns(self, fields: Row) -> tuple[str, str | None]:
        """The user's turn, and the system's if the file has one, with the ``fields`` of a row."""
        user, system = (
            None if turn is None else "".join(text + ("" if name is None else fields[name]) for text, name in turn)
            for turn in (self.user, self.system)
        )
        assert user is not None
        return user, system


def pieces(text: str, file: str) -> Pieces:
    """A turn of ``file`` in pieces."""
    found = []
    try:
        for before, column, form, conversion in Formatter().parse(text):
            if form or conversion:
                raise ValueError(f"more than a name stands between the braces of {column!r}")
            found.append((before, column))
    except ValueError as error:
        raise UsageError(f"prompt_file={file!r} can't be used: {error} ({BRACES})") from error
    return tuple(found)
