r"""How an answer in LaTeX is written: whether it is a final answer, and not what is still to be computed.

Whether two expressions are equal says nothing of that: a sum equals its terms. So an answer may use no operation more
often than the reference answer does, its fractions are in lowest terms and its roots without square factors, a
polynomial has as many factors as the reference answer's, and tuples, sets and intervals are what that one is. A
fraction of whole numbers counts as a number. All functions take a few hundred characters at most.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from math import gcd

# ---- one spelling ----

SPELLINGS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\(?:left|right|displaystyle|textstyle|limits|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (r"\{,\}", ","),
        (r"(\\\\)|\\!", lambda match: match[1] or ""),
        (r"(\\\\)|\\[,;:> ]|\\q?quad(?![A-Za-z])|~|\u202f|\u00a0", lambda match: match[1] or " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:leq?|leqslant)(?![A-Za-z])|\u2264", r"\\le "),
        (r"\\(?:geq?|geqslant)(?![A-Za-z])|\u2265", r"\\ge "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:lbrace|rbrace)(?![A-Za-z])", lambda match: r"\{" if match[0][1] == "l" else r"\}"),
        ("\N{MINUS SIGN}", "-"),
        (r"\^ *(?:\\circ|\{ *\\circ *\})|\u00b0|\\degree(?![A-Za-z])", ""),
        (r"\\?[%$]", ""),
        (r"\\(?:mathrm|textbf|textrm|mathbf|mbox|textit)(?= *\{)", r"\\text"),
        (r"\\frac *([0-9])", r"\\frac{\1}"),
        (r"(\\frac *\{[^{}]*\}) *([0-9])", r"\1{\2}"),
        (r"(\\frac *\{[^{}]*\}) *\{", r"\1{"),
        (r"\\sqrt *([0-9a-z])", r"\\sqrt{\1}"),
        (r"\^ *\{([0-9a-z])\}", r"^\1"),
        (r"_ *\{([0-9a-zA-Z]+)\}", r"_\1"),
        (r"(?<=[0-9]) +(?=[0-9]{3}(?![0-9]))", ""),
        (r" +", " "),
    )
]
# ``x =``, ``f(x) =``, ``\angle A =`` and ``x \in`` before an answer say what it is the value of.
NAME = re.compile(
    r"((?:\\(?:angle|theta|alpha|beta|[a-z]*gamma|lambda|text *\{[^{}]*\}) *)?[A-Za-z]{0,3}'*(?:_[0-9A-Za-z])?"
    r"(?:\([a-z](?:, ?[a-z])*\))?) *(?:=|\\in(?![A-Za-z]))(?!.*[=<>])"
)
TEXT = re.compile(r"\\text *\{([^{}]*)\}")
THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
ONE_IN_PARENTHESES = re.compile(r"\(([^()\[\],]*)\)")
DECIMAL = re.compile(r"(?<![0-9.])([0-9]*\.[0-9]+|[0-9]+\.(?![0-9]))")
BOUND = r"(-?[0-9.]+|-?\\[a-z]+(?:\{[^<>]*\})?(?:\{[^<>]*\})?)"
LESS, MORE = r"(<|\\le )", r"(>|\\ge )"
INEQUALITIES = [
    (re.compile(rf"{BOUND} *{LESS} *([a-z]) *{LESS} *{BOUND}"), (1, 2, 3, 4, 5)),
    (re.compile(rf"{BOUND} *{MORE} *([a-z]) *{MORE} *{BOUND}"), (5, 4, 3, 2, 1)),
    (re.compile(rf"([a-z]) *{LESS} *{BOUND}"), (None, None, 1, 2, 3)),
    (re.compile(rf"([a-z]) *{MORE} *{BOUND}"), (3, 2, 1, None, None)),
    (re.compile(rf"{BOUND} *{MORE} *([a-z])"), (None, None, 3, 2, 1)),
    (re.compile(rf"{BOUND} *{LESS} *([a-z])"), (1, 2, 3, None, None)),
]


def spelled(answer: str) -> str:
    """``answer`` in one of the spellings that LaTeX has for it, without units."""
    for pattern, new in SPELLINGS:
        answer = pattern.sub(new, answer)
    answer = re.sub(r"\\text *\{ *(?:or|and) *\}", ",", answer).strip()
    without = TEXT.sub("", answer)
    without = re.sub(r"\^[23] *$", "", without) if without != answer and answer.endswith(("}^2", "}^3")) else without
    answer = without.strip(" .,;:") or TEXT.sub(r"\1", answer).strip(" .,;:")
    if within := ONE_IN_PARENTHESES.fullmatch(answer):
        answer = within[1].strip()
    return answer.replace(",", "") if THOUSANDS.fullmatch(answer) else answer


def named(answer: str) -> tuple[str, str]:
    """What ``answer`` says it is the value of, or nothing, and the value; an inequality's is its interval."""
    for pattern, places in INEQUALITIES:
        if found := pattern.fullmatch(answer):
            low, above, name, below, high = ("" if place is None else found[place] for place in places)
            opening, closing = "[" if "e" in above else "(", "]" if "e" in below else ")"
            return name, opening + (low or r"-\infty") + "," + (high or r"\infty") + closing
    values = [value.strip() for value in parts(answer)]
    names = [match for value in values if (match := NAME.match(value))]
    if len(names) < len(values) or len({match[1] for match in names}) > 1 or not names[0][1]:
        return "", answer
    return names[0][1], ",".join(value[match.end() :].strip() for value, match in zip(values, names, strict=True))


def parts(answer: str) -> list[str]:
    """``answer`` at the commas that no brackets are around."""
    depth, start, found = 0, 0, []
    for match in re.finditer(r"[({\[]|[)}\]]|,", answer):
        if match[0] == ",":
            if depth == 0:
                found.append(answer[start : match.start()])
                start = match.end()
        else:
            depth += 1 if match[0] in "({[" else -1
    return [*found, answer[start:]]


def exact(answer: str) -> str:
    """``answer`` with fractions for decimals, which would be compared to a few digits only."""

    def fraction(match: re.Match[str]) -> str:
        number = Fraction(match[1].rstrip("."))
        return str(number) if number.denominator == 1 else rf"\frac{{{number.numerator}}}{{{number.denominator}}}"

    return DECIMAL.sub(fraction, answer)


# ---- what it is written with ----

QUOTIENT = re.compile(
    r"(?:([0-9]+) ?)?\\frac *\{ *(-?[0-9]+) *\} *\{ *(-?[0-9]+) *\}"
    r"|(?<![0-9.}^_])([0-9]+) */ *([0-9]+)(?![0-9.])"
)
# Another quotient of numbers, of which some are quotients.
NUMBERS_ONLY = re.compile(r"\\frac *\{[-0-9.# ]*\} *\{[-0-9.# ]*\}")
# The denominator of a fraction with braces in braces at most, or what follows a slash.
BELOW = re.compile(
    r"(?:\\frac *\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\} *|/ *)(\{(?:[^{}]|\{[^{}]*\})*\}|\\sqrt)",
)
ROOT = re.compile(r"\\sqrt *(?:\[ *([0-9]+) *\])? *\{ *([0-9]+) *\}")
ROOT_OF_FRACTION = re.compile(r"\\sqrt *(?:\[[^\]]*\])? *\{[^{}]*(?:\\frac|/)")
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[0-9]*\.?[0-9]+|[A-Za-z]|\S")
# A sign of what follows it, which adds nothing to what stands before.
SIGNED = re.compile(r"(?:^|[({\[,=^_&<>*/]|\\\\|\\(?:cdot|times|div|in|cup|cap|le|ge) ?)\s*[-+]")
PRODUCTS = {r"\cdot": "*", r"\times": "*", r"\ast": "*", "*": "*", r"\div": r"\frac", "/": r"\frac"}
# What stands for a value or holds values, and computes none.
NEUTRAL = {*"{},&)]", r"\\", r"\{", r"\}", r"\begin", r"\end", r"\infty", r"\pi", "#"}
LARGEST_ROOT = 10**9


def unreduced(match: re.Match[str]) -> bool:
    """Whether a mixed number or a quotient is not in lowest terms."""
    whole, above, below = match[1], int(match[2] or match[4]), int(match[3] or match[5])
    return gcd(above, below) != 1 or below < 2 or (whole is not None and not 0 < above < below)


def has_square(match: re.Match[str]) -> bool:
    """Whether a whole number under a root is divisible by a power that could stand before it."""
    power, number = int(match[1] or 2), int(match[2])
    if number < 2 or number > LARGEST_ROOT or not 2 <= power <= 30:
        return True
    return any(number % base**power == 0 for base in range(2, int(number ** (1 / power)) + 2))


def operations(answer: str, *, numbers: bool = True) -> Counter[str]:
    """How often each operation stands in ``answer``; a fraction is one, or, of ``numbers`` in lowest terms, ``#``."""
    count: Counter[str] = Counter()

    def quotient(match: re.Match[str]) -> str:
        count["not in lowest terms"] += unreduced(match)
        return " # " if numbers and not unreduced(match) else match[0]

    count["a root with a square"] += sum(map(has_square, ROOT.finditer(answer)))
    count["a root below"] += len(ROOT_OF_FRACTION.findall(answer))
    for below in BELOW.finditer(answer):
        count["a root below"] += below[1].count(r"\sqrt")
        count["a sum below"] += len(re.findall(r"(?<=[^{])[-+]", below[1]))
    answer = QUOTIENT.sub(quotient, answer)
    if numbers:
        count["not in lowest terms"] += len(NUMBERS_ONLY.findall(answer))
    answer = SIGNED.sub(lambda match: match[0][:-1], answer)
    behind_number = False
    for token in TOKEN.findall(answer):
        is_number = token == "#" or any(map(str.isdigit, token))
        if is_number:
            count["number"] += 1
            count["*"] += behind_number
        elif token in "([":
            count["("] += 1
        elif token in "+-":
            count["+"] += 1
        elif token not in NEUTRAL and not (len(token) == 1 and token.isalpha()):
            count[PRODUCTS.get(token, token)] += 1
        behind_number = is_number
    return count


def letters(answer: str) -> set[str]:
    """The variables of ``answer``."""
    return set(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+ *(?:\{[a-z]*matrix\})?", " ", answer)))


def kind(answer: str) -> str:
    """The brackets around several values, ``set`` for those in any order, or nothing around a single one."""
    inner = answer.replace(r"\{", "{").replace(r"\}", "}")
    if len(parts(inner)) > 1:
        return "set"
    if answer.startswith(r"\{") and answer.endswith(r"\}"):
        return "set"
    if inner[:1] in "([" and inner[-1:] in ")]" and len(parts(inner[1:-1])) > 1:
        return inner[0] + inner[-1]
    return ""


def both_signs(answer: str) -> str:
    r"""``a \pm b`` as its two values."""
    return answer.replace(r"\pm", "+") + "," + answer.replace(r"\pm", "-") if r"\pm" in answer else answer


def based(answer: str) -> bool:
    """Whether it is a number to a base."""
    return re.search(r"[0-9] *_", answer) is not None


def is_final(answer: str, gold: str) -> bool:
    """Whether ``answer``, spelled as ``gold`` is, is as far computed as that one is."""
    answer, gold = both_signs(answer), both_signs(gold)
    if based(answer) or based(gold) or kind(answer) != kind(gold):
        return False
    ours, theirs = letters(answer), letters(gold)
    if not ours <= theirs | {"i", "e"}:
        return False
    used, allowed, at_least = operations(answer), operations(gold, numbers=False), operations(gold)
    if theirs - {"i", "e"} and used["("] != at_least["("]:
        return False
    return used["="] == allowed["="] and all(
        count <= max(allowed[name], at_least[name]) for name, count in used.items()
    )
