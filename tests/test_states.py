"""Errors of means over a few of a trajectory's states, against every draw that there is."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from statistics import mean

import pytest
import torch

from benchmarks import reproduce, reproduction, states
from dopsd.files import write_json

VALUES = torch.tensor([0.0, 0.5, 3.0, 0.25, 1.0], dtype=torch.float64)
DOUBT = torch.tensor([0.1, 0.4, 0.2, 0.9, 0.4], dtype=torch.float64)


def test_a_uniform_draw() -> None:
    draws = [VALUES[list(chosen)].mean() for chosen in combinations(range(5), 2)]
    exact = float(torch.stack(draws).var(correction=0))
    assert states.uniform_variance(VALUES, 2) == pytest.approx(exact, rel=1e-12)


def test_a_weighted_draw() -> None:
    share = (DOUBT / DOUBT.sum()).tolist()
    truth, variance = float(VALUES.mean()), 0.0
    for a, b in product(range(5), repeat=2):
        estimate = mean(float(VALUES[i]) / share[i] / 5 for i in (a, b))
        variance += share[a] * share[b] * (estimate - truth) ** 2
    assert states.weighted_variance(VALUES, DOUBT, 2) == pytest.approx(variance, rel=1e-12)


def test_the_page_says_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubt in proportion to the divergence: as good as can be."""
    divergences = [torch.linspace(0.1, 2.0, 20, dtype=torch.float64) * scale for scale in (1, 2)]
    found = states.summarise(divergences, [1 - one / 4 for one in divergences])
    assert found["rank_correlation"] == found["correlation"] == 1 and found["states"] == 40
    assert all(error["by doubt"] < error["uniform"] / 2 for error in found["errors"].values())
    monkeypatch.setattr(reproduce, "FOLDER", tmp_path)
    assert reproduction.fewer_states() == "Not run."
    write_json(tmp_path / "states.json", found)
    assert "| 19 | 3.0000 | 0.25 |" in reproduction.fewer_states()
