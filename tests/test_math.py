"""MATH: equal answers as math-verify sees them, and a worker that no answer outlasts."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dopsd.errors import RunError
from dopsd.tasks import competition_math, load_task
from dopsd.tasks.competition_math import CompetitionMath
from dopsd.tasks.math_worker import MathWorker

pytest.importorskip("math_verify")

LIMIT = 0.3
START = 20.0  # seconds that starting a worker takes at most, on a machine that is busy


def row(gold: str) -> dict[str, str]:
    return {"problem": "?", "solution": rf"So it is $\boxed{{{gold}}}$."}


@pytest.fixture(scope="module")
def task() -> Iterator[CompetitionMath]:
    task = CompetitionMath()
    yield task
    task.worker.close()


@pytest.fixture
def strict(task: CompetitionMath) -> Iterator[CompetitionMath]:
    task.grading = "strict"
    yield task
    task.grading = "lenient"


@pytest.mark.parametrize(
    ("gold", "answer", "grade"),
    [
        (r"\frac{1}{2}", "0.5", 1),
        (r"\frac{1}{2}", "1/2", 1),
        (r"\frac12", r"\dfrac{1}{2}", 1),
        (r"\frac{1}{2}", r"\frac{2}{4}", 0),
        (r"\frac{1}{2}", r"\frac{0.5}{1}", 0),
        (r"\frac{4}{9}", r"\frac{\frac{8}{9}}{2}", 0),
        (r"\frac{3}{2}", r"1\frac{1}{2}", 1),
        (r"\frac{2}{3}\pi", r"\frac{2\pi}{3}", 1),
        (r"\frac{5\sqrt{6}-10}{2}", r"\frac{5}{2+\sqrt{6}}", 0),
        (r"2\sqrt{13}", r"\sqrt{13}2", 1),
        (r"3\pi", r"4\pi-\pi", 0),
        ("2i", r"\sqrt{-4}", 0),
        (r"\frac{\sqrt{3}}{2}", r"\sqrt{\frac{3}{4}}", 0),
        ("2(x+3)", "2x+6", 0),
        (r"\frac{x+2}{7}", r"\frac{2+x}{7}", 1),
        ("10", "2(5)", 0),
        ("56", "5 6", 0),
        ("-1", "i^2", 0),
        (r"\frac{2}{3}", r"0.\overline{6}", 0),
        ("(1,2)", "(1, 2)", 1),
        ("(1,2)", "(2, 1)", 0),
        ("1,2,3", "3, 2, 1", 1),
        ("[1,2)", r"\left[1, 2\right)", 1),
        ("90^\\circ", "90", 1),
        ("1,000", "1000", 1),
        (r"\$5", "5", 1),
        (r"5 \text{ cm}", "5", 1),
        ("5", "x = 5", 1),
        ("x=5", "5", 1),
        ("x=5", "y=5", 0),
        ("2x+3", "y=2x+3", 1),
        ("x^2+y^2=1", "y^2+x^2=1", 1),
        ("1,2", r"x=2 \text{ or } x=1", 1),
        ("[2,5)", r"2 \le x < 5", 1),
        (r"(-\infty,3]", r"3 \geq x", 1),
        ("x>3", r"(3,\infty)", 1),
        ("x>3", "y>3", 0),
        (r"\text{Monday}", "Monday", 1),
        (r"\text{even}", "odd", 0),
        (r"\text{(A)}", "A", 1),
        (r"\text{(A)}", "B", 0),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 1),
        ("5", "6", 0),
        ("p - q", "q - p", 0),
        ("5", "", 0),
        ("5", "}{", 0),
    ],
)
def test_equal_answers(strict: CompetitionMath, gold: str, answer: str, grade: float) -> None:
    assert strict.score(row(gold), f"<answer>{answer}</answer>") == grade
    assert strict.score(row(gold), rf"<reasoning>\boxed{{77}}</reasoning><answer>\boxed{{{answer}}}</answer>") == grade


@pytest.mark.parametrize(
    ("response", "strictly", "leniently"),
    [
        (r"\boxed{\frac{1}{2}}", 1, 1),
        (r"<answer>\boxed{\dfrac{1}{2}}", 1, 1),
        (r"<answer>\dfrac{1}{2}", 0, 1),
        (r"<answer>\boxed{\dfrac{1}{2}", 0, 1),
        (r"The final answer is $\dfrac{1}{2}$.", 0, 1),
        (r"The final answer is \(\dfrac{1}{2}\), from $x$ and $y$.", 0, 0),
        ("So 1/2.", 0, 1),
        ("So 1/3.", 0, 0),
        ("<answer>1/3</answer> or 1/2", 0, 0),
        ("", 0, 0),
    ],
)
def test_where_the_answer_is(task: CompetitionMath, response: str, strictly: float, leniently: float) -> None:
    try:
        for grading, grade in (("strict", strictly), ("lenient", leniently)):
            task.grading = grading  # type: ignore[assignment]
            assert task.score(row(r"\frac{1}{2}"), response) == grade
    finally:
        task.grading = "lenient"


def test_a_gold_equals_itself_even_where_it_can_not_be_parsed(strict: CompetitionMath) -> None:
    for gold in (r"\frac{1}{2}", r"\text{(A)}", r"\mathbf{?!}", r"2516_8", "1 2"):
        assert strict.score(row(gold), strict.gold(row(gold))) == 1
    assert strict.score({"problem": "?", "solution": "no box"}, "<answer></answer>") == 0


BOMBS = [
    r"10^{10^{10}}",
    r"9^{9^{9^{9}}}",
    "1000000!",
    "9" * 499,
    r"\frac{" * 35 + "1" + "}{2}" * 35,
    "(" * 240 + "1" + ")" * 240,
    r"\sum_{n=1}^{10000000} n^{n}",
    r"(x+1)^{5000}",
    r"\binom{1000000}{500000}",
    "{" * 480,
    r"\sqrt[" * 70,
    "x^" * 240 + "1",
    "1e999999999",
    r"\begin{pmatrix}" * 30,
]


def test_bombs_take_no_longer_than_the_limit() -> None:
    """Each is wrong within the limit and the time to start a worker again, and the next answer is graded as ever."""
    worker = MathWorker(10.0)
    assert worker.equal("0.5", r"\boxed{1/2}")
    worker.limit = LIMIT
    ended = 0
    for bomb in (r"9^{9^{9^{9}}}", "1000000!", r"\sum_{n=1}^{10000000} n^{n}"):
        start = time.monotonic()
        assert not worker.equal("0.5", rf"\boxed{{{bomb}}}"), bomb
        assert time.monotonic() - start < LIMIT + START
        ended += worker.process is None
    assert ended, "no bomb has hit the limit"
    worker.limit = 10.0
    assert worker.equal("0.5", r"\boxed{1/2}")
    worker.close()


def test_most_bombs_are_not_even_asked(task: CompetitionMath, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are still to be computed, and say so."""
    asked: list[str] = []
    monkeypatch.setattr(task.worker, "equal", lambda gold, answer: asked.append(answer) is not None)
    start = time.process_time()
    for bomb in BOMBS:
        assert task.score(row("0.5"), f"<answer>{bomb}</answer>") == 0
    assert len(asked) <= 3 and time.process_time() - start < 1


def test_long_responses_are_not_even_asked() -> None:
    task = load_task("math", "strict")
    assert isinstance(task, CompetitionMath)
    start = time.process_time()
    for text in (r"\boxed{" * 10**5, "<answer>" + "9" * 10**6 + "</answer>", r"\boxed{" + "1+" * 10**5 + "1}"):
        assert task.score(row("5"), text) == 0
    assert time.process_time() - start < 5 and task.worker.process is None


def test_hundreds_of_texts(task: CompetitionMath) -> None:
    """Random LaTeX has a grade in [0, 1] each, and all together stay far below as many limits."""
    rng = random.Random(0)
    pieces = [*"0123456789xyz+-*/=^_{}()[],.$\\ !|&%", r"\frac{1}{2}", r"\sqrt{", r"\boxed{", "<answer>", "</answer>"]
    pieces += [r"\text{", r"\left(", r"\pi", r"\infty", r"\cup", "\x00", "\n", "\u0663", "\ud800", "and", "\u222b"]
    start = time.monotonic()
    count = 400
    for _ in range(count):
        answer = "".join(rng.choices(pieces, k=rng.randint(0, 20)))
        assert task.score(row(r"\frac{1}{2}"), rng.choice([answer, f"<answer>{answer}</answer>"])) in (0.0, 1.0)
    assert time.monotonic() - start < count * task.worker.limit / 4
    assert task.score(row("0.5"), r"\boxed{1/2}") == 1


def test_workers_are_for_threads_and_forks_too() -> None:
    """Threads take turns; a fork asks a worker of its own."""
    worker = MathWorker(10.0)
    answers: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(worker.equal(f"{n}/2", f"{n * 2}/4"))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 8
    mine = worker.process
    worker.owner = -1  # what a fork finds
    assert worker.equal("1/2", "0.5") and worker.process is not mine and worker.owner == os.getpid()
    assert mine is not None
    mine.kill()
    mine.communicate()
    worker.close()


def test_a_worker_that_was_killed_is_replaced() -> None:
    worker = MathWorker(10.0)
    assert worker.equal("1/2", "0.5")
    assert worker.process is not None
    worker.process.kill()
    worker.process.wait()
    assert not worker.equal("1/2", "0.5")
    assert worker.equal("1/2", "0.5")
    worker.close()


def test_a_worker_imports_no_script_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one in the current folder, the script's or on PYTHONPATH, though it has the name of a standard module."""
    marker = tmp_path / "started"
    for name in ("copy", "sympy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = MathWorker(10.0)
    try:
        assert worker.equal("1/2", "0.5")
    finally:
        worker.close()
    assert not marker.exists()


def test_a_worker_that_can_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RunError, match="math-verify can't be used to grade: its process has ended"):
        MathWorker(1.0).equal("1", "1")


def test_a_missing_package_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(competition_math, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"task='math' .* not installed: pip install 'dopsd\[math\]'"):
        load_task("math")
