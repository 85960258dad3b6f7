r"""MATH: competition problems whose answer is a mathematical expression.

Columns: ``problem``, ``solution`` (worked, its answer in ``\boxed{}``). Sources: ``HuggingFaceH4/MATH-500`` to test on,
``DigitalLearningGmbH/MATH-lighteval`` to train on.

Whether two answers are equal is what the math-verify package (the optional extra ``math``) says, asked in a process of
its own that ends at a deadline: see ``math_worker``. Answers that are the same text but for spaces are equal without
asking. An answer of more than 500 characters is wrong, and so is one that takes the worker more than its limit of
5 seconds; a worker that has ended is started again, in about a second.

- ``strict``: the answer is what is marked, in ``<answer>`` tags (a ``\boxed{}`` in them, if any) or else ``\boxed{}``.
- ``lenient``: a last tag may be cut off; where nothing is marked, math-verify looks for the answer in the last 500
  characters.
"""

from __future__ import annotations

from importlib.util import find_spec

from dopsd.errors import RunError
from dopsd.tasks.answers import boxed, marked
from dopsd.tasks.benchmark import HubBenchmark, Source
from dopsd.tasks.math_worker import MathWorker
from dopsd.tasks.task import Row

MAX_LENGTH = 500


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

    def score(self, row: Row, response: str) -> float:
        strict = self.grading == "strict"
        right = boxed(row["solution"])
        answer = marked(response, closed=strict)
        if not right or (answer is None and strict):
            return 0.0
        if answer is None:
            return float(self.worker.equal(right, response[-MAX_LENGTH:]))
        if "".join(answer.split()) == "".join(right.split()):
            return 1.0
        return float(0 < len(answer) <= MAX_LENGTH and self.worker.equal(right, rf"\boxed{{{answer}}}"))
