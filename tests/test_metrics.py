"""Metrics of several processes and updates, against those of one process by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dopsd.metrics import Figures, combined, means, of_groups
from dopsd.rollout import Rollout
from dopsd.trajectory import Trajectory


def test_several_processes_log_what_one_would() -> None:
    """Two updates on two processes, one of which trains on nothing in the first: of 3 prompts and 1 first 2 and 0, then
    0 and 1 pass. What a prompt or a row of K adds to a mean does not depend on where it is."""
    first = [
        Figures(0, 3, {"pass_rate": 2 / 3, "rollout_seconds": 5.0}),
        Figures(0, 4, {"kl": 1.0}),
        Figures(0, 1, {"states": 10, "tokens": 100, "learn_seconds": 1.0, "peak_gib": 3.0}),
        Figures(1, 3, {"pass_rate": 0.0, "rollout_seconds": 2.0}),
        Figures(1, 2, {"kl": 4.0}),
        Figures(1, 1, {"states": 6, "tokens": 50, "learn_seconds": 1.0, "peak_gib": 2.0}),
    ]
    second = [
        Figures(0, 1, {"pass_rate": 0.0, "rollout_seconds": 7.0}),
        Figures(0, 0, {"kl": math.nan}),
        Figures(1, 1, {"pass_rate": 1.0, "rollout_seconds": 1.0}),
        Figures(1, 10, {"kl": 7.0}),
        Figures(1, 1, {"states": 2, "tokens": 20, "learn_seconds": 3.0, "peak_gib": 1.0}),
    ]
    expected = {
        "kl": (4 * 1 + 2 * 4 + 10 * 7) / 16,
        "learn_seconds": (1 + 3) / 2,
        "pass_rate": 3 / 8,
        "peak_gib": 3.0,
        "rollout_seconds": (7 + 2) / 2,
        "states": (10 + 8) / 2,
        "tokens": (100 + 70) / 2,
    }
    found = combined([*first, *second])
    assert list(found) == list(expected) and found == pytest.approx(expected)


def test_figures_of_groups() -> None:
    """Two prompts with three tries each: two right, the first at the second try; none right, and all alike."""
    trajectory = Trajectory(torch.arange(2), torch.tensor([5, 5, 0, 5]), torch.arange(4), 4)
    scores = [[0.0, 1.0, 1.0], [0.25, 0.25, 0.25]]
    groups = [[Rollout({}, trajectory, "", score, tries=1) for score in group] for group in scores]
    found = of_groups(groups, eos_id=0)
    assert found == pytest.approx(
        {
            "pass_rate": 1 / 2,
            "first_try": 2 / 6,
            "tries": (2 + 3) / 2,
            "completion_length": 2,
            "reward": 2.75 / 6,
            "reward_std": (math.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 2) + 0) / 2,
        }
    )


def test_a_mean_of_nothing_is_nan() -> None:
    """Where no process has a row of K; without any figures there are no metrics."""
    assert math.isnan(combined([Figures(0, 0, {"kl": math.nan})])["kl"])
    assert combined([]) == {}


def test_figures_weigh_every_row_alike() -> None:
    """They are means over rows, not over batches; with no row they are nan."""
    batches = [{"kl": torch.tensor(values)} for values in ([1.0, 2.0, 3.0], [6.0], [])]
    assert means(batches) == {"kl": (4, 3.0)}
    assert means(batches[2:])["kl"][0] == 0 and math.isnan(means(batches[2:])["kl"][1])
