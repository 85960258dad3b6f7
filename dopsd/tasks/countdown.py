r"""Countdown: reach a target with given numbers, each used exactly once, by + - * / and parentheses.

Columns: ``input`` (the numbers, ``30,100,93``) and ``output`` (the target). Rows are generated, with three numbers as
in the published test set: numbers and targets from 1 to 100, reachable by whole numbers of at least 0 throughout.

An expression is parsed (nothing is evaluated as code), of at most 200 characters and 20 nested levels, and computed in
exact fractions. It has whole numbers, ``+ - * /`` or their typographic signs or ``x \times \cdot \div \frac{}{}``,
parentheses, and minus signs in front of operands, which use no number. Powers, decimals and products without a sign are
not known. ``= target`` may follow, or ``target =`` stand before it.

- ``strict``: the expression is what is marked, in ``<answer>`` tags or else ``\boxed{}``; where the box holds no
  computation, only the target, what its line or its tag holds.
- ``lenient``: a last tag or box may be cut off, and the last text in it that looks like a computation counts; where
  nothing is marked, the last one of all.
- ``published``: see ``published.countdown``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations

from dopsd.errors import must_be
from dopsd.tasks import published
from dopsd.tasks.answers import bare, marked, tagged
from dopsd.tasks.benchmark import Benchmark
from dopsd.tasks.task import SPLITS, Row, split_of

MAX_LENGTH, MAX_DEPTH, MAX_NUMBERS = 200, 20, 4
LARGEST = 100
SIGNS = str.maketrans(
    {
        "\N{MULTIPLICATION SIGN}": "*",
        "\N{MIDDLE DOT}": "*",
        "\N{DOT OPERATOR}": "*",
        "\N{DIVISION SIGN}": "/",
        "\N{MINUS SIGN}": "-",
    }
)
LATEX = {
    **{rf"\{name}": "*" for name in ("times", "cdot")},
    **{rf"\{name}": "" for name in ("left", "right", ",", ";", "!", "(", ")", "[", "]")},
    r"\div": "/",
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
}
# ``\frac63``, of which TeX takes a digit each; a box's braces; a letter that multiplies.
ABOVE, BELOW = re.compile(r"\\frac *([0-9])"), re.compile(r"(\\frac *\{[^{}]*\}) *([0-9])")
BOX = re.compile(r"\\boxed *\{([^{}]*)\}?")
TIMES = re.compile(r"(?<=[0-9)}]) *[xX] *(?=[-0-9({\\])")
COMMAND = re.compile(r"\\(?:[a-z]+|[^a-z])")
TOKEN = re.compile(r"[0-9]+|\\frac|[-+*/(){}]")
OPERATION = re.compile(r"[0-9][^0-9]*[-+*/]|\\frac")
COMPUTATION = re.compile(r"(?:\\frac|[-0-9+*/(){}= \t])+")


def plain(text: str) -> str:
    """``text`` with signs in ASCII and without LaTeX decoration."""
    text = COMMAND.sub(lambda match: LATEX.get(match.group(), match.group()), text.replace("$", ""))
    text = BELOW.sub(r"\1{\2}", ABOVE.sub(r"\\frac{\1}", text))
    return TIMES.sub("*", text).translate(SIGNS)


def expression(text: str, *, closed: bool) -> str | None:
    """What is marked as the answer, or, if that is no computation, what it stands in: the tag, or the box's line."""
    answer = marked(text, closed=closed)
    if answer is None or OPERATION.search(plain(answer)):
        return answer
    around = tagged(text, closed=closed)
    if around is None:
        around = next((line for line in reversed(text.splitlines()) if BOX.search(line)), answer)
    return bare(BOX.sub(r"\1", around))


class Expression:
    """A recursive-descent parser and calculator.

    Raises:
        ValueError: not an expression, too long or nested too deeply.
        ZeroDivisionError: as it says.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise ValueError("too long")
        self.tokens = TOKEN.findall(text)
        if sum(map(len, self.tokens)) != len("".join(text.split())):
            raise ValueError("neither numbers nor operators")
        self.numbers = sorted(int(token) for token in self.tokens if token.isdecimal())
        self.tokens = self.tokens[::-1]
        self.value = self.sum(0)
        if self.tokens:
            raise ValueError("more than an expression")

    def take(self, *wanted: str) -> str | None:
        """The next token if it is one of ``wanted``."""
        return self.tokens.pop() if self.tokens and self.tokens[-1] in wanted else None

    def sum(self, depth: int) -> Fraction:
        """Products, added and subtracted."""
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        total = self.product(depth)
        while sign := self.take("+", "-"):
            other = self.product(depth)
            total = total + other if sign == "+" else total - other
        return total

    def product(self, depth: int) -> Fraction:
        """Operands, multiplied and divided."""
        total = self.operand(depth)
        while sign := self.take("*", "/"):
            other = self.operand(depth)
            total = total * other if sign == "*" else total / other
        return total

    def operand(self, depth: int) -> Fraction:
        """A number, a fraction or parentheses, with minus signs in front."""
        negative = False
        while self.take("-"):
            negative = not negative
        if self.take("("):
            found = self.group(depth, ")")
        elif self.take(r"\frac"):
            above, below = (self.group(depth, "}") if self.take("{") else self.number() for _ in range(2))
            found = above / below
        else:
            found = self.number()
        return -found if negative else found

    def group(self, depth: int, end: str) -> Fraction:
        """What is left of a group up to its closing sign."""
        found = self.sum(depth + 1)
        if not self.take(end):
            raise ValueError("unbalanced")
        return found

    def number(self) -> Fraction:
        """A whole number."""
        if not self.tokens or not self.tokens[-1].isdecimal():
            raise ValueError("no number")
        return Fraction(int(self.tokens.pop()))


def reachable(terms: Sequence[tuple[Fraction, str]], *, whole: bool) -> Iterator[tuple[Fraction, str]]:
    """Every value that uses all of ``terms`` (value, expression), and how; ``whole``: by whole numbers from 0 on."""
    if len(terms) == 1:
        yield terms[0]
    for i, j in combinations(range(len(terms)), 2):
        rest = [term for index, term in enumerate(terms) if index not in (i, j)]
        (a, left), (b, right) = sorted((terms[i], terms[j]), reverse=True)
        options = [(a + b, f"({left} + {right})"), (a - b, f"({left} - {right})"), (a * b, f"({left} * {right})")]
        if not whole:
            options.append((b - a, f"({right} - {left})"))
        options += [(x / y, f"({m} / {n})") for x, m, y, n in ((a, left, b, right), (b, right, a, left)) if y]
        for value, how in options:
            if not whole or value.denominator == 1:
                yield from reachable([*rest, (value, how)], whole=whole)


def terms_of(numbers: Sequence[int]) -> list[tuple[Fraction, str]]:
    """Numbers as what ``reachable`` takes."""
    return [(Fraction(number), str(number)) for number in numbers]


def solve(numbers: Sequence[int], target: int) -> str | None:
    """An expression of ``target``, by whole numbers if that is possible; none if there is no expression at all."""
    for whole in (True, False):
        for value, how in reachable(terms_of(numbers), whole=whole):
            if value == target:
                return how.removeprefix("(").removesuffix(")") if len(numbers) > 1 else how
    return None


def numbers_of(row: Row) -> list[int]:
    """The numbers of a row."""
    return [int(number) for number in row["input"].split(",")]


class Countdown(Benchmark):
    """The numbers game; see the module."""

    columns = ("input", "output")
    answer_form = "the expression alone"
    eval_lengths = (128, 256)

    def problems(self, split: str, count: int, seed: int = 0) -> list[Row]:
        """``count`` distinct generated problems, a function of ``split`` and ``seed``.

        Which split a problem is in depends on its numbers, in any order, and its target alone: no seed moves it.
        """
        must_be(split in SPLITS, "split", split, f"one of {', '.join(SPLITS)}")
        rng = random.Random(f"countdown-{split}-{seed}")
        rows: dict[str, Row] = {}
        while len(rows) < count:
            numbers = [rng.randint(1, LARGEST) for _ in range(3)]
            values = {int(value) for value, _ in reachable(terms_of(numbers), whole=True) if 1 <= value <= LARGEST}
            if values:
                target = rng.choice(sorted(values))
                row = {"input": ",".join(map(str, numbers)), "output": str(target)}
                if split_of(self.key(row)) == split:
                    rows.setdefault(self.key(row), row)
        return list(rows.values())

    def check(self, row: Row) -> None:
        whole = re.fullmatch(rf"[0-9]{{1,9}}(?:,[0-9]{{1,9}}){{1,{MAX_NUMBERS - 1}}}", row["input"].replace(" ", ""))
        if not whole or not re.fullmatch(r"[0-9]{1,9}", row["output"]):
            raise ValueError(
                f"input {row['input']!r} and output {row['output']!r} are not 2 to {MAX_NUMBERS} whole numbers with "
                "commas between them, and a whole target"
            )

    def key(self, row: Row) -> str:
        """The numbers in ascending order, and the target."""
        return f"{sorted(numbers_of(row))} {row['output']}"

    def fields(self, row: Row) -> Row:
        """The columns, and ``numbers``: those of ``input`` with a comma and a blank between them."""
        return {**row, "numbers": ", ".join(map(str, numbers_of(row)))}

    def statement(self, row: Row) -> str:
        return (
            f"Combine the numbers {self.fields(row)['numbers']} into an arithmetic expression that equals "
            f"{row['output']}. Use every number exactly once, and nothing but +, -, *, / and parentheses."
        )

    def reference(self, row: Row) -> str:
        """An expression found by search."""
        return f"{self.answer(row)} = {row['output']}"

    def answer(self, row: Row) -> str:
        return str(solve(numbers_of(row), int(row["output"])))

    def grade(self, row: Row, response: str, *, strict: bool) -> float:
        answer = expression(response, closed=strict)
        if answer is None and strict:
            return 0.0
        answer = plain(response if answer is None else answer)
        if not strict:
            runs = [match.group() for match in COMPUTATION.finditer(answer)]
            answer = next((run.strip(" \t*") for run in reversed(runs) if OPERATION.search(run)), "")
        left, equals, right = (side.strip() for side in answer.strip().removesuffix(".").partition("="))
        target = str(int(row["output"]))
        if left == target:
            left, right = right, left
        try:
            parsed = Expression(left)
        except (ValueError, ZeroDivisionError):
            return 0.0
        stated = not equals or right == target
        return float(stated and parsed.numbers == sorted(numbers_of(row)) and parsed.value == int(target))

    def published_grade(self, row: Row, response: str) -> float:
        return published.countdown(response, numbers_of(row), int(row["output"]))
