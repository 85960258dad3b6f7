"""4x4 Sudoku: grids, generated problems, worked responses, grades, and rows from files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dopsd.errors import UsageError
from dopsd.tasks import load_task
from dopsd.tasks.rows import read_rows
from dopsd.tasks.sudoku import CELLS, PEERS, Sudoku, all_grids, grids_of, make_problem, solve_by_singles

REAL_FILE = Path(__file__).resolve().parents[2] / "shared" / "data" / "sudoku4x4" / "test.csv"

# Every row, column and 2x2 box, by hand.
UNITS = [
    *([4 * r + c for c in range(4)] for r in range(4)),
    *([4 * r + c for r in range(4)] for c in range(4)),
    [0, 1, 4, 5],
    [2, 3, 6, 7],
    [8, 9, 12, 13],
    [10, 11, 14, 15],
]


def is_solved(grid: str) -> bool:
    """Every unit holds each digit once."""
    return len(grid) == 16 and all(sorted(grid[cell] for cell in unit) == list("1234") for unit in UNITS)


def solutions(puzzle: str) -> list[str]:
    """Every solved grid that agrees with the givens."""
    return [grid for grid in all_grids() if all(a in ("0", b) for a, b in zip(puzzle, grid, strict=True))]


def brute_force() -> set[str]:
    """All solved grids, filled cell by cell."""
    partial = [""]
    for cell in range(16):
        extended = []
        for grid in partial:
            for digit in "1234":
                if all(grid[other] != digit for unit in UNITS if cell in unit for other in unit if other < cell):
                    extended.append(grid + digit)
        partial = extended
    return set(partial)


def test_there_are_288_grids() -> None:
    """All solved grids, each once, sorted: those of an independent search."""
    grids = all_grids()
    assert len(grids) == len(set(grids)) == 288 and list(grids) == sorted(grids)
    assert all(is_solved(grid) for grid in grids)
    assert set(grids) == brute_force()


def test_peers_share_a_unit() -> None:
    """A cell's peers are the seven other cells of its row, column and box."""
    for cell in range(16):
        expected = {other for unit in UNITS if cell in unit for other in unit} - {cell}
        assert set(PEERS[cell]) == expected and len(PEERS[cell]) == 7


def test_splits_are_disjoint_and_complete() -> None:
    """The three splits have their sizes, share no grid, hold all of them, and are the same in every process."""
    splits = {name: grids_of(name) for name in ("train", "test", "validation")}
    assert {name: len(grids) for name, grids in splits.items()} == {"train": 144, "test": 48, "validation": 96}
    assert sorted(grid for grids in splits.values() for grid in grids) == list(all_grids())
    # The shipped model was trained on this split.
    order = list(all_grids())
    random.Random(4).shuffle(order)
    assert [grid for grids in splits.values() for grid in grids] == order


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_generated_problems_have_one_solution(split: str) -> None:
    """Problems are distinct, leave 8 to 11 blanks, have exactly one solution, and it is of the split."""
    rows = Sudoku().problems(split, 300, seed=3)
    assert len({row["puzzle"] for row in rows}) == 300
    for row in rows:
        assert solutions(row["puzzle"]) == [row["solution"]]
        assert row["solution"] in grids_of(split)
    assert {row["puzzle"].count("0") for row in rows} == {8, 9, 10, 11}


def test_problems_are_a_function_of_split_and_seed() -> None:
    """The same arguments give the same problems, more of them begin with the fewer, another seed gives others."""
    task = Sudoku()
    rows = task.problems("train", 40, seed=1)
    assert rows == task.problems("train", 40, seed=1)
    assert rows[:10] == task.problems("train", 10, seed=1)
    assert rows != task.problems("train", 40, seed=2)


def test_worked_responses_fill_forced_blanks() -> None:
    """Each pair names a blank whose digit is forced at its time; all blanks are filled, then comes the grid. A row's
    own solution is such a response, and the same each time."""
    rng = random.Random(0)
    problems = [make_problem(grids_of("train"), rng) for _ in range(200)]
    solved = [(row, Sudoku().solution(row) or "") for row, _ in problems[:100]]
    assert solved == [(row, Sudoku().solution(row)) for row, _ in problems[:100]]
    for row, response in problems + solved:
        steps, equals, grid = response.partition("=")
        assert equals and grid == row["solution"]
        cells = list(row["puzzle"])
        assert len(steps) == 2 * cells.count("0")
        for name, digit in zip(steps[::2], steps[1::2], strict=True):
            cell = CELLS.index(name)
            assert cells[cell] == "0"
            taken = {cells[other] for unit in UNITS if cell in unit for other in unit}
            assert {"1", "2", "3", "4"} - taken == {digit}
            cells[cell] = digit
        assert "".join(cells) == grid
        assert Sudoku().score(row, response) == 1.0


def test_puzzles_without_singles_are_given_up() -> None:
    """A puzzle where no blank is forced is not solved; a full one has nothing to fill."""
    assert solve_by_singles("0" * 16, random.Random(0)) is None
    assert Sudoku().solution({"puzzle": "0" * 16, "solution": all_grids()[0]}) is None
    assert solve_by_singles(all_grids()[0], random.Random(0)) == []


SOLUTION = "3142243142131324"
ROW = {"puzzle": "3102200002100320", "solution": SOLUTION}


@pytest.mark.parametrize(
    ("response", "grade"),
    [
        (f"c4={SOLUTION}", 1.0),
        (f"={SOLUTION}", 1.0),
        (SOLUTION, 0.0),
        (f"c4={SOLUTION}1", 0.0),
        (f"c4={SOLUTION} ", 0.0),
        (f"c4= {SOLUTION}", 0.0),
        (f"c4={SOLUTION[:-1]}", 0.0),
        (f"c4={SOLUTION}={SOLUTION}", 0.0),
        (f"c4=={SOLUTION}", 0.0),
        (f"c4={all_grids()[0]}={SOLUTION}", 0.0),
        (f"c4={all_grids()[0]}", 0.0),
        (f"c4:{SOLUTION}", 0.0),
        ("=", 0.0),
        ("", 0.0),
    ],
)
def test_grades_are_strict(response: str, grade: float) -> None:
    """Only the solution right behind the first equals sign, with nothing after it, is correct."""
    found = Sudoku().score(ROW, response)
    assert found == grade and isinstance(found, float)


def test_prompts() -> None:
    """The student sees the puzzle; the AR-style teacher the solved grid as its own problem, then the puzzle."""
    assert Sudoku().prompt(ROW) == "3102200002100320:"
    assert Sudoku().reference_prompt(ROW) == f"{SOLUTION}:3102200002100320:"


def test_unknown_tasks_are_named() -> None:
    """`load_task` knows its tasks and names what it does not know."""
    assert isinstance(load_task("sudoku"), Sudoku)
    with pytest.raises(UsageError, match=r"^task='chess'"):
        load_task("chess")


# ---- files ----


ROWS = [
    {"puzzle": "0140432014020000", "solution": "2143432114323214"},
    {"puzzle": "3102200002100320", "solution": "3142243142131324"},
    {"puzzle": "0000000000000004", "solution": "2143432114323214"},
]


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    """A file of this kind with these rows."""
    path = folder / f"problems.{kind}"
    if kind == "csv":
        path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]) + "\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_rows_are_read_as_text(tmp_path: Path, kind: str) -> None:
    """Every kind of file gives the same strings, zeros in front included; names match in any case, others are left."""
    titled = [{"Id": 7, "Puzzle": row["puzzle"], "SOLUTION": row["solution"]} for row in ROWS]
    assert Sudoku().read(write(tmp_path, kind, titled)) == ROWS


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_missing_column_is_named(tmp_path: Path, kind: str) -> None:
    """The error names the file, the column that is missing, and those that are there."""
    path = write(tmp_path, kind, [{"puzzle": row["puzzle"], "answer": row["solution"]} for row in ROWS])
    with pytest.raises(ValueError, match=r"problems\.\w+: missing column solution; it has puzzle, answer"):
        Sudoku().read(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nothing.csv", ""),
        ("header.csv", "Puzzle,Solution\n"),
        ("nothing.jsonl", ""),
        ("nothing.json", "[]"),
        ("broken.jsonl", '{"puzzle": \n'),
    ],
)
def test_a_file_without_rows_is_named(tmp_path: Path, name: str, text: str) -> None:
    """An empty or broken file is a ValueError whose sentence names the file, whatever the reader makes of it."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=name):
        read_rows(path, ("puzzle", "solution"))


def test_a_file_of_no_kind_or_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Unknown endings and missing files are told apart."""
    (tmp_path / "problems.txt").write_text("Puzzle,Solution\n")
    with pytest.raises(ValueError, match=r"problems\.txt: a task file ends in one of \.csv"):
        read_rows(tmp_path / "problems.txt", ("puzzle",))
    with pytest.raises(FileNotFoundError, match=r"absent\.csv: no such file"):
        read_rows(tmp_path / "absent.csv", ("puzzle",))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"solution": "2143432114323215"}, "row 1: solution .* is no solved grid"),
        ({"solution": "2143432114323213"}, "row 1: solution .* is no solved grid"),
        ({"solution": "214343211432321"}, "row 1: solution .* is no solved grid"),
        ({"puzzle": "314224314213132"}, "row 1: solution .* is no solved grid"),
        ({"puzzle": "31422431421313240"}, "row 1: solution .* is no solved grid"),
        ({"puzzle": "4000000000000000"}, "row 1: puzzle .* and solution .* disagree"),
        ({"puzzle": "3102.00002100320"}, "row 1: puzzle .* and solution .* disagree"),
        ({"puzzle": ""}, "row 1 has no value for puzzle"),
        ({"solution": ""}, "row 1 has no value for solution"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_malformed_row_is_named(tmp_path: Path, kind: str, changes: dict[str, str], sentence: str) -> None:
    """The error names the file and the row's number."""
    rows = [ROWS[0], {**ROWS[1], **changes}, ROWS[2]]
    with pytest.raises(ValueError, match=rf"problems\.{kind}: {sentence}"):
        Sudoku().read(write(tmp_path, kind, rows))


def test_numbers_in_a_json_file_are_not_taken_for_puzzles(tmp_path: Path) -> None:
    """A puzzle written as a number has lost its zeros in front: an error, not another puzzle."""
    path = write(tmp_path, "jsonl", [{"puzzle": int(row["puzzle"]), "solution": row["solution"]} for row in ROWS])
    with pytest.raises(ValueError, match="row 0"):
        Sudoku().read(path)


@pytest.mark.skipif(not REAL_FILE.is_file(), reason="the published test problems are not there")
def test_the_published_problems_are_read() -> None:
    """All 500 published problems are read whole; nearly a third start with a blank, which is a zero."""
    rows = Sudoku().read(REAL_FILE)
    lines = [line.split(",") for line in REAL_FILE.read_text().split()[1:]]
    assert [[row["puzzle"], row["solution"]] for row in rows] == lines and len(rows) == 500
    assert sum(row["puzzle"].startswith("0") for row in rows) > 100
    assert all(row["solution"] in solutions(row["puzzle"]) for row in rows)
