"""How far the reuse of activations moves the student from what it computes exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dopsd.objective import Objective
from dopsd.seeds import mix_seeds
from dopsd.step_batch import Lesson, collate
from dopsd.teacher import TeacherWeights


def mean_drifts(
    objective: Objective,
    model: Any,
    teacher: TeacherWeights,
    lessons: Sequence[Lesson],
    *,
    samples: int,
    seed: int,
    size: int,
    **options: Any,
) -> Tensor:
    """Each lesson's mean of :meth:`Objective.drift` over some of its states.

    Args:
        objective: whose ``reuse`` is measured.
        model, teacher: as in :meth:`Objective.forward`.
        lessons: at least one.
        samples: states of each lesson, at most; they are drawn from ``seed`` and the lesson's number.
        seed: of the draw.
        size: states in a batch, at most.
        options: of :func:`~dopsd.step_batch.collate`.

    Returns:
        (len(lessons),) fp32, on the CPU.
    """
    index = []
    for number, lesson in enumerate(lessons):
        generator = torch.Generator().manual_seed(int(mix_seeds(seed, number)))
        chosen = torch.randperm(len(lesson.steps), generator=generator)[:samples]
        index += [(number, step) for step in chosen.tolist()]
    drifts = []
    for start in range(0, len(index), size):
        part = index[start : start + size]
        exact, reused = (collate(lessons, part, reuse=reuse, **options) for reuse in ("none", objective.reuse))
        drifts.append(objective.drift(model, teacher, exact, reused, options["mask_id"]).float().cpu())
    lesson_of = torch.tensor([number for number, _ in index])
    return torch.zeros(len(lessons)).index_add_(0, lesson_of, torch.cat(drifts)) / lesson_of.bincount()
