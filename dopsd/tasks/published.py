r"""``--grading published``: how the published accuracies of LLaDA on these benchmarks were graded.

Written from a description of what that grading does, oddities included, so that a figure of one's own may stand beside
a published one; ``docs/grading.md`` has the description, and the readings chosen where it leaves two. It rewards what
nobody would call an answer (the first box of several, a grid padded with zeros) and is not for training.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Sequence

from dopsd.tasks.answers import CLOSE, OPEN

# ---- where it looks ----

BRACE = re.compile("[{}]")


def first_tag(text: str) -> str | None:
    """What the first ``<answer>`` that is closed holds."""
    start = text.find(OPEN)
    end = text.find(CLOSE, start)
    return text[start + len(OPEN) : end].strip() if start >= 0 and end >= 0 else None


def last_box(text: str) -> str | None:
    r"""What the last ``\boxed`` holds, up to the brace that balances its own; none if there is no such brace."""
    start = text.rfind(r"\boxed")
    if start < 0 or not text.startswith(r"\boxed{", start):
        return None
    depth = 0
    for match in BRACE.finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return text[start + len(r"\boxed{") : match.start()]
    return None


# ---- GSM8K ----

NUMBER = re.compile(r"-?\d+\.?\d*")


def number(text: str, which: int) -> float | None:
    """``text`` as Python's ``float`` takes it, or else the number that stands ``which`` in it."""
    try:
        return float(text)
    except ValueError:
        found = NUMBER.findall(text)
        return float(found[which]) if found else None


def gsm8k(text: str, gold: str) -> float:
    """Whether the first box with a number has the number ``gold``, or, where there is none, the first tag."""
    right = float(gold)
    for line in text.split("\n"):
        start = line.find(r"\boxed{")
        while start >= 0 and (end := line.find("}", start)) >= 0:
            given = number(line[start + len(r"\boxed{") : end], 0)
            if given is not None:
                return float(given == right)
            start = line.find(r"\boxed{", end)
    return float(number(first_tag(text) or "", -1) == right)


# ---- MATH ----

REWRITTEN = {
    "\n": "",
    r"\!": "",
    "\\\\": "\\",
    "tfrac": "frac",
    "dfrac": "frac",
    r"\left": "",
    r"\right": "",
    r"^{\circ}": "",
    r"^\circ": "",
    r"\$": "",
}
UNIT = r"\text{ "
QUOTIENT = re.compile("(-?[1-9][0-9]*|0)/(-?[1-9][0-9]*|0)")


def normal(text: str) -> str:
    """An answer as MATH's graders write it to compare it as a string; the order of the steps is theirs."""
    for old, new in REWRITTEN.items():
        text = text.replace(old, new)
    if text.count(UNIT) == 1:
        text = text.partition(UNIT)[0]
    text = text.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    if text.count("=") == 1 and text.index("=") <= 2:
        text = text.partition("=")[2]
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])(\{|.)", lambda match: rf"\frac{{{match[1]}}}" + braced(match[2]), text)
    if text == "0.5":
        return r"\frac{1}{2}"
    quotient = QUOTIENT.fullmatch(text)
    return text if quotient is None else rf"\frac{{{quotient[1]}}}{{{quotient[2]}}}"


def braced(text: str) -> str:
    """A denominator of one character in braces; the brace that opens a longer one as it is."""
    return text if text == "{" else f"{{{text}}}"


def math(text: str, gold: str) -> float:
    """Whether the last box, or else the first tag, or else a text without a box is written like ``gold``."""
    answer = last_box(text) or first_tag(text)
    if answer is None and r"\boxed" not in text:
        answer = text
    return float(answer is not None and normal(answer) == normal(gold))


# ---- Countdown ----

SIGNS = {r"\div": "/", r"\times": "*", r"\cdot": "*"}
RUN = re.compile(r"([0-9+\-*/() ]+)(=[0-9. ])?")
EXPRESSION = re.compile(r"[\d+\-*/().\s]+")
LONGEST = 1000
BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


def countdown(text: str, numbers: Sequence[int], target: int) -> float:
    """Whether the last box, or else the first tag, or else the text uses exactly ``numbers`` and is near ``target``."""
    answer = last_box(text)
    if answer is None:
        answer = first_tag(text)
    answer = text if answer is None else answer
    for latex, sign in SIGNS.items():
        answer = answer.replace(latex, sign)
    answer = next((run[1] for run in RUN.finditer(answer) if run[2]), answer).strip()
    if len(answer) > LONGEST or not EXPRESSION.fullmatch(answer):
        return 0.0
    try:
        used = sorted(map(int, re.findall(r"\d+", answer)))
        result = calculated(ast.parse(answer, mode="eval").body)
        return float(used == sorted(numbers) and abs(result - target) < 1e-5)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return 0.0


def calculated(tree: ast.expr) -> float:
    """The value of Python's arithmetic, in floating point."""
    match tree:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -calculated(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return calculated(operand)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in BINARY:
            return BINARY[type(sign)](calculated(left), calculated(right))
    raise ValueError("no arithmetic")


# ---- Sudoku ----

FENCED = re.compile(r"```([\d\s]+)```")
GRID_ENDS = re.compile(r"<\|eot_id\|>|<\|endoftext\|>|</answer>")


def grids(text: str) -> Iterator[str]:
    """What may be the grid, in the order in which it is looked for; empty where there is nothing."""
    _, _, inside = text.partition(OPEN)
    fenced = FENCED.search(inside.partition(CLOSE)[0])
    yield fenced[1] if fenced else ""
    end = GRID_ENDS.search(inside)
    yield inside[: end.start()] if end else ""
    yield GRID_ENDS.split(text.partition(CLOSE)[2], maxsplit=1)[0]
    for pattern in (r"(\d{16})\s*</answer>", r"\b(\d{16})\b"):
        found = re.search(pattern, text)
        yield found[1] if found else ""


def sudoku4x4(text: str, puzzle: str, solution: str) -> float:
    """The share of the empty cells that the first sixteen characters of the first grid have right."""
    grid = next(filter(None, ("".join(one.split()) for one in grids(text))), "").ljust(16, "0")
    blanks = [given == right for cell, given, right in zip(puzzle, grid, solution, strict=False) if cell == "0"]
    return sum(blanks) / len(blanks) if blanks else 1.0
