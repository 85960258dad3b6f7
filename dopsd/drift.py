"""How far the reuse of activations moves the student from what it computes exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dopsd.objective import Objective
from dopsd.ranks import spread
from dopsd.seeds import mix_seeds
from dopsd.step_batch import Example, collate
from dopsd.teacher import TeacherWeights


def mean_drifts(
    objective: Objective,
    model: Any,
    teacher: TeacherWeights,
    examples: Sequence[Example],
    *,
    samples: int,
    seed: int,
    size: int,
    **options: Any,
) -> Tensor:
    """Each example's mean of :meth:`Objective.drift` over some of its states.

    Args:
        objective: whose ``reuse`` is measured.
        model, teacher: as in :meth:`Objective.forward`.
        examples: at least one.
        samples: states of each example, at most; they are drawn from ``seed`` and the example's number.
        seed: of the draw.
        size: states in a batch, at most.
        options: of :func:`~dopsd.step_batch.collate`.

    Returns:
        (len(examples),) fp32, on the CPU.
    """
    index = []
    for number, example in enumerate(examples):
        generator = torch.Generator().manual_seed(int(mix_seeds(seed, number)))
        chosen = torch.randperm(len(example.steps), generator=generator)[:samples]
        index += [(number, step) for step in chosen.tolist()]

    def drift(part: list[tuple[int, int]]) -> Tensor:
        exact, reused = (collate(examples, part, reuse=reuse, **options) for reuse in ("none", objective.reuse))
        return objective.drift(model, teacher, exact, reused, options["mask_id"]).float().cpu()

    drifts = spread((index[start : start + size] for start in range(0, len(index), size)), drift)
    example_of = torch.tensor([number for number, _ in index])
    return torch.zeros(len(examples)).index_add_(0, example_of, torch.cat(drifts)) / example_of.bincount()
