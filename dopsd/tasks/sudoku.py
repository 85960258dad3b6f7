"""4x4 Sudoku in a character alphabet: the task of the tiny model that ships with the package.

Prompt: the sixteen cells in reading order, 0 for a blank, then ``:``. Response: one (cell, digit) pair per blank, cells
named ``a`` to ``p``, in an order in which each digit follows from what is known by then; then ``=`` and the solved
grid. A response is correct if the grid behind ``=`` is the solution, to the character.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import permutations
from pathlib import Path

from dopsd.tasks.rows import read_rows
from dopsd.tasks.task import Row, Task

CELLS = "abcdefghijklmnop"
MIN_BLANKS, MAX_BLANKS = 8, 11

# The other cells in the row, column and 2x2 box of each cell.
PEERS: tuple[tuple[int, ...], ...] = tuple(
    tuple(
        other
        for other in range(16)
        if other != cell
        and (
            other // 4 == cell // 4
            or other % 4 == cell % 4
            or (other // 8 == cell // 8 and other % 4 // 2 == cell % 4 // 2)
        )
    )
    for cell in range(16)
)


@cache
def all_grids() -> tuple[str, ...]:
    """The 288 solved 4x4 grids, sixteen digits each, sorted."""

    def extend(rows: str) -> Iterator[str]:
        if len(rows) == 16:
            yield rows
            return
        for row in permutations("1234"):
            grid = rows + "".join(row)
            first = len(rows)
            if all(grid[cell] not in {grid[p] for p in PEERS[cell] if p < first} for cell in range(first, first + 4)):
                yield from extend(grid)

    return tuple(extend(""))


@cache
def grids_of(split: str) -> tuple[str, ...]:
    """Solution grids of ``train`` (144), ``test`` (48) or ``validation`` (96): no grid is in two of them.

    Models, recipes and options are chosen by what they do on ``validation``, which is therefore the larger one. On
    ``test`` nothing is chosen, so that what is reported there is no best of several tries.
    """
    grids = list(all_grids())
    random.Random(4).shuffle(grids)
    bounds = {"train": slice(0, 144), "test": slice(144, 192), "validation": slice(192, 288)}
    return tuple(grids[bounds[split]])


def solve_by_singles(puzzle: str, rng: random.Random) -> list[tuple[int, str]] | None:
    """Fill blanks that have one candidate left, in random order among ties: the fills in order, or None if stuck.

    A puzzle that is solved this way has one solution, because every fill was forced.
    """
    cells = list(puzzle)
    fills: list[tuple[int, str]] = []
    blanks = [cell for cell in range(16) if cells[cell] == "0"]
    while blanks:
        singles = []
        for cell in blanks:
            left = set("1234").difference(cells[peer] for peer in PEERS[cell])
            if len(left) == 1:
                singles.append((cell, left.pop()))
        if not singles:
            return None
        cell, digit = rng.choice(singles)
        cells[cell] = digit
        blanks.remove(cell)
        fills.append((cell, digit))
    return fills


def worked(fills: Sequence[tuple[int, str]], solution: str) -> str:
    """The response that fills the blanks in this order."""
    return "".join(CELLS[cell] + digit for cell, digit in fills) + f"={solution}"


def make_problem(grids: Sequence[str], rng: random.Random) -> tuple[dict[str, str], str]:
    """A random problem row (``puzzle``, ``solution``) and one worked response to it."""
    while True:
        solution = rng.choice(grids)
        blanks = set(rng.sample(range(16), rng.randint(MIN_BLANKS, MAX_BLANKS)))
        puzzle = "".join("0" if cell in blanks else digit for cell, digit in enumerate(solution))
        fills = solve_by_singles(puzzle, rng)
        if fills is not None:
            return {"puzzle": puzzle, "solution": solution}, worked(fills, solution)


def check_grids(row: Row) -> None:
    """Raise ValueError unless ``solution`` is a solved grid that ``puzzle`` agrees with."""
    puzzle, solution = row["puzzle"], row["solution"]
    if solution not in all_grids() or len(puzzle) != 16:
        raise ValueError(f"solution {solution!r} of puzzle {puzzle!r} is no solved grid")
    if any(given not in ("0", right) for given, right in zip(puzzle, solution, strict=True)):
        raise ValueError(f"puzzle {puzzle!r} and solution {solution!r} disagree")


class Sudoku(Task):
    """The generated 4x4 Sudoku task. Rows have the columns ``puzzle`` and ``solution`` (16 digits, 0 for a blank)."""

    columns = ("puzzle", "solution")
    eval_lengths = (48,)
    eval_block_length = 8

    def problems(self, split: str, count: int, seed: int = 0) -> list[Row]:
        """``count`` distinct generated problems of ``train``, ``validation`` or ``test``, a function of ``seed``."""
        rng = random.Random(f"{split}-{seed}")
        grids = grids_of(split)
        rows: dict[str, Row] = {}
        while len(rows) < count:
            row, _ = make_problem(grids, rng)
            rows.setdefault(row["puzzle"], row)
        return list(rows.values())

    def read(self, path: Path) -> list[Row]:
        """Problems from a csv, json(l) or parquet file; a malformed row is an error that names its number."""
        return read_rows(path, self.columns, check_grids)

    def prompt(self, row: Row) -> str:
        """What the model is shown."""
        return row["puzzle"] + ":"

    def reference_prompt(self, row: Row) -> str:
        """The prompt behind a solved copy of it: the solution as its own problem with no blanks, then the problem."""
        return f"{row['solution']}:{row['puzzle']}:"

    def solution(self, row: Row) -> str | None:
        """Forced fills in an order that is drawn from the puzzle alone; none if there is no such order."""
        fills = solve_by_singles(row["puzzle"], random.Random(row["puzzle"]))
        return None if fills is None else worked(fills, row["solution"])

    def score(self, row: Row, response: str) -> float:
        """1.0 if the grid behind the first ``=`` is the solution and nothing follows it, else 0.0."""
        return float(response.partition("=")[2] == row["solution"])
