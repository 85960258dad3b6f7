"""Step concatenation: denoising states of many steps and trajectories as one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dopsd.sampler import left_pad
from dopsd.trajectory import Trajectory


@dataclass(frozen=True)
class Lesson:
    """The states of one trajectory that are trained on, and what the teacher sees at each.

    Args:
        trajectory: the student's response.
        steps: (S,) int64, the steps to train on.
        reveal: (S, L) bool, positions whose final tokens the teacher is shown besides the state.
        teacher_prompt_ids: (P',) int64, the teacher's prompt; the student's is the trajectory's.
    """

    trajectory: Trajectory
    steps: Tensor
    reveal: Tensor
    teacher_prompt_ids: Tensor

    def slice(self, number: int, count: int) -> Lesson:
        """Part ``number`` of ``count`` nearly equal runs of its steps."""
        bounds = [part * len(self.steps) // count for part in (number, number + 1)]
        chosen = slice(*bounds)
        return replace(self, steps=self.steps[chosen], reveal=self.reveal[chosen])

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "trajectory": self.trajectory.to_json(),
            "steps": self.steps.tolist(),
            "reveal": [row.nonzero().flatten().tolist() for row in self.reveal],
            "teacher_prompt_ids": self.teacher_prompt_ids.tolist(),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Lesson:
        """The inverse of :meth:`to_json`."""
        trajectory = Trajectory.from_json(fields["trajectory"])
        reveal = torch.zeros(len(fields["steps"]), len(trajectory.tokens), dtype=torch.bool)
        for row, positions in zip(reveal, fields["reveal"], strict=True):
            row[positions] = True
        steps = torch.tensor(fields["steps"], dtype=torch.int64)
        return cls(trajectory, steps, reveal, torch.tensor(fields["teacher_prompt_ids"], dtype=torch.int64))


@dataclass(frozen=True)
class Inputs:
    """One side's model inputs: ``input_ids`` (S, P + L), ``attention_mask`` (same, or None) and ``offset`` = P."""

    input_ids: Tensor
    attention_mask: Tensor | None
    offset: int


@dataclass(frozen=True)
class StepBatch:
    """S states, ready for both sides; a row is one state of one trajectory.

    Args:
        student, teacher: the model inputs.
        columns: (S, B) int64, the response positions of each state's current block.
        candidates: (S, B) bool, those masked for student and teacher alike: K is chosen among them.
        committed: (S, B) bool, those the student's step revealed.
        k: (S,) int64, how many it revealed.
        candidate_index: (C,) int64, the candidates' places in the flattened (S, B).
        rows_by_confidence: (S,) int64 on the CPU, how many candidates K has if the k surest are chosen.
        rows_by_commit: (S,) int64 on the CPU, how many it has if it is what the student's step revealed.
        lesson: (S,) int64, index of each state's lesson.
        weight: (S,) fp32, 1 / number of states of that lesson (the 1/T of Eq. 12).
    """

    student: Inputs
    teacher: Inputs
    columns: Tensor
    candidates: Tensor
    committed: Tensor
    k: Tensor
    candidate_index: Tensor
    rows_by_confidence: Tensor
    rows_by_commit: Tensor
    lesson: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.k)


def step_batches(
    lessons: Sequence[Lesson], size: int, *, mask_id: int, pad_id: int, device: torch.device
) -> Iterator[StepBatch]:
    """Every state of every lesson, in batches of at most ``size`` states, which may mix lessons."""
    index = [(number, step) for number, lesson in enumerate(lessons) for step in range(len(lesson.steps))]
    for start in range(0, len(index), size):
        yield collate(lessons, index[start : start + size], mask_id=mask_id, pad_id=pad_id, device=device)


def collate(
    lessons: Sequence[Lesson], index: Sequence[tuple[int, int]], *, mask_id: int, pad_id: int, device: torch.device
) -> StepBatch:
    """The states (lesson number, position in its steps) of ``index`` as one batch on ``device``."""
    wanted: dict[int, list[int]] = {}
    for number, step in index:
        wanted.setdefault(number, []).append(step)
    student_prompts, teacher_prompts, parts = [], [], []
    for number, chosen in wanted.items():
        lesson, trajectory = lessons[number], lessons[number].trajectory
        steps = lesson.steps[chosen]
        state = trajectory.states(steps, mask_id)
        shown = torch.where(lesson.reveal[chosen], trajectory.tokens, state)
        columns = trajectory.block_starts(steps)[:, None] + torch.arange(trajectory.block_length)
        commits = trajectory.commits(steps)
        masked = (trajectory.reveal_step >= steps[:, None]) & ~lesson.reveal[chosen]
        parts.append(
            (
                state,
                shown,
                columns,
                masked.gather(1, columns),
                commits.gather(1, columns),
                commits.sum(-1),
                torch.full((len(chosen),), number),
                torch.full((len(chosen),), 1 / len(lesson.steps)),
            )
        )
        student_prompts += [trajectory.prompt_ids] * len(chosen)
        teacher_prompts += [lesson.teacher_prompt_ids] * len(chosen)
    state, shown, columns, candidates, committed, k, number_of_lesson, weight = (
        torch.cat(part) for part in zip(*parts, strict=True)
    )
    return StepBatch(
        student=with_prompts(student_prompts, state.to(device), pad_id),
        teacher=with_prompts(teacher_prompts, shown.to(device), pad_id),
        columns=columns.to(device),
        candidates=candidates.to(device),
        committed=committed.to(device),
        k=k.to(device),
        # Sizes that the host needs are counted before anything is on a GPU, which it would have to wait for.
        candidate_index=candidates.flatten().nonzero()[:, 0].to(device),
        rows_by_confidence=torch.minimum(k, candidates.sum(-1)),
        rows_by_commit=(committed & candidates).sum(-1),
        lesson=number_of_lesson.to(device),
        weight=weight.to(device),
    )


def with_prompts(prompts: Sequence[Tensor], responses: Tensor, pad_id: int) -> Inputs:
    """Left-padded ``prompts`` in front of ``responses`` (S, L)."""
    prompt_ids, prompt_mask = left_pad([prompt.to(responses.device) for prompt in prompts], pad_id)
    mask = None
    if prompt_mask is not None:
        mask = torch.cat((prompt_mask, torch.ones_like(responses, dtype=torch.bool)), dim=1)
    return Inputs(torch.cat((prompt_ids, responses), dim=1), mask, prompt_ids.shape[1])
