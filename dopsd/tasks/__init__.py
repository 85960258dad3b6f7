"""Tasks: rows, prompts and grades. One file each; a task is a class with

- ``problems(split, count, seed)``: generated rows of ``train``, ``validation`` or ``test``;
- ``read(path)``: rows from a local file;
- ``prompt(row)`` and ``reference_prompt(row)``: what student and AR-style teacher are shown;
- ``score(row, response)``: the grade in [0, 1], 1 for correct.
"""

from __future__ import annotations

from dopsd.errors import require
from dopsd.tasks.sudoku import Sudoku

TASKS = {"sudoku": Sudoku}


def load_task(name: str) -> Sudoku:
    """The task called ``name``; an unknown one is a :class:`~dopsd.errors.UsageError`."""
    require(name in TASKS, "task", name, f"known are {', '.join(TASKS)}")
    return TASKS[name]()
