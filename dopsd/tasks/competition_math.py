r"""MATH: competition problems whose answer is a mathematical expression.

Columns: ``problem``, ``solution`` (worked, its answer in ``\boxed{}``). Sources: ``HuggingFaceH4/MATH-500`` to test on,
``DigitalLearningGmbH/MATH-lighteval`` to train on.

An answer is right if it is a final one, as far computed as the reference answer (see ``latex``), and equal to it.
Whether it is equal is what the math-verify package (the optional extra ``math``) says, asked in a process of its own
that ends at a deadline: see ``math_worker``. Answers that are spelled alike are equal without asking. An answer of more
than 500 characters is wrong, and so is one that takes the worker more than its limit of 5 seconds; a worker that has
ended is started again, in about a second.

- ``strict``: the answer is what is marked, in ``<answer>`` tags (a ``\boxed{}`` in them, if any) or else ``\boxed{}``.
- ``lenient``: a last tag or box may be cut off; where nothing is marked, the last formula between dollar signs in the
  last 500 characters counts, or else their last number.
- ``published``: see ``published.math``, which asks nobody.
"""

from __future__ import annotations

import re
from importlib.util import find_spec

from dopsd.errors import RunError
from dopsd.tasks import published
from dopsd.tasks.answers import bare, boxed, marked
from dopsd.tasks.benchmark import HubBenchmark, Source
from dopsd.tasks.latex import exact, is_final, named, spelled
from dopsd.tasks.math_worker import MathWorker
from dopsd.tasks.task import Row

MAX_LENGTH = 500
SPACES = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")
FORMULA = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)")
NUMBER = re.compile(r"-?[0-9][0-9,./]*")


class CompetitionMath(HubBenchmark):
    """Competition math; see the module.

    Raises:
        RunError: math-verify is not installed.
    """

    columns = ("problem", "solution")
    answer_form = r"the final answer in LaTeX, in a \boxed{}"
    eval_problems = 500
    train_source = Source("DigitalLearningGmbH/MATH-lighteval", None, "train")
    test_source = Source("HuggingFaceH4/MATH-500", None, "test")

    def __init__(self, limit: float = 5.0) -> None:
        if find_spec("math_verify") is None:
            raise RunError("task='math' grades with math-verify, which is not installed: pip install 'dopsd[math]'")
        self.worker = MathWorker(limit)

    def statement(self, row: Row) -> str:
        return row["problem"]

    def reference(self, row: Row) -> str:
        return row["solution"]

    def answer(self, row: Row) -> str:
        return rf"\boxed{{{boxed(row['solution']) or ''}}}"

    def grade(self, row: Row, response: str, *, strict: bool) -> float:
        right = boxed(row["solution"])
        answer = marked(response, closed=strict)
        if answer is None and not strict:
            answer = unmarked(response[-MAX_LENGTH:])
        if not right or not answer or len(answer) > MAX_LENGTH:
            return 0.0
        (name, answer), (gold_name, gold) = named(spelled(answer)), named(spelled(right))
        if name and gold_name and name != gold_name:
            return 0.0
        if SPACES.sub("", answer) == SPACES.sub("", gold):
            return 1.0
        if not is_final(answer, gold):
            return 0.0
        return float(self.worker.equal(exact(gold), rf"\boxed{{{exact(answer)}}}"))

    def published_grade(self, row: Row, response: str) -> float:
        return published.math(response, boxed(row["solution"]) or "")


def unmarked(text: str) -> str | None:
    """The last formula, or else the last number, of a text."""
    formulas = FORMULA.findall(text) or [(number, "") for number in NUMBER.findall(text)]
    return bare("".join(formulas[-1])) if formulas else None
