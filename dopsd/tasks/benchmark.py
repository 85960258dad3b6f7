"""What the paper's benchmarks share: one prompt template, what is read of a response, files of rows, the hub."""

from __future__ import annotations

import random
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple

from dopsd.errors import must_be
from dopsd.tasks.answers import MOST, ended, in_tags
from dopsd.tasks.rows import hub_rows, read_rows
from dopsd.tasks.task import SPLITS, Row, Task, check_golds, part

FORM = "<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


class Benchmark(Task):
    """A task with problem statements in words; training and evaluation use the same template.

    A subclass names its ``columns`` and the ``answer_form`` asked for, and has ``statement``, ``reference`` and
    ``answer``, and two ways of grading: its own, ``strict`` or lenient, and the published one.
    """

    columns: ClassVar[tuple[str, ...]]
    answer_form: ClassVar[str]

    @abstractmethod
    def statement(self, row: Row) -> str:
        """The problem, in words."""

    @abstractmethod
    def reference(self, row: Row) -> str:
        """A reference solution."""

    @abstractmethod
    def answer(self, row: Row) -> str:
        """The right answer, in the form that is asked for."""

    def reasoning(self, row: Row) -> str:
        """The steps of the reference solution."""
        return self.reference(row)

    @abstractmethod
    def grade(self, row: Row, response: str, *, strict: bool) -> float:
        """The grade of a response, up to the end of its turn; ``strict``: of an answer that is marked."""

    @abstractmethod
    def published_grade(self, row: Row, response: str) -> float:
        """The grade of a response, whatever is in it, as :mod:`~dopsd.tasks.published` describes."""

    def score(self, row: Row, response: str) -> float:
        if self.grading == "published":
            return self.published_grade(row, response[:MOST])
        return self.grade(row, ended(response), strict=self.grading == "strict")

    def check(self, row: Row) -> None:
        """Raise ValueError, in a clause that says why, for a row of a file that can't be used."""

    def instructions(self) -> str:
        """How to respond."""
        form = FORM.format(reasoning="your steps", answer="your answer")
        return f"Think it through step by step first. Then state {self.answer_form}. Keep to this form:\n{form}"

    def prompt(self, row: Row) -> str:
        return f"{self.statement(row)}\n\n{self.instructions()}"

    def reference_prompt(self, row: Row) -> str:
        return (
            f"{self.statement(row)}\n\nHere is a reference solution:\n{self.reference(row)}\n\n"
            f"Now that you have understood it, solve the problem yourself, in your own words.\n\n{self.instructions()}"
        )

    def gold(self, row: Row) -> str | None:
        return in_tags(self.answer(row))

    def solution(self, row: Row) -> str | None:
        return FORM.format(reasoning=self.reasoning(row), answer=self.answer(row))

    def key(self, row: Row) -> str:
        return self.statement(row)

    def read(self, path: Path) -> list[Row]:
        """Rows of a csv, json(l) or parquet file with the task's columns, whose golds are checked."""
        rows = read_rows(path, self.columns, self.check)
        check_golds(self, rows, str(path))
        return rows


class Source(NamedTuple):
    """A split of a dataset on the hub."""

    dataset: str
    name: str | None
    split: str


class HubBenchmark(Benchmark):
    """A benchmark whose rows are datasets on the hub: ``train`` and ``test``; ``validation`` is a part of train."""

    generated = False
    train_source: ClassVar[Source]
    test_source: ClassVar[Source]

    def problems(self, split: str, count: int, seed: int = 0) -> list[Row]:
        """At most ``count`` rows.

        ``test``: the first ones, in the dataset's order. ``train`` and ``validation``: shuffled by ``seed``; in which
        of the two a row of the training set is (a sixteenth is validation) depends on its problem alone.
        """
        must_be(split in SPLITS, "split", split, f"one of {', '.join(SPLITS)}")
        source = self.test_source if split == "test" else self.train_source
        rows = hub_rows(*source, self.columns)
        if split != "test":
            rows = part(self, rows, split)
            random.Random(seed).shuffle(rows)
        check_golds(self, rows[:count], f"{source.dataset}, {split}")
        return rows[:count]
