"""Accuracies against published intervals, definitions and enumeration."""

from __future__ import annotations

import math
import statistics
from itertools import product

import pytest

from dopsd.evaluation.accuracy import Z, difference, mcnemar, mean, standard_error, summary, wilson


def test_mean_and_standard_error() -> None:
    """Sample standard deviation over the root of the count; 0 where there is no spread to estimate."""
    scores = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert mean(scores) == 0.6 and math.isnan(mean([]))
    assert standard_error(scores) == pytest.approx(statistics.stdev(scores) / math.sqrt(5), rel=1e-14)
    assert standard_error([1.0]) == standard_error([]) == 0.0


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(correct: int, count: int, low: float, high: float) -> None:
    """The examples of Newcombe (1998), method 3, to the four digits printed there; mirrored for the complement."""
    assert wilson(correct, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(count - correct, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_bounds_are_where_the_score_test_turns() -> None:
    """By definition: at a bound p the observed share is 1.96 of p's own standard errors away."""
    for count in (1, 7, 500):
        for correct in range(0, count + 1, max(1, count // 7)):
            for bound in wilson(correct, count):
                away = (correct / count - bound) ** 2
                assert away == pytest.approx(Z**2 * bound * (1 - bound) / count, rel=1e-9, abs=1e-15)


def test_a_summary_says_which_interval_it_has() -> None:
    """Wilson's for right and wrong; for partial grades the normal one, within [0, 1]; fully correct means 1."""
    binary = summary([1.0, 0.0, 0.0, 1.0])
    assert binary["interval_method"] == "wilson" and binary["interval"] == list(wilson(2, 4))
    assert binary["accuracy"] == binary["fully_correct"] == 0.5
    graded = summary([1.0, 0.75, 0.75, 1.0])
    error = statistics.stdev([1.0, 0.75, 0.75, 1.0]) / 2
    assert graded["interval_method"] == "normal" and (graded["accuracy"], graded["fully_correct"]) == (0.875, 0.5)
    assert graded["interval"] == pytest.approx([0.875 - 1.959963984540054 * error, 1.0])


def test_a_difference_is_paired() -> None:
    """Its error is that of the differences, its interval within [-1, 1]."""
    found = difference([0.0, 1.0, 0.5, 0.0], [1.0, 1.0, 0.25, 0.0])
    gains = [1.0, 0.0, -0.25, 0.0]
    error = statistics.stdev(gains) / 2
    assert found["difference"] == 0.1875 and found["standard_error"] == pytest.approx(error)
    assert found["interval"] == pytest.approx([0.1875 - Z * error, 0.1875 + Z * error])
    assert difference([0.0, 0.0, 1.0], [1.0, 1.0, 1.0])["interval"][1] == 1.0
    with pytest.raises(ValueError):
        difference([1.0], [1.0, 0.0])


def test_mcnemars_p_is_the_share_of_splits_as_unequal() -> None:
    """Every way in which up to ten pairs that differ could have split, each as likely as any other."""
    for count in range(11):
        splits = [abs(sum(signs)) for signs in product((1, -1), repeat=count)]
        for gained in range(count + 1):
            lost = count - gained
            expected = sum(split >= abs(gained - lost) for split in splits) / len(splits)
            assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-12)
    assert 0 < mcnemar(900, 1100) < 1e-4
