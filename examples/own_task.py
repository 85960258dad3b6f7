"""A task of one's own, and a run on it: ``python examples/own_task.py``.

4x4 Sudoku with so few digits given that there are several solutions; any of them is right. So nothing can be compared
with an answer that is known: the grade is what d-OPSD learns from, and is all that it needs. It is the share of rows,
columns and boxes that are right, and a response trains when it is 1, unless ``score_threshold`` says otherwise.
"""

import json
import random

import dopsd
from dopsd.tasks.sudoku import all_grids
from dopsd.tasks.task import Task, split_of

ROWS = [range(first, first + 4) for first in (0, 4, 8, 12)]
COLUMNS = [range(first, 16, 4) for first in range(4)]
BOXES = [(first, first + 1, first + 4, first + 5) for first in (0, 2, 8, 10)]


class AnyGrid(Task):
    """Rows have the columns ``puzzle``, sixteen cells with 0 for a blank, and ``solution``, one of several."""

    eval_lengths = (48,)
    eval_block_length = 8

    def problems(self, split, count, seed=0):
        """Distinct ones, a function of the seed; of which split a puzzle is depends on the puzzle alone."""
        draw, rows = random.Random(f"{split} {seed}"), {}
        while len(rows) < count:
            solution = draw.choice(all_grids())
            blanks = draw.sample(range(16), 9)
            puzzle = "".join("0" if cell in blanks else digit for cell, digit in enumerate(solution))
            if split_of(puzzle) == split:
                rows[puzzle] = {"puzzle": puzzle, "solution": solution}
        return list(rows.values())

    def read(self, path):
        """A file of lines in JSON, for --train_file and its like."""
        return [json.loads(line) for line in path.read_text().splitlines()]

    def prompt(self, row):
        """As the tiny model knows it; a chat model is asked in words, and its chat template is put around them."""
        return f"{row['puzzle']}:"

    def reference_prompt(self, row):
        """What a teacher sees with --teacher_context reference; not used by this recipe."""
        return f"{row['solution']}:{row['puzzle']}:"

    def score(self, row, response):
        """Of the grid behind ``=``; nothing if it has another digit where one was given."""
        grid = response.partition("=")[2]
        if len(grid) != 16 or any(given not in ("0", cell) for given, cell in zip(row["puzzle"], grid, strict=True)):
            return 0.0
        units = [*ROWS, *COLUMNS, *BOXES]
        return sum({grid[cell] for cell in unit} == set("1234") for unit in units) / len(units)

    def gold(self, row):
        """Each row is checked before a run: this must be graded 1."""
        return f"={row['solution']}"


def main(**options):
    """Train; the accuracy on test problems before and after."""
    # Two updates take seconds and teach nothing. For the recipe's 36 updates of 32 prompts: main(max_steps=36,
    # per_device_train_batch_size=32, train_problems=4096, validation_problems=128, eval_problems=512).
    small = {"max_steps": 2, "per_device_train_batch_size": 4, "train_problems": 64}
    small |= {"validation_problems": 8, "eval_problems": 16, "eval_tokens_per_step": []}
    run = dopsd.train(recipe="tiny", task=f"{__file__}:AnyGrid", **{**small, **options})
    before, after = (run.report[f"accuracy_{when}"] for when in ("before", "after"))
    print(f"grade {before:.3f} before, {after:.3f} after; all of the run is in {run.folder}")
    return before, after


if __name__ == "__main__":
    main()
