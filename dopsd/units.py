"""Amounts of memory, as they are given and as they are shown."""

from __future__ import annotations

import math
import re

from dopsd.errors import must_be

GIB = 1 << 30


def read_bytes(argument: str, text: str, total: int | None) -> int:
    """Bytes from ``24`` or ``24GiB``, or from ``0.8`` or ``80%`` of ``total``; a bare number up to 1 is a share.

    Raises:
        UsageError: it is neither, or more than ``total``; without a ``total`` there are no shares.
    """
    shares = "" if total is None else ", or a share of the device's memory (0.8, 80%)"
    accepted = f"a positive number of GiB (24, 24GiB){shares}"
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(gib|%)?", text.strip().lower())
    must_be(found is not None, argument, text, accepted)
    number, unit = float(found[1]), found[2]  # type: ignore[index]
    must_be(0 < number < math.inf, argument, text, accepted)
    if unit == "%" or (unit is None and number <= 1 and total is not None):
        share = number / 100 if unit == "%" else number
        must_be(total is not None and share <= 1, argument, text, accepted)
        return int(share * (total or 0))
    accepted = f"at most the {(total or 0) / GIB:.1f} GiB that the device has"
    must_be(total is None or number * GIB <= total, argument, text, accepted)
    return int(number * GIB)


def gib(size: float) -> str:
    """Bytes as GiB, with two digits."""
    return f"{size / GIB:.2f}"
