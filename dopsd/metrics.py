"""Metrics of updates: what several processes and updates measured, as one process would have logged it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from dopsd.evaluation.accuracy import mean

# An update's work is the sum over its processes, its time that of the slowest; several updates' are the mean of those.
OF_AN_UPDATE: dict[str, Callable[[Iterable[float]], float]] = {
    "states": sum,
    "tokens": sum,
    "rollout_seconds": max,
    "distill_seconds": max,
}
# Of peaks the highest. Any other metric is a mean, which weighs as much as it is a mean of.
PEAKS = {"peak_gib", "predicted_peak_gib"}


class Figures(NamedTuple):
    """Metrics that one process has of an update.

    Args:
        update: its number.
        over: how many things ``values`` are means of: prompts, lessons, rows of K; not read for others.
        values: by name.
    """

    update: int
    over: int
    values: dict[str, float]


def combined(parts: Iterable[Figures]) -> dict[str, float]:
    """Each metric of several updates and processes; nan for a mean of nothing."""
    found: dict[str, list[tuple[int, int, float]]] = {}
    for update, over, values in parts:
        for name, value in values.items():
            found.setdefault(name, []).append((update, over, value))
    return {name: one_number(name, found[name]) for name in sorted(found)}


def one_number(name: str, found: Iterable[tuple[int, int, float]]) -> float:
    """A metric's values, each with its update and what it is over, as one."""
    if name in PEAKS:
        return max(value for _, _, value in found)
    if name in OF_AN_UPDATE:
        updates: dict[int, list[float]] = {}
        for update, _, value in found:
            updates.setdefault(update, []).append(value)
        return mean([OF_AN_UPDATE[name](values) for values in updates.values()])
    # What is a mean of nothing is nan, and weighs nothing.
    weighed = [(over, over * value) for _, over, value in found if over]
    return sum(total for _, total in weighed) / sum(over for over, _ in weighed) if weighed else math.nan
