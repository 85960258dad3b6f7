r"""GSM8K: grade-school word problems whose answer is a number.

Columns: ``question``, ``answer`` (a worked solution, then ``#### 1,234``). Source: ``openai/gsm8k``, main.

Grades compare exact rationals: thousands commas, ``$``, units and what is raised in them (``m^2``), a trailing period,
``\frac{}{}`` and trailing zeros make no difference; a percent sign is taken for a unit, and so is the ``:00`` of a full
hour. A fraction is in lowest terms; any other expression, ``2^18`` or ``36/2``, is no number: it is not evaluated. The
answer is what is marked: in ``<answer>`` tags, or else in ``\boxed{}``, or else behind ``####``; what stands before its
last ``=`` is left out.

- ``strict``: it must hold exactly one number.
- ``lenient``: the last number in it counts, and a last tag or box may be cut off; where that gives none, the last
  number of the response counts.
- ``published``: see ``published.gsm8k``.
"""

from __future__ import annotations

import re
from fractions import Fraction

from dopsd.tasks import published
from dopsd.tasks.answers import bare, marked
from dopsd.tasks.benchmark import HubBenchmark, Source
from dopsd.tasks.task import Row

MAX_DIGITS = 64
PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# Between numbers, it makes an expression of them.
SIGN = r" ?[)}]* ?(?:\*\*|[-+*/^x\u00d7\u00f7\u00b7(]) ?[({]*-? ?"
# A number, perhaps a mixed one or a fraction, and what makes more than a number of it.
NUMBER = re.compile(
    r"(?P<minus>(?<![0-9A-Za-z)])-)?(?P<whole>(?:\$ ?)?[0-9]+ (?=[0-9]+/[0-9]))?(?:\$ ?)?"
    rf"(?P<above>{PLAIN})(?: ?/ ?(?P<below>[0-9]+(?:\.[0-9]+)?))?"
    rf"(?P<more>(?:{SIGN}(?:{PLAIN})|:[0-9]+|[\u00b2\u00b3])*)"
)
FRACTION = re.compile(r"(-?)\\[dt]?frac *\{(-?[0-9.]{1,64})\} *\{([0-9.]{1,64})\}")
SHORT_FRACTION = re.compile(r"\\[dt]?frac *([0-9]) *([0-9])")
# The exponent of a unit, and the minutes of a full hour.
UNIT = re.compile(r"([A-Za-z]\}?) ?(?:\^ ?(?:[0-9]|\{[0-9]\})|[\u00b2\u00b3])|(?<=[0-9]):00(?![0-9])")
LATEX = {
    "{,}": ",",
    r"\!": "",
    r"\,": "",
    r"\$": "$",
    r"\times": "*",
    r"\cdot": "*",
    r"\div": "/",
    **dict.fromkeys((r"\text", r"\mathrm", r"\mathbf", r"\boxed", r"\left", r"\right", r"\quad"), ""),
    r"\%": "%",
    "\N{MINUS SIGN}": "-",
}
COMMAND = re.compile(r"\\[A-Za-z]+")
CALCULATION = re.compile(r"<<[^<>]*>>")
DIGIT = re.compile("[0-9]")
MARK = "####"


def numbers(text: str) -> list[re.Match[str]]:
    """The numbers and expressions in ``text``."""
    text = SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = FRACTION.sub(r" \1\2/\3", text)
    for latex, plain in LATEX.items():
        text = text.replace(latex, plain)
    return [] if COMMAND.search(text) else list(NUMBER.finditer(UNIT.sub(r"\1", text)))


def value(found: re.Match[str]) -> Fraction | None:
    """What a number is; None if it is an expression, too long to be an answer or a fraction not in lowest terms."""
    minus, whole, above, below = found.group("minus", "whole", "above", "below")
    if found["more"] or len(found.group()) > MAX_DIGITS:
        return None
    above = above.replace(",", "")
    size = Fraction(above)
    if below is not None:
        quotient = size / Fraction(below) if Fraction(below) else None
        if quotient is None or f"{quotient.numerator}/{quotient.denominator}" != f"{above}/{below}":
            return None
        size = quotient + Fraction(re.sub("[^0-9]", "", whole or "0"))
    return -size if minus else size


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
        return final(row["answer"]).replace(",", "")

    def grade(self, row: Row, response: str, *, strict: bool) -> float:
        answer = marked(response, closed=strict)
        if answer is None and MARK in response:
            answer = bare(final(response).partition("\n")[0])
        found = numbers((answer or "").rpartition("=")[2])
        if not strict and not DIGIT.search(answer or ""):
            found = next(filter(None, map(numbers, response.splitlines()[::-1])), [])
        right = numbers(final(row["answer"]))
        if not right or not found or (strict and len(found) > 1):
            return 0.0
        given = value(found[-1])
        return float(given is not None and given == value(right[-1]))

    def published_grade(self, row: Row, response: str) -> float:
        try:
            return published.gsm8k(response, final(row["answer"]).replace(",", ""))
        except ValueError:  # no gold
            return 0.0
