"""Accuracies, how certain they are, and how two runs over the same problems differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch

Z = NormalDist().inv_cdf(0.975)  # of a 95% interval


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; nan of nothing."""
    return sum(values) / len(values) if values else math.nan


def is_grade(value: object) -> bool:
    """Whether ``value``, as JSON has it, is a number in [0, 1]."""
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]


def standard_error(scores: Sequence[float]) -> float:
    """Standard error of the mean of ``scores``; 0 for fewer than two."""
    values = torch.tensor(scores, dtype=torch.float64)
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def wilson(correct: int, count: int) -> tuple[float, float]:
    """The 95% score interval of a share of ``correct`` among ``count`` (Wilson 1927)."""
    center = (correct + Z * Z / 2) / (count + Z * Z)
    half = Z / (count + Z * Z) * math.sqrt(correct * (count - correct) / count + Z * Z / 4)
    return max(center - half, 0.0), min(center + half, 1.0)


def normal(scores: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """Mean of ``scores`` ± 1.96 standard errors, between ``low`` and ``high``, which bound each score."""
    center, half = mean(scores), Z * standard_error(scores)
    return max(center - half, low), min(center + half, high)


def summary(scores: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error and 95% interval of grades in [0, 1], and the share of those that are 1.

    The interval is Wilson's where every grade is 0 or 1, else the normal one; ``interval_method`` says which.
    """
    correct = sum(score >= 1 for score in scores)
    binary = all(score in (0, 1) for score in scores)
    return {
        "accuracy": mean(scores),
        "standard_error": standard_error(scores),
        "interval": list(wilson(correct, len(scores)) if binary else normal(scores, 0.0, 1.0)),
        "interval_method": "wilson" if binary else "normal",
        "fully_correct": correct / len(scores),
    }


def difference(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """The mean of the paired differences of two runs' grades, with its standard error and normal 95% interval."""
    gains = [b - a for a, b in zip(before, after, strict=True)]
    return {
        "difference": mean(gains),
        "standard_error": standard_error(gains),
        "interval": list(normal(gains, -1.0, 1.0)),
    }


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p: of so unequal a split, or a more unequal one, of the pairs that differ."""
    count = gained + lost
    tail = sum(math.comb(count, fewer) for fewer in range(min(gained, lost) + 1))
    return min(2 * tail / 2**count, 1.0)
