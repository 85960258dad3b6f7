"""What a task is, and what is done with any of them: drawing rows, and checking that their golds can be reached."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from dopsd.errors import RunError, must_be

Row = Mapping[str, str]
Grading = Literal["strict", "lenient", "published"]
SPLITS = ("train", "validation", "test")
SHOWN = 5
# Problems that are made up for a split; more take minutes.
MOST = 1 << 15


class Task(ABC):
    """Rows, prompts and grades. A subclass has the five abstract methods; the rest it may leave as they are.

    A row maps column names to strings and is kept with every response.
    """

    #: Set on each task by ``load_task``. ``strict``: only an answer marked as such counts. ``lenient``: one that is not
    #: marked is looked for. ``published``: as published figures were graded. A task with one way of grading has no use
    #: for it.
    grading: Grading = "lenient"
    #: Whether ``problems`` makes up its rows. If not, they are a dataset's, and a file of training rows that comes
    #: without one of validation rows is split.
    generated: ClassVar[bool] = True
    #: How the task is evaluated unless options say otherwise: response lengths, block length, and how many problems,
    #: the first ones of ``test``.
    eval_lengths: ClassVar[tuple[int, ...]] = (256, 512)
    eval_block_length: ClassVar[int] = 32
    eval_problems: ClassVar[int] = 256

    @abstractmethod
    def problems(self, split: str, count: int, seed: int = 0) -> list[Row]:
        """``count`` distinct rows, or all if there are fewer, of ``train``, ``validation`` or ``test``.

        No row is in two splits; the same arguments give the same rows.
        """

    @abstractmethod
    def read(self, path: Path) -> list[Row]:
        """The rows of a local file."""

    @abstractmethod
    def prompt(self, row: Row) -> str:
        """What the student is shown; the decoder puts it into the tokenizer's chat template if there is one."""

    @abstractmethod
    def reference_prompt(self, row: Row) -> str:
        """What an AR-style teacher is shown: the problem with a reference solution."""

    @abstractmethod
    def score(self, row: Row, response: str) -> float:
        """The grade of a response in [0, 1]; 1 is correct. Every text has one, within a bounded time."""

    def gold(self, row: Row) -> str | None:
        """A response that is right, to check the grader with; none if the row is known to have none."""
        return None

    def solution(self, row: Row) -> str | None:
        """A worked response to learn from, in the form that the prompt asks for; none if there is none."""
        return None

    def fields(self, row: Row) -> Row:
        """What a prompt file can name of a row, beginning with its columns."""
        return row

    def key(self, row: Row) -> str:
        """What makes two rows the same problem."""
        return self.prompt(row)


def draw(task: Task, split: str, count: int, seed: int = 0, exclude: Sequence[Row] = ()) -> list[Row]:
    """``count`` rows of a split as ``task.problems`` has them, without those that pose a problem of ``exclude``.

    Raises:
        UsageError: that many are not made up.
    """
    name = "eval_problems" if split == "test" else f"{split}_problems"
    must_be(not task.generated or count <= MOST, name, count, f"at most {MOST} of a task that makes its problems up")
    return without(task, task.problems(split, count + len(exclude), seed), exclude)[:count]


def without(task: Task, rows: Sequence[Row], exclude: Sequence[Row]) -> list[Row]:
    """The rows that pose no problem of ``exclude``."""
    posed = {task.key(row) for row in exclude}
    return [row for row in rows if task.key(row) not in posed]


def split_of(key: str, splits: Sequence[str] = SPLITS) -> str:
    """The split of the problem called ``key``: a sixteenth to each of ``splits`` but the first, by its CRC-32."""
    return (*splits[1:], *[splits[0]] * 16)[zlib.crc32(key.encode()) % 16]


def part(task: Task, rows: Sequence[Row], split: str) -> list[Row]:
    """The rows of a training set to ``train`` on, or its sixteenth that is set aside for ``validation``."""
    return [row for row in rows if split_of(task.key(row), ("train", "validation")) == split]


def check_golds(task: Task, rows: Sequence[Row], source: str = "rows") -> None:
    """Grade each row's own gold answer as a response; rows whose ``gold`` is None are left out.

    Raises:
        RunError: some are not graded 1; the sentence names ``source`` and the first few rows by their index.
    """
    golds = [(index, row, task.gold(row)) for index, row in enumerate(rows)]
    wrong = [index for index, row, gold in golds if gold is not None and task.score(row, gold) < 1]
    if wrong:
        first = ", ".join(map(str, wrong[:SHOWN])) + (", ..." if len(wrong) > SHOWN else "")
        raise RunError(
            f"{source}: {len(wrong)} of {len(rows)} rows have a gold answer that is not graded as correct: {first}"
        )
