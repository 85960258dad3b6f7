"""Hostile responses for every grader: ``python -m tests.fuzz_graders`` takes a hundred thousand, pytest a sample."""

from __future__ import annotations

import random
import re
import resource
import sys
import time
from collections import Counter
from fractions import Fraction
from importlib.util import find_spec
from typing import get_args

from dopsd.tasks import Grading, Task, load_task

PUZZLE = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
ROWS: dict[str, dict[str, str]] = {
    "gsm8k": {"question": "?", "answer": "#### 23"},
    "countdown": {"input": "30,100,93", "output": "23"},
    "sudoku4x4": PUZZLE,
    "sudoku": PUZZLE,
    "math": {"problem": "?", "solution": r"\boxed{\frac{1}{2}}"},
}
PIECES = [
    *"0123456789+-*/().,=<>[]{}|$#\\ \n\t%_^!:;`&",
    *("<answer>", "</answer>", r"\boxed{", r"\frac{", r"\frac", r"\times", r"\left(", "#### ", "30", "93", "100", "23"),
    *(
        r"\sqrt{",
        r"\sqrt",
        r"\text{ ",
        r"\text{",
        r"\pi",
        r"\{",
        r"\\",
        "x",
        "x=",
        "1,234",
        "3142243142131324",
        "Row 1: ",
    ),
    *("**", "//", "```", "<|eot_id|>", "</s>", "\x00", "\ud800", "\u0663", "\u00b2", "\u22ef", "\u200f", "\U0001d7d8"),
    *("e999", "nan", "inf", "1_0", r"\begin{bmatrix}", r"\infty", r"\pm", r"\in", r"\le "),
]
SEEDS = [
    "<answer>30 + 93 - 100 = 23</answer>",
    "c4=3142243142131324",
    "so 23\n#### 23",
    r"\boxed{\frac{46}{2}}",
    r"<answer>\boxed{\frac{1}{2}}</answer>",
    "<answer>3142 / 2431 / 4213 / 1324</answer>",
]
# A text of so many characters is more than is read of one; a grade takes at most so long.
LONG, SECONDS = 10_000_000, 1.0
LONGER = [
    "1 ",
    "1",
    "1,",
    "=",
    "-",
    "(",
    "\\",
    "<answer>",
    "</answer>",
    "<answer></answer>",
    r"\boxed{",
    "\n",
    "3142|",
    "`",
]


def fuzz(rng: random.Random) -> str:
    """Random pieces, or a right answer with some of its characters replaced by them."""
    if rng.random() < 0.5:
        return "".join(rng.choices(PIECES, k=rng.randint(0, 30)))
    text = [*rng.choice(SEEDS)]
    for _ in range(rng.randint(0, 4)):
        text[rng.randrange(len(text))] = rng.choice(PIECES)
    return "".join(text)


def tasks(names: list[str]) -> list[tuple[str, Task]]:
    """Every task of ``names`` that can be loaded, with every grading."""
    known = [name for name in names if name != "math" or find_spec("math_verify")]
    return [(name, load_task(name, grading)) for name in known for grading in get_args(Grading)]


def run(count: int, names: list[str], seed: int = 0) -> tuple[Counter[str], float]:
    """Grade ``count`` texts in turn by every task and grading: how many were right by task, and the slowest's seconds.

    Raises:
        AssertionError: a grade is no number in [0, 1], or a right Countdown is not one by Python's own arithmetic.
    """
    rng = random.Random(seed)
    graders = tasks(names)
    right: Counter[str] = Counter()
    slowest = 0.0
    for number in range(count):
        name, task = graders[number % len(graders)]
        text = fuzz(rng)
        start = time.process_time()
        grade = task.score(ROWS[name], text)
        slowest = max(slowest, time.process_time() - start)
        assert isinstance(grade, float) and 0 <= grade <= 1, (name, task.grading, text)
        right[name] += grade == 1
        if name == "countdown" and task.grading == "strict" and grade == 1:
            check_countdown(text)
    return right, slowest


def check_countdown(text: str) -> None:
    """Python's arithmetic agrees, where the text is an expression that it can read."""
    inside = re.fullmatch(r"<answer>([-+*/() 0-9]+?)(?:= *23)?\.?</answer>", text)
    if inside:
        assert sorted(map(int, re.findall("[0-9]+", inside[1]))) == [30, 93, 100], text
        assert eval(re.sub("([0-9]+)", r"Fraction(\1)", inside[1]), {"Fraction": Fraction}) == 23, text


def main() -> None:
    """Grade a hundred thousand texts, and ten megabytes of each of some."""
    everything = list(ROWS)
    start = time.monotonic()
    right, slowest = run(100_000, everything)
    print(f"100000 texts in {time.monotonic() - start:.0f} s, the slowest in {slowest:.3f} s; right: {dict(right)}")
    worst = 0.0
    for piece in LONGER:
        for name, task in tasks(everything):
            begin = time.process_time()
            assert 0 <= task.score(ROWS[name], (piece * LONG)[:LONG]) <= 1
            worst = max(worst, time.process_time() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"{LONG >> 20} MiB of each of {len(LONGER)} pieces: the slowest in {worst:.2f} s; the process's peak {peak} MiB"
    )
    if slowest > SECONDS or worst > SECONDS:
        sys.exit("a grade took too long")


if __name__ == "__main__":
    main()
