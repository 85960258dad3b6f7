r"""Where a response's answer is: ``<answer>`` tags and ``\boxed{}``. Every function here is linear in its text."""

from __future__ import annotations

import re
import unicodedata

OPEN, CLOSE = "<answer>", "</answer>"
BARE_BOX = re.compile(r"\\f?box(?:ed)? +([^$\n]{1,200})")
# Tokens that end a turn or a text in the models' families.
ENDS = (
    "<|endoftext|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endofturn|>",
    "</s>",
)
END = re.compile("|".join(map(re.escape, ENDS)))
# Characters of a response that are read: what 32768 tokens of four characters make.
MOST = 1 << 17
# What an answer is wrapped in, and ends with, without being a part of it.
WRAPPERS = (("**", "**"), ("`", "`"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("*", "*"))
PUNCTUATION = ".,;: \t\n"


def ended(response: str) -> str:
    """What is graded of a response: all before the first token that ends its turn, at most ``MOST`` characters."""
    return END.split(response[:MOST], maxsplit=1)[0]


def in_tags(answer: str) -> str:
    """``answer`` in the tags that prompts ask for."""
    return f"{OPEN}{answer}{CLOSE}"


def bare(answer: str) -> str:
    """``answer`` without what only marks it up: signs around it, punctuation behind it, characters not to be seen."""
    answer = "".join(sign for sign in answer if unicodedata.category(sign) != "Cf").strip()
    while True:
        shorter = answer.rstrip(PUNCTUATION)
        for left, right in WRAPPERS:
            inner = shorter.removeprefix(left).removesuffix(right)
            if len(inner) == len(shorter) - len(left) - len(right) and left not in inner and right not in inner:
                shorter = inner.strip()
        if shorter == answer:
            return answer
        answer = shorter


def tagged(text: str, *, closed: bool = True) -> str | None:
    """What the last ``<answer>`` tag with something in it holds. Unless it has to be ``closed``, one may be cut off."""
    end = text.rfind(CLOSE)
    start = text.rfind(OPEN)
    if not closed and start > end and (inner := text[start + len(OPEN) :].strip()):
        return inner
    while end >= 0 and (start := text.rfind(OPEN, 0, end)) >= 0:
        inner = text[start + len(OPEN) : text.find(CLOSE, start)].strip()
        if inner:
            return inner
        end = text.rfind(CLOSE, 0, start)
    return None


def boxed(text: str, *, closed: bool = True) -> str | None:
    r"""What the last ``\boxed{}`` or ``\fbox{}`` that is not empty holds, or else follows a ``\boxed`` without braces.

    Its braces are balanced. Unless it has to be ``closed``, a last one may be cut off by the end of the text.
    """
    found = None
    starts: list[int | None] = []  # one per open brace: where its contents start if it is a box's
    for match in re.finditer(r"\\(?:boxed|fbox) *\{|\\[{}\\]|[{}]", text):
        brace = match.group()
        if brace == "}":
            start = starts.pop() if starts else None
            if start is not None and (found is None or start > found[0]) and text[start : match.start()].strip():
                found = start, match.start()
        elif brace == "{":
            starts.append(None)
        elif len(brace) > 2:
            starts.append(match.end())
    opened = [start for start in starts if start is not None]
    if not closed and opened and (found is None or opened[-1] > found[0]) and text[opened[-1] :].strip():
        found = opened[-1], len(text)
    if found is not None:
        return text[slice(*found)].strip()
    without = BARE_BOX.findall(text)
    return without[-1].strip() if without else None


def marked(text: str, *, closed: bool = True) -> str | None:
    r"""What is marked as the answer: the last tag's text, or a ``\boxed{}`` in it, or else the last ``\boxed{}``."""
    answer = tagged(text, closed=closed)
    box = boxed(text if answer is None else answer, closed=closed)
    answer = answer if box is None else box
    return None if answer is None else bare(answer)
