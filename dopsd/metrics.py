"""Metrics of updates: what several processes and updates measured, as one process would have logged it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dopsd.evaluation.accuracy import mean
from dopsd.models.bidirectional import DiffusionModel
from dopsd.rollout import Rollout

# An update's work is the sum over its processes, its time that of the slowest; several updates' are the mean of those.
OF_AN_UPDATE: dict[str, Callable[[Iterable[float]], float]] = {
    "states": sum,
    "tokens": sum,
    "forward_tokens": sum,
    "rollouts": sum,
    "decode_tokens": sum,
    "rollout_seconds": max,
    "learn_seconds": max,
}
# Of peaks the highest. Any other metric is a mean, which weighs as much as it is a mean of.
PEAKS = {"peak_gib", "predicted_peak_gib"}


class Figures(NamedTuple):
    """Metrics that one process has of an update.

    Args:
        update: its number.
        over: how many things ``values`` are means of: prompts, examples, rows of K; not read for others.
        values: by name.
    """

    update: int
    over: int
    values: dict[str, float]


def of_rollouts(rollouts: Sequence[Rollout], eos_id: int) -> dict[str, float]:
    """Means over at least one rollout; a response ends where the first ``eos_id`` is."""
    return {
        "pass_rate": mean([float(rollout.score >= 1) for rollout in rollouts]),
        "first_try": mean([float(rollout.score >= 1 and rollout.tries == 1) for rollout in rollouts]),
        "tries": mean([float(rollout.tries) for rollout in rollouts]),
        "completion_length": mean([float(rollout.trajectory.text_length(eos_id)) for rollout in rollouts]),
    }


def of_groups(groups: Sequence[Sequence[Rollout]], eos_id: int) -> dict[str, float]:
    """As :func:`of_rollouts`, of all the tries at each prompt; with their rewards."""
    rewards = [torch.tensor([rollout.score for rollout in group], dtype=torch.float64) for group in groups]
    right = [[rollout.score >= 1 for rollout in group] for group in groups]
    return {
        **of_rollouts(
            [rollout for group in groups for rollout in group], eos_id
        ),  # whose share of right first tries is that of all, for each is one
        "pass_rate": mean([float(any(group)) for group in right]),
        "tries": mean([float(group.index(True) + 1 if any(group) else len(group)) for group in right]),
        "reward": mean([float(reward.mean()) for reward in rewards]),
        "reward_std": mean([float(reward.std()) for reward in rewards]),
    }


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


def means(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, tuple[int, float]]:
    """Of figures of several batches, (R,) each, over how many rows each is in all, and its mean; nan of no row."""
    rows = {name: torch.cat([figures[name] for figures in batches]) for name in batches[0]}
    return {name: (len(values), float(values.mean())) for name, values in rows.items()}


def rows_of(log: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that ``metrics.csv`` has of the Trainer's log: all but transformers' last summary."""
    return [row for row in log if "train_runtime" not in row]


class TokenCount:
    """Counts the tokens that a network computes, padding included."""

    def __init__(self, network: DiffusionModel) -> None:
        self.with_gradient = self.without = 0
        network.on_pass = self.add

    def add(self, tokens: int) -> None:
        """A pass begins."""
        if torch.is_grad_enabled():
            self.with_gradient += tokens
        else:
            self.without += tokens

    def take(self) -> tuple[int, int]:
        """Those with a gradient and those without, since they were last asked for."""
        counts = self.with_gradient, self.without
        self.with_gradient = self.without = 0
        return counts
