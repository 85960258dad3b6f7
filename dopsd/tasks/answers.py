r"""Where a response's answer is: ``<answer>`` tags and ``\boxed{}``. Every function here is linear in its text."""

from __future__ import annotations

import re

OPEN, CLOSE = "<answer>", "</answer>"
BARE_BOX = re.compile(r"\\f?box(?:ed)? +([^$\n]{1,200})")


def in_tags(answer: str) -> str:
    """``answer`` in the tags that prompts ask for."""
    return f"{OPEN}{answer}{CLOSE}"


def tagged(text: str, *, closed: bool = True) -> str | None:
    """What the last ``<answer>`` tag holds. Unless it has to be ``closed``, a last one may go on to the end."""
    end = text.rfind(CLOSE)
    start = text.rfind(OPEN)
    if not closed and start > end:
        return text[start + len(OPEN) :].strip()
    start = text.rfind(OPEN, 0, max(end, 0))
    return text[start + len(OPEN) :].partition(CLOSE)[0].strip() if start >= 0 else None


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed{}`` or ``\fbox{}`` with balanced braces holds, or else follows a ``\boxed`` without."""
    found = None
    starts: list[int | None] = []  # one per open brace: where its contents start if it is a box's
    for match in re.finditer(r"\\(?:boxed|fbox) *\{|\\[{}\\]|[{}]", text):
        brace = match.group()
        if brace == "}":
            start = starts.pop() if starts else None
            if start is not None and (found is None or start > found[0]):
                found = start, match.start()
        elif brace == "{":
            starts.append(None)
        elif len(brace) > 2:
            starts.append(match.end())
    if found is not None:
        return text[slice(*found)].strip()
    bare = BARE_BOX.findall(text)
    return bare[-1].strip() if bare else None


def marked(text: str, *, closed: bool = True) -> str | None:
    r"""What is marked as the answer: the last tag's text (or a ``\boxed{}`` in it), or else the last ``\boxed{}``."""
    answer = tagged(text, closed=closed)
    if answer is None:
        return boxed(text)
    inner = boxed(answer)
    return answer if inner is None else inner
