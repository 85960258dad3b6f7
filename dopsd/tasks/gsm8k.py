r"""GSM8K: grade-school word problems whose answer is a number.

Columns: ``question``, ``answer`` (a worked solution, then ``#### 1,234``). Source: ``openai/gsm8k``, main.

Grades compare exact rationals: thousands commas, ``$``, units, a trailing period, ``\frac{}{}`` and trailing zeros make
no difference; a percent sign is taken for a unit. The answer is what is marked: in ``<answer>`` tags, or else in
``\boxed{}``, or else behind ``####``; what stands before its last ``=`` is left out.

- ``strict``: it must hold exactly one number.
- ``lenient``: the last number in it counts, and a last tag may be cut off; where that gives none, the last number of
  the response counts.
"""

from __future__ import annotations

import re
from fractions import Fraction

from dopsd.tasks.answers import marked
from dopsd.tasks.benchmark import HubBenchmark, Source
from dopsd.tasks.task import Row

MAX_DIGITS = 64
NUMBER = re.compile(
    r"(?P<minus>(?<![0-9A-Za-z)])-)?(?:\$ ?)?"
    r"(?P<above>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?: ?/ ?(?P<below>[0-9]+(?:\.[0-9]+)?))?"
)
FRACTION = re.compile(r"(-?)\\[dt]?frac\{(-?[0-9.]{1,64})\}\{([0-9.]{1,64})\}")
CALCULATION = re.compile(r"<<[^<>]*>>")
MARK = "####"


def numbers(text: str) -> list[re.Match[str]]:
    """The numbers in ``text``."""
    for latex, plain in (("{,}", ","), (r"\!", ""), (r"\,", ""), (r"\$", "$"), ("\N{MINUS SIGN}", "-")):
        text = text.replace(latex, plain)
    return list(NUMBER.finditer(FRACTION.sub(r" \1\2/\3", text)))


def value(found: re.Match[str]) -> Fraction | None:
    """What a number is; None if it is too long to be an answer or divides by zero."""
    minus, above, below = found.group("minus", "above", "below")
    if len(above) + len(below or "") > MAX_DIGITS:
        return None
    divisor = Fraction(below or 1)
    size = Fraction(above.replace(",", "")) / divisor if divisor else None
    return -size if size is not None and minus else size


def final(answer: str) -> str:
    """What a worked solution of the dataset ends with."""
    return answer.rpartition(MARK)[2].strip()


class GSM8K(HubBenchmark):
    """Grade-school math; see the module."""

    columns = ("question", "answer")
    answer_form = "the final answer as one number"
    eval_problems = 1319
    train_source = Source("openai/gsm8k", "main", "train")
    test_source = Source("openai/gsm8k", "main", "test")

    def statement(self, row: Row) -> str:
        return row["question"]

    def reference(self, row: Row) -> str:
        """The worked solution without its calculator annotations."""
        return CALCULATION.sub("", row["answer"])

    def reasoning(self, row: Row) -> str:
        return self.reference(row).partition(MARK)[0].strip()

    def answer(self, row: Row) -> str:
        return final(row["answer"])

    def score(self, row: Row, response: str) -> float:
        strict = self.grading == "strict"
        answer = marked(response, closed=strict)
        if answer is None and MARK in response:
            answer = final(response).partition("\n")[0]
        found = numbers((answer or "").rpartition("=")[2])
        if not strict:
            found = found or numbers(response)
        right = numbers(final(row["answer"]))
        if not right or not found or (strict and len(found) > 1):
            return 0.0
        given = value(found[-1])
        return float(given is not None and given == value(right[-1]))
