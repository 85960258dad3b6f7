r"""4x4 Sudoku in words, as the paper's LLaDA is asked it.

Columns: ``puzzle`` and ``solution``, sixteen digits each in reading order, 0 for a blank. Rows are generated, with
eight blanks as in the published test set, and one solution. (Of its 500 puzzles, 124 have more; the row's own counts.)

The grade is the share of the blank cells that have the solution's digit, and 0 where a given cell is changed; results
say beside it how many grids are right as a whole, since one digit in all blanks has a quarter of them right. A grid is
sixteen digits; spaces, line ends, slashes, frames, LaTeX's matrices and ``Row 1:`` between them make no difference.

- ``strict``: the grid is all that is marked, in ``<answer>`` tags or else ``\boxed{}``.
- ``lenient``: a last tag or box may be cut off, and the last grid in it counts, or else the last of the response. Of
  grids with nothing but spaces and frames between them that is the last sixteen digits.
- ``published``: see ``published.sudoku4x4``. A published accuracy is the right share of all blanks. It is the mean
  grade, since the published puzzles have eight blanks each.
"""

from __future__ import annotations

import random
import re

from dopsd.tasks import published
from dopsd.tasks.answers import marked
from dopsd.tasks.benchmark import Benchmark
from dopsd.tasks.sudoku import all_grids, check_grids, grids_of
from dopsd.tasks.task import Row

BLANKS = 8
GRIDS = re.compile(r"""[0-9\s|+\-_,;/&\\\[\](){}`*'"]+""")
# What stands between the rows of a grid: their names, and LaTeX's commands.
BETWEEN = re.compile(r"\b[Rr]o?w? ?[1-4] ?[:.=]|\\(?:begin|end) ?\{[a-z*]+\}(?:\{[c|]+\})?|\\hline")


def has_one_solution(puzzle: str) -> bool:
    """Whether exactly one solved grid agrees with the givens."""
    agreeing = (all(given in ("0", digit) for given, digit in zip(puzzle, grid, strict=True)) for grid in all_grids())
    return sum(agreeing) == 1


def last_grid(text: str) -> str | None:
    """The last sixteen digits of the last stretch of digits and frames that holds whole grids."""
    for stretch in reversed(GRIDS.findall(BETWEEN.sub(" ", text))):
        digits = re.sub("[^0-9]", "", stretch)
        if digits and len(digits) % 16 == 0:
            return digits[-16:]
    return None


class Sudoku4x4(Benchmark):
    """4x4 Sudoku in words; see the module."""

    columns = ("puzzle", "solution")
    answer_form = "the solved grid as 16 digits in the same order"
    eval_lengths = (128, 256)

    def problems(self, split: str, count: int, seed: int = 0) -> list[Row]:
        """``count`` distinct generated problems, a function of ``seed``; no two splits share a solution grid."""
        rng = random.Random(f"sudoku4x4-{split}-{seed}")
        grids = grids_of(split)
        rows: dict[str, Row] = {}
        while len(rows) < count:
            solution = rng.choice(grids)
            blanks = set(rng.sample(range(16), BLANKS))
            puzzle = "".join("0" if cell in blanks else digit for cell, digit in enumerate(solution))
            if has_one_solution(puzzle):
                rows.setdefault(puzzle, {"puzzle": puzzle, "solution": solution})
        return list(rows.values())

    def check(self, row: Row) -> None:
        check_grids(row)

    def statement(self, row: Row) -> str:
        return (
            "Solve this 4x4 Sudoku: every row, every column and each of the four 2x2 boxes holds the digits 1 to 4, "
            "each once. The grid is written as 16 digits, row by row from the top and each row from left to right; 0 "
            f"is a cell to fill in.\n\n{row['puzzle']}"
        )

    def reference(self, row: Row) -> str:
        """The solved grid."""
        return row["solution"]

    def reasoning(self, row: Row) -> str:
        """The solved grid, row by row."""
        return "\n".join(row["solution"][start : start + 4] for start in range(0, 16, 4))

    def answer(self, row: Row) -> str:
        return row["solution"]

    def grade(self, row: Row, response: str, *, strict: bool) -> float:
        answer = marked(response, closed=strict) or ""
        if strict:
            answer = BETWEEN.sub(" ", answer)
            grid = re.sub("[^0-9]", "", answer) if GRIDS.fullmatch(answer) else ""
        else:
            grid = last_grid(answer) or last_grid(response) or ""
        if len(grid) != 16:
            return 0.0
        cells = list(zip(row["puzzle"], row["solution"], grid, strict=True))
        if any(given not in ("0", digit) for given, _, digit in cells):
            return 0.0
        blanks = [right == digit for given, right, digit in cells if given == "0"]
        return sum(blanks) / len(blanks) if blanks else 1.0

    def published_grade(self, row: Row, response: str) -> float:
        return published.sudoku4x4(response, row["puzzle"], row["solution"])
