"""The graders of GSM8K, Countdown and the Sudoku in words: what counts, and that no text can stop them."""

from __future__ import annotations

import random
import time
import tracemalloc
from fractions import Fraction

import pytest
from fuzz_graders import PUZZLE, ROWS, SECONDS, run, tasks

from dopsd.tasks import Row, load_task
from dopsd.tasks.answers import boxed, marked, tagged

# ---- where the answer is ----


@pytest.mark.parametrize(
    ("text", "closed", "unclosed"),
    [
        ("<answer>5</answer>", "5", "5"),
        ("<answer>\n 5 \n</answer> and more", "5", "5"),
        ("<answer>4</answer> no: <answer>5</answer>", "5", "5"),
        ("<answer>4</answer> no: <answer>5", "4", "5"),
        ("<answer>5", None, "5"),
        ("5</answer>", None, None),
        ("</answer><answer>", None, None),
        ("<answer><answer>5</answer></answer>", "5", "5"),
        ("<answer></answer>", None, None),
        ("<answer>5</answer><answer> </answer>", "5", "5"),
        ("", None, None),
    ],
)
def test_the_last_tag(text: str, closed: str | None, unclosed: str | None) -> None:
    assert (tagged(text), tagged(text, closed=False)) == (closed, unclosed)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}} then $", r"\frac{1}{2}"),
        (r"\boxed{4}, \boxed{5}", "5"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{4}, \boxed{5", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"$\boxed 2$.", "2"),
        (r"} \boxed{5} {", "5"),
        (r"\boxed{", None),
        (r"\boxedfoo{5}", None),
        ("5", None),
    ],
)
def test_the_last_box(text: str, found: str | None) -> None:
    assert boxed(text) == found


def test_a_box_in_a_tag_goes_before_one_outside() -> None:
    assert marked(r"<answer>\boxed{5}</answer> \boxed{6}") == "5"
    assert marked(r"\boxed{6} <answer>5</answer>") == "5"
    assert marked(r"\boxed{6}") == "6"
    assert marked("6") is None


# ---- tables: text, strict grade, lenient grade ----


def grades(name: str, row: Row, response: str) -> tuple[float, float]:
    return load_task(name, "strict").score(row, response), load_task(name, "lenient").score(row, response)


@pytest.mark.parametrize(
    ("gold", "response", "strict", "lenient"),
    [
        ("18", "<answer>18</answer>", 1, 1),
        ("18", "<answer>18.0</answer>", 1, 1),
        ("18", "<answer>$18.00.</answer>", 1, 1),
        ("18", r"<answer>\$18</answer>", 1, 1),
        ("18", "<answer>18 dollars</answer>", 1, 1),
        ("18", "<answer>The answer is 18.</answer>", 1, 1),
        ("18", "<answer>9 + 9 = 18</answer>", 1, 1),
        ("18", r"<answer>\boxed{18}</answer>", 1, 1),
        ("18", r"<answer>$\boxed{18\text{ eggs}}$</answer>", 1, 1),
        ("18", r"So it is \boxed{18}.", 1, 1),
        ("18", "Nine and nine.\n#### 18", 1, 1),
        ("18", "#### 18\nThat was easy, 1 2 3.", 1, 1),
        ("18", "<answer>17</answer> 18", 0, 0),
        ("18", r"<answer>17</answer> \boxed{18}", 0, 0),
        ("18", "<answer>18 of 20</answer>", 0, 0),
        ("18", "<answer>2 boxes with 18</answer>", 0, 1),
        ("18", "<answer>eighteen</answer>, so 18", 0, 1),
        ("18", "9 + 9 = 18", 0, 1),
        ("18", "It is 18, not 17.", 0, 0),
        ("18", "<answer>18", 0, 1),
        ("18", "<answer></answer>", 0, 0),
        ("18", "", 0, 0),
        ("18", "<answer>180</answer>", 0, 0),
        ("18", "<answer>-18</answer>", 0, 0),
        ("18", "<answer>18%</answer>", 1, 1),
        ("18", "<answer>18e1</answer>", 0, 0),
        ("-5", "<answer>-5</answer>", 1, 1),
        ("-5", "<answer>\u22125</answer>", 1, 1),
        ("-5", "<answer>$-5</answer>", 1, 1),
        ("-5", "<answer>-$5</answer>", 1, 1),
        ("-0.5", r"<answer>-\frac{1}{2}</answer>", 1, 1),
        ("5", "<answer>10-5</answer>", 0, 0),
        ("5", "<answer>10-</answer> 5", 0, 0),
        ("5", "<answer>Total - 5</answer>", 1, 1),
        ("5", "<answer>- 5 eggs</answer>", 1, 1),
        ("5", "<answer>step-5</answer>", 1, 1),
        ("1,234", "<answer>1234</answer>", 1, 1),
        ("1,234", "<answer>1,234</answer>", 1, 1),
        ("1,234", "<answer>$1,234.00</answer>", 1, 1),
        ("1,234", r"<answer>1{,}234</answer>", 1, 1),
        ("1,234", r"<answer>1\,234</answer>", 1, 1),
        ("1234", "<answer>1,234</answer>", 1, 1),
        ("1,234", "<answer>12,34</answer>", 0, 0),
        ("1,234", "<answer>1,2345</answer>", 0, 0),
        ("109,200,000", "<answer>109200000</answer>", 1, 1),
        ("0.5", "<answer>1/2</answer>", 1, 1),
        ("0.5", r"<answer>\frac{1}{2}</answer>", 1, 1),
        ("0.5", r"<answer>\dfrac{-1}{2}</answer>", 0, 0),
        ("0.5", "<answer>.5</answer>", 1, 1),
        ("0.5", "<answer>0.50000000000000000001</answer>", 0, 0),
        ("31/2", r"<answer>3\frac{1}{2}</answer>", 0, 0),
        ("3", "<answer>3/0</answer>", 0, 0),
        ("3", "<answer>\u0663</answer>", 0, 0),  # an Arabic-Indic three
        ("3", f"<answer>{'3' * 10**5}</answer>", 0, 0),
    ],
)
def test_gsm8k(gold: str, response: str, strict: float, lenient: float) -> None:
    row = {"question": "?", "answer": f"Worked out.\n#### {gold}"}
    assert grades("gsm8k", row, response) == (strict, lenient)


def test_numbers_are_exact_however_they_are_written() -> None:
    """A random rational, written in any of several ways, equals itself and not its neighbour."""
    rng = random.Random(0)
    task = load_task("gsm8k", "strict")
    for _ in range(500):
        number = Fraction(rng.randint(-(10**9), 10**9), 100)
        fixed = f"{float(number):.2f}"
        ways = (
            fixed,
            f"{float(number):,.2f}",
            f"{number.numerator}/{number.denominator}",
            fixed + "0 km",
            f"x = {fixed}.",
        )
        row = {"question": "?", "answer": f"#### {fixed}"}
        other = {"question": "?", "answer": f"#### {float(number) + 0.01:.2f}"}
        for way in ways:
            assert task.score(row, f"<answer>{way}</answer>") == 1, way
            assert task.score(other, f"<answer>{way}</answer>") == 0, way


@pytest.mark.parametrize(
    ("response", "strict", "lenient"),
    [
        ("<answer>30 + 93 - 100</answer>", 1, 1),
        ("<answer>30+93-100=23</answer>", 1, 1),
        ("<answer>30 + 93 - 100 = 23.</answer>", 1, 1),
        ("<answer>93 - (100 - 30)</answer>", 1, 1),
        ("<answer>-100 + 30 + 93</answer>", 1, 1),
        ("<answer>-(100 - 30) + 93</answer>", 1, 1),
        ("<answer>93--30-100</answer>", 1, 1),
        ("<answer>((((30 + 93 - 100))))</answer>", 1, 1),
        (r"<answer>\(30 + 93 - 100\)</answer>", 1, 1),
        (r"<answer>$\left(30 + 93\right) - 100 = 23$</answer>", 1, 1),
        (r"\boxed{30 + 93 - 100}", 1, 1),
        ("<answer>30 + 93 \u2212 100</answer>", 1, 1),
        ("30 + 93 - 100", 0, 1),
        ("First 1 + 1.\nThen 30 + 93 - 100 = 23, and that is it.", 0, 1),
        ("<answer>30 + 93 - 100", 0, 1),
        ("<answer>Use 30 + 93 - 100</answer>", 0, 1),
        ("<answer>30 + 93 - 100 = 24</answer>", 0, 0),
        ("<answer>30 + 93 - 100 = 23 = 23</answer>", 0, 0),
        ("<answer>23</answer>", 0, 0),
        ("<answer>23 = 23</answer>", 0, 0),
        ("<answer>30 + 93 - 100 + 30 - 30</answer>", 0, 0),
        ("<answer>100 - 93</answer>", 0, 0),
        ("<answer>30 + 93 + 100</answer>", 0, 0),
        ("<answer>30 + 9 3 - 100</answer>", 0, 0),
        ("<answer>+30 + 93 - 100</answer>", 0, 0),
        ("<answer>30 + 93 - 100 +</answer>", 0, 0),
        ("<answer>(30 + 93 - 100</answer>", 0, 0),
        ("<answer>30 + 93 - 100)</answer>", 0, 0),
        ("<answer>30.0 + 93 - 100</answer>", 0, 0),
        ("<answer>(30)(93)(100)</answer>", 0, 0),
        ("<answer>30 + 93 - 100 # 23</answer>", 0, 1),
        ("<answer>abs(30 + 93 - 100)</answer>", 0, 1),
        ("<answer>__import__('os')</answer>", 0, 0),
        ("<answer>" + "(" * 50 + "30 + 93 - 100" + ")" * 50 + "</answer>", 0, 0),
        ("<answer></answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_countdown(response: str, strict: float, lenient: float) -> None:
    assert grades("countdown", {"input": "30,100,93", "output": "23"}, response) == (strict, lenient)


@pytest.mark.parametrize(
    ("numbers", "target", "expression", "grade"),
    [
        ("3,4,2", "24", r"3 \times 4 \cdot 2", 1),
        ("3,4,2", "6", r"3 \times 4 \div 2", 1),
        ("3,4,2", "6", "3 \u00d7 4 \u00f7 2", 1),
        ("3,4,2", "6", r"\frac{3 \times 4}{2}", 1),
        ("3,4,2", "6", r"\dfrac{3}{2} * 4", 1),
        ("3,4,2", "6", r"\frac{3}{\frac{2}{4}}", 1),
        ("3,4,2", "2", r"\frac{3}{4", 0),
        ("1,3,3", "1", "3 * (1 / 3)", 1),
        ("8,3,3", "1", "8 / 3 / 3", 0),
        ("2,3,8", "64", "2 ** 3 * 8", 0),
        ("2,3", "8", "2 ^ 3", 0),
        ("2,3", "8", "2 ** 3", 0),
        ("7,2", "3", "7 // 2", 0),
        ("5,0", "0", "5 / 0", 0),
        ("5,0", "0", "0 / 5", 1),
        ("5,5", "0", "5 - 5", 1),
        ("5,5", "25", "5 * 5", 1),
        ("5,7", "35", "5 * 5", 0),
        ("05,7", "35", "5 * 7", 1),
    ],
)
def test_countdown_signs(numbers: str, target: str, expression: str, grade: float) -> None:
    row = {"input": numbers, "output": target}
    assert load_task("countdown", "strict").score(row, f"<answer>{expression}</answer>") == grade


@pytest.mark.parametrize(
    ("response", "strict", "lenient"),
    [
        ("<answer>3142243142131324</answer>", 1, 1),
        ("<answer>3142\n2431\n4213\n1324</answer>", 1, 1),
        ("<answer>```\n3142\n2431\n4213\n1324\n```</answer>", 1, 1),
        ("<answer>| R1: 3142 | R2: 2431 | R3: 4213 | R4: 1324 |</answer>", 1, 1),
        ("<answer>3142243142131324 3142243142131324</answer>", 0, 1),
        ("<answer>3 1 4 2 | 2 4 3 1 | 4 2 1 3 | 1 3 2 4</answer>", 1, 1),
        ("<answer>| 31 | 42 |\n+----+----+\n| 24 | 31 |\n| 42 | 13 |\n| 13 | 24 |</answer>", 1, 1),
        ("<answer>[[3,1,4,2],[2,4,3,1],[4,2,1,3],[1,3,2,4]]</answer>", 1, 1),
        (r"\boxed{3142243142131324}", 1, 1),
        ("<answer>The grid: 3142243142131324</answer>", 0, 1),
        ("<answer>3142243142131324", 0, 1),
        ("3142\n2431\n4213\n1324", 0, 1),
        ("3102\n2000\n0210\n0320\n\n3142\n2431\n4213\n1324", 0, 1),
        ("Row 1: 3142", 0, 0),
        ("<answer>3142243142131323</answer>", 7 / 8, 7 / 8),
        ("<answer>3122233332133323</answer>", 2 / 8, 2 / 8),
        ("<answer>3102200002100320</answer>", 0, 0),
        ("<answer>4142243142131324</answer>", 0, 0),
        ("<answer>314224314213132</answer>", 0, 0),
        ("<answer>31422431421313244</answer>", 0, 0),
        ("<answer>\u0663142243142131324</answer>", 0, 0),
        ("<answer></answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_sudoku4x4(response: str, strict: float, lenient: float) -> None:
    assert grades("sudoku4x4", PUZZLE, response) == (strict, lenient)


def test_a_sudoku_without_blanks_is_right_as_it_is() -> None:
    row = {"puzzle": PUZZLE["solution"], "solution": PUZZLE["solution"]}
    assert grades("sudoku4x4", row, "<answer>3142243142131324</answer>") == (1, 1)
    assert grades("sudoku4x4", row, "<answer>3142243142131323</answer>") == (0, 0)


# ---- nothing stops a grader ----


def test_ten_thousand_texts() -> None:
    """Every text has a grade in [0, 1], at once; a right Countdown is right by Python's own arithmetic too."""
    names = [name for name in ROWS if name != "math"]
    right, slowest = run(12_000, names)
    assert slowest < SECONDS
    assert min(right[name] for name in names) > 10, "the mutations are too wild to say much"


def test_a_text_is_read_as_far_as_one_can_be_decoded() -> None:
    """Of ten megabytes the answer at the end is not seen, and what is kept of them is little."""
    for name, task in tasks([name for name in ROWS if name != "math"]):
        start = time.process_time()
        assert task.score(ROWS[name], "1 " * 5_000_000 + "<answer>23</answer>") < 1
        assert time.process_time() - start < SECONDS
    tracemalloc.start()
    load_task("gsm8k").score(ROWS["gsm8k"], "1 " * 5_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20


LONG = 300_000


@pytest.mark.parametrize("name", [name for name in ROWS if name != "math"])
@pytest.mark.parametrize(
    "text",
    [
        "1" * LONG,
        "1," * (LONG // 2),
        "1,111" * (LONG // 5),
        "," + ",111" * (LONG // 4),
        " " * LONG + "1",
        "- " * (LONG // 2),
        "1 / " * (LONG // 4),
        "1 " * (LONG // 2),
        "=" * LONG,
        "-" * LONG,
        "(" * LONG,
        "{" * LONG,
        "}" * LONG,
        "\\" * LONG,
        "<answer>" * (LONG // 8),
        "</answer>" * (LONG // 9),
        "<answer></answer>" * (LONG // 17),
        r"\boxed{" * (LONG // 7),
        r"\boxed " * (LONG // 7),
        r"\boxed" + " " * LONG,
        r"\frac{1}{" * (LONG // 9),
        r"\frac{" + "1" * LONG,
        "#" * LONG,
        "<<" * (LONG // 2),
        "3142|" * (LONG // 5),
        "<answer>" + "9*" * (LONG // 2) + "9</answer>",
        "<answer>" + "-" * 150 + "30 + 93 - 100</answer>",
        "<answer>" + "(" * 99 + "1" + ")" * 99 + "</answer>",
        "<answer>" + "9" * 5000 + "</answer>",
        "#### " + "9" * 5000 + "." + "9" * 5000,
    ],
    ids=lambda text: text[:12],
)
def test_a_long_text_takes_no_longer_than_reading_it(name: str, text: str) -> None:
    """All patterns are linear: a quadratic one would take hours here."""
    for _, task in tasks([name]):
        start = time.process_time()
        assert 0 <= task.score(ROWS[name], text) <= 1
        assert time.process_time() - start < 5
