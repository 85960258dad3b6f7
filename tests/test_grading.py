"""The three gradings beside each other: docs/grading.md's table, the published one's readings, and golds' spellings."""

from __future__ import annotations

import random
import re
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from fuzz_graders import PUZZLE

from dopsd.rollout import Decoder
from dopsd.tasks import Grading, Task, load_task, published
from dopsd.tasks.answers import ENDS, bare, ended
from dopsd.tasks.competition_math import CompetitionMath
from dopsd.trajectory import Trajectory

PAGE = Path(__file__).parent.parent / "docs" / "grading.md"
DATA = PAGE.parents[2] / "shared" / "data"
EXAMPLE = re.compile(
    r"^\| (\w+) \| (?:`(.+)`|the solution) \| (?:`` (.+) ``|`(.+)`) \| (\S+) \| (\S+) \| (\S+) \|$", re.MULTILINE
)


def row_of(task: str, gold: str) -> dict[str, str]:
    """A row with a reference answer, as the page writes them."""
    numbers, _, target = gold.partition(" -> ")
    return {
        "gsm8k": {"question": "?", "answer": f"Worked out.\n#### {gold}"},
        "math": {"problem": "?", "solution": rf"So it is $\boxed{{{gold}}}$."},
        "countdown": {"input": numbers, "output": target},
        "sudoku4x4": PUZZLE,
    }[task]


loaded = cache(load_task)  # one process of math-verify is enough


def task_of(name: str, grading: Grading) -> Task:
    """The task, with a grading, until it is asked for with another."""
    if name == "math":
        pytest.importorskip("math_verify")
    task = loaded(name)
    if isinstance(task, CompetitionMath):
        task.worker.limit = 60.0  # on a machine that is busy
    task.grading = grading
    return task


# ---- the page ----


@pytest.mark.parametrize("name", ["gsm8k", "math", "countdown", "sudoku4x4"])
def test_the_pages_examples(name: str) -> None:
    """Each example is graded as the page says, by every grading."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} | ")]
    examples = [example.groups() for example in EXAMPLE.finditer("\n".join(lines))]
    assert len(examples) == len(lines) > 10
    gradings: list[Grading] = ["strict", "lenient", "published"]
    for _, gold, spaced, plain, *grades in examples:
        response = (spaced or plain).replace("\\|", "|").replace("⏎", "\n").replace("⇐", "\u200f")
        found = [task_of(name, grading).score(row_of(name, gold or ""), response) for grading in gradings]
        assert found == list(map(float, grades)), response


# ---- the published grading: what the page's readings say ----


@pytest.mark.parametrize(
    ("response", "grade"),
    [
        (r"\boxed{18", 0),
        (r"\boxed{x} \boxed{18}", 1),
        (r"\boxed{} \boxed{....} \boxed{18.0}", 1),
        ("\\boxed{\n18}", 0),
        (r"\boxed{18 or 19}", 1),
        (r"\boxed{-18}", 0),
        (r"\boxed{1.8e1}", 1),
        (r"\boxed{1_8}", 1),
        (r"\boxed{\text{18} eggs}", 1),
        (r"\boxed {18}", 0),
        (r"\boxed{x}<answer>17, 18</answer>", 1),
        (r"\boxed{17}<answer>18</answer>", 0),
        ("<answer>17</answer><answer>18</answer>", 0),
        ("<answer>18", 0),
        ("<answer>17 <answer>18</answer>", 1),
        ("<answer>\n18\n</answer>", 1),
        ("<answer>nan</answer>", 0),
        ("18", 0),
    ],
)
def test_published_gsm8k(response: str, grade: float) -> None:
    assert published.gsm8k(response, "18") == grade


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\frac{1}{2}", r"\dfrac12"),
        (r"\frac{1}{2}", r"\tfrac1{2}"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", ".5"),
        (r"\frac{1}{2}", "1/2"),
        (r"\frac{-1}{2}", "-1/2"),
        (r"\sqrt{3}", r"\sqrt3"),
        (r"10", r"10\%"),
        (r"10", r"\$10"),
        (r"10", r"10\text{ cm}"),
        (r"10", "x=10"),
        (r"10", "k = 10"),
        (r"90", r"90^\circ"),
        (r"90", r"90^{\circ}"),
        (r"(1,2)", r"\left( 1,\! 2\n \right)".replace(r"\n", "\n")),
    ],
)
def test_published_math_takes_these_for_the_same(gold: str, answer: str) -> None:
    assert published.math(rf"\boxed{{{answer}}}", gold) == 1


@pytest.mark.parametrize(
    ("gold", "response", "grade"),
    [
        ("10", "10", 1),
        ("10", r"\boxed{10}<answer>9</answer>", 1),
        ("10", r"\boxed{9} \boxed{10", 0),
        ("10", r"\boxed{10", 0),
        ("10", r"\boxed{10 <answer>10</answer>", 1),
        ("10", r"\boxed{} <answer>10</answer>", 1),
        ("10", r"<answer>10</answer><answer>9</answer>", 1),
        ("10", r"\boxed{10.0}", 0),
        ("10", r"\boxed{10 }", 1),
        ("10", r"\boxed{val=10}", 0),
        ("10", r"\boxed{10\text{cm}}", 0),
        ("10", r"\boxed{10\text{ cm}\text{ m}}", 0),
        ("3/2", r"\boxed{\frac{3}{2}}", 1),
        ("03/2", r"\boxed{\frac{3}{2}}", 0),
        (r"\{1,2\}", r"\boxed{\{1,2\}}", 1),
    ],
)
def test_published_math(gold: str, response: str, grade: float) -> None:
    assert published.math(response, gold) == grade


@pytest.mark.parametrize(
    ("response", "grade"),
    [
        (r"\boxed{}<answer>30+93-100</answer>", 0),
        (r"\boxed{30+93-100", 0),
        (r"\boxed{30+93-100 = 23", 1),
        (r"\boxed{ = 30+93-100 = 23", 0),
        (r"<answer>30+93-100</answer><answer>1</answer>", 1),
        ("So 30 + 93 - 100 = 23.", 1),
        ("So 30+93-100=x", 0),
        ("First 30+93 = 123, then 123-100 = 23", 0),
        ("a = 5, then 30+93-100 = 23", 0),
        (r"\boxed{30 + 93 - 100.}", 1),
        (r"\boxed{30\cdot100\div93}", 0),
        (r"\boxed{93-70}", 0),
        (r"\boxed{((30+93)-100)}", 1),
        (r"\boxed{(30+93-100}", 0),
        (r"\boxed{30+93-100+0}", 0),
        (r"\boxed{" + "(" * 600 + "30+93-100" + ")" * 600 + "}", 0),
        (r"\boxed{" + "-" * 60 + "30+93-100}", 1),
        (r"\boxed{93**100**30}", 0),
        (r"\boxed{30/(93-93)+100}", 0),
        (r"\boxed{(30)(93)-100}", 0),
    ],
)
def test_published_countdown(response: str, grade: float) -> None:
    assert published.countdown(response, [30, 100, 93], 23) == grade


def test_published_countdown_computes_as_python_does() -> None:
    assert published.countdown(r"\boxed{(8/3)/3}", [8, 3, 3], 1) == 0
    assert published.countdown(r"\boxed{(1/3)*3}", [1, 3, 3], 1) == 1
    assert published.countdown(r"\boxed{7//2}", [7, 2], 3) == published.countdown(r"\boxed{2**3}", [2, 3], 8) == 1
    assert published.countdown(r"\boxed{(0-8)**(1/3)}", [0, 8, 1, 3], -2) == 0  # a complex number


GRID = PUZZLE["solution"]


@pytest.mark.parametrize(
    ("response", "grade"),
    [
        (f"<answer>The grid: ```\n{GRID}\n```</answer>", 1),
        (f"<answer>```{GRID}```", 1),
        (f"<answer>The grid: {GRID}</answer>", 0),
        (f"<answer>{GRID}<|eot_id|><answer>1111</answer>", 1),
        (f"<answer>{'4' * 16}</answer><answer>{GRID}</answer>", 0.5),
        (f"<answer> </answer>{GRID}", 1),
        (f"<answer></answer>  {GRID}<|eot_id|>{GRID}", 1),
        (f"no {GRID} </answer>", 1),
        (f"1{GRID} no tag", 0),
        (f"a grid {PUZZLE['puzzle']} and {GRID}", 0),
        ("<answer>31 42 24 31", 0),
        ("<answer>31 42\n24 31</answer>", 0.5),
        ("", 0),
    ],
)
def test_published_sudoku(response: str, grade: float) -> None:
    assert published.sudoku4x4(response, PUZZLE["puzzle"], GRID) == grade


@pytest.mark.skipif(not DATA.is_dir(), reason="the published problems are not there")
@pytest.mark.parametrize(
    ("name", "file"),
    [("gsm8k", "gsm8k/train.jsonl"), ("countdown", "countdown3/test.jsonl"), ("sudoku4x4", "sudoku4x4/test.csv")],
)
def test_published_golds(name: str, file: str) -> None:
    """Every row's gold is right. The Sudokus have eight blanks each: their mean grade is the right share of cells."""
    rows = load_task(name, "published").read(DATA / file)
    assert name != "sudoku4x4" or {row["puzzle"].count("0") for row in rows} == {8}


# ---- what a response is, up to where ----


@pytest.mark.parametrize("end", ENDS)
def test_a_turn_that_has_ended_is_not_read_on(end: str) -> None:
    response = rf"\boxed{{20}}{end}\boxed{{0}}"
    row = row_of("gsm8k", "20")
    assert ended(response) == r"\boxed{20}"
    assert load_task("gsm8k", "strict").score(row, response) == load_task("gsm8k").score(row, response) == 1


def test_a_decoder_ends_a_response_at_such_a_token_unless_all_of_it_is_graded() -> None:
    """Though these tokens are special, and would vanish from the text; the end-of-text ends it either way."""

    class Tokenizer:
        words = ("twenty", "<|eot_id|>", "nothing", "<|endoftext|>", "<|start|>")

        def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
            return " ".join(w for w in map(self.words.__getitem__, tokens) if not (skip_special_tokens and w[0] == "<"))

    import torch

    tokens = torch.tensor([4, 0, 1, 2, 3, 2])
    trajectory = Trajectory(torch.tensor([0]), tokens, torch.arange(6), 6)
    found: dict[Any, str] = {}
    for grading in ("strict", "lenient", "published"):
        found[grading] = Decoder(None, Tokenizer(), load_task("gsm8k", grading), 9, 3, 1).text(trajectory)
    assert found == {"strict": "twenty", "lenient": "twenty", "published": "<|start|> twenty <|eot_id|> nothing"}


@pytest.mark.parametrize(
    "answer", ["**6**", "`6`", "$6$", r"\(6\)", r"$$\n 6 $$".replace(r"\n", "\n"), "6.,;", "*`6`*."]
)
def test_markup_is_no_part_of_an_answer(answer: str) -> None:
    assert bare(answer) == bare(f"\u200e {answer}\u200b ") == "6"


# ---- golds and their spellings ----

SPELLINGS = (
    "{}",
    " {} ",
    "{}.",
    "{},",
    "{};",
    "**{}**",
    "`{}`",
    "${}$",
    r"\({}\)",
    r"\[{}\]",
    "$${}$$",
    r"\boxed{{{}}}",
    r"$\boxed{{{}}}$",
    r"\fbox{{{}}}",
    r"\boxed{{{}}}.",
    r"{}\text{{ cm}}",
    r"{} \text{{ cm}}^2",
    "x = {}",
    "\u200f{}",
    "\n{}\n",
)
NUMBERS = ("18", "-3", "0", "1234", r"\frac{4}{9}", r"-\frac{1}{7}")
EXPRESSIONS = (
    r"6\sqrt{5}",
    r"\frac{\pi}{6}",
    "15x-80",
    r"\left(3, \frac{\pi}{2}\right)",
    r"(-\infty,2)\cup(3,5]",
    "6+9i",
)


@pytest.mark.parametrize("name", ["gsm8k", "math"])
def test_golds_in_twenty_spellings(name: str) -> None:
    task = task_of(name, "strict")
    for gold, spelling in product(NUMBERS + (EXPRESSIONS if name == "math" else ()), SPELLINGS):
        plain = re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\1/\2", gold) if name == "gsm8k" else gold
        response = f"<answer>{spelling.format(gold)}</answer>"
        assert task.score(row_of(name, plain), response) == 1, response


@pytest.mark.parametrize(
    ("name", "grading", "count"), [("gsm8k", "strict", 500), ("gsm8k", "lenient", 500), ("math", "lenient", 60)]
)
def test_no_answer_is_right_for_two_golds(name: str, grading: Grading, count: int) -> None:
    """Whatever is marked; some are right for one."""
    task, rng = task_of(name, grading), random.Random(0)
    golds = ["18", "-18", "20", "1/2" if name == "gsm8k" else r"\frac{1}{2}", "0.05", "180", "1820"]
    golds += [r"\sqrt{18}", "18x", "(18,20)", r"\{18,20\}", "18_9", "x-20"] if name == "math" else []
    pieces = [*golds, *"+-*/^=,.:%x() ", r"\frac{18}{20}", r"\sqrt", r"\approx", "or", "m^2", r"\cdot", r"\text{ cm}"]
    right = 0
    for _ in range(count):
        answer = "".join(rng.choices(pieces, k=rng.choice([1, 1, 2, 3, 4])))
        response = rf"<answer>{answer}</answer>"
        grades = sum(task.score(row_of(name, gold), response) for gold in golds)
        assert grades <= 1, response
        right += grades == 1
    assert right > count / 10
