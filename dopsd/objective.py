"""The step-level objective (Eq. 12): from trajectories to a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dopsd.confidence import Confidence, choose_tokens, most_confident
from dopsd.errors import require
from dopsd.rollout import Decoder, Rollout
from dopsd.sampler import mix_seeds
from dopsd.step_batch import Lesson, StepBatch
from dopsd.teacher import RevealScope, TeacherWeights, self_future
from dopsd_kernels import fused_confidence, fused_step_kl

# Entries compared by the overlap metric.
OVERLAP_K = 20


@dataclass(frozen=True)
class StepOutput:
    """The objective on a batch of S states with R rows of K in all; everything but ``loss`` is detached.

    Args:
        loss: scalar, the sum over lessons of Eq. 12; divide by their number for the mean.
        chosen: (S, B) bool, the positions K in each state's block.
        state: (R,) int64, the state of each row.
        kl: (R,) divergence without the clip.
        clip_fraction: (R,) share of vocabulary entries whose contribution was clipped.
        overlap: (R,) share of the student's 20 likeliest entries that are among the teacher's.
    """

    loss: Tensor
    chosen: Tensor
    state: Tensor
    kl: Tensor
    clip_fraction: Tensor
    overlap: Tensor

    def state_kl(self) -> Tensor:
        """(S,) mean divergence over each state's K; 0 where K is empty."""
        total = self.kl.new_zeros(len(self.chosen)).index_add_(0, self.state, self.kl)
        return total / self.chosen.sum(-1).clamp_min(1)


@dataclass(frozen=True)
class Objective:
    """What is taught at each step; field meanings are those of the command-line options of the same names."""

    retain_ratio: float
    reveal_scope: RevealScope
    reveal_tail: bool
    teacher_context: Literal["self_future", "reference"]
    selection: Literal["teacher", "student"]
    confidence: Confidence
    divergence: Literal["reverse_kl", "forward_kl", "jsd"]
    beta: float
    clip: float | None
    clip_form: Literal["plain", "nonnegative"]
    top_k: int | None
    tail: Literal["renormalize", "bucket"]
    normalization: Literal["step_mean", "batchmean"]
    skip_last_block: bool

    def __post_init__(self) -> None:
        require(0 <= self.retain_ratio <= 1, "retain_ratio", self.retain_ratio, "it lies in [0, 1]")
        require(self.clip is None or self.clip >= 0, "clip", self.clip, "it is at least 0, or none")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "it is at least 1, or none")
        require(0 < self.beta < 1, "beta", self.beta, "it lies strictly between 0 and 1")

    def lesson(self, rollout: Rollout, decoder: Decoder, seed: int) -> Lesson:
        """Which steps of a rollout are trained on, and what its teacher sees at each; drawn from ``seed`` alone."""
        trajectory = rollout.trajectory
        steps = torch.arange(trajectory.num_steps)
        if self.skip_last_block:
            last = len(trajectory.tokens) - trajectory.block_length
            steps = steps[trajectory.block_starts(steps) < last]
        if self.teacher_context == "reference":
            nothing = torch.zeros(len(steps), len(trajectory.tokens), dtype=torch.bool)
            prompt_ids = decoder.encode(decoder.task.reference_prompt(rollout.row))
            return Lesson(trajectory, steps, nothing, prompt_ids.cpu())
        reveal = self_future(
            trajectory,
            steps,
            retain_ratio=self.retain_ratio,
            scope=self.reveal_scope,
            tail=self.reveal_tail,
            eos_id=decoder.eos_id,
            generator=torch.Generator().manual_seed(seed),
        )
        return Lesson(trajectory, steps, reveal, trajectory.prompt_ids)

    def forward(self, model: Any, teacher: TeacherWeights, batch: StepBatch, mask_id: int) -> StepOutput:
        """Both sides of a batch of states, and the divergence between them at K.

        Args:
            model: the network shared by both sides, unwrapped; gradients flow to the student's pass only.
            teacher: whose weights the teacher's pass has.
            batch: the states.
            mask_id: the mask token.
        """
        weight = model.lm_head_weight.detach()
        with teacher.active():
            block_hidden = model.hidden_states(
                batch.teacher.input_ids, batch.teacher.attention_mask, batch.columns + batch.teacher.offset
            )
            chosen = self.choose(block_hidden, weight, batch, mask_id)
        rows = batch.rows_by_commit if self.selection == "student" else batch.rows_by_confidence
        # One entry per row of K, in order: nonzero() without waiting to learn how many there are.
        places = chosen.flatten().byte().argsort(descending=True, stable=True)[: int(rows.sum())]
        state, offset = places // chosen.shape[1], places % chosen.shape[1]
        count = chosen.sum(-1)

        # The student is read at K only. States with fewer positions repeat one that then carries no row.
        rank = chosen.long().cumsum(-1)[state, offset] - 1
        read = batch.columns[:, :1].repeat(1, max(1, int(rows.max())))
        read[state, rank] = batch.columns[state, offset]
        student_hidden = model.hidden_states(
            batch.student.input_ids, batch.student.attention_mask, read + batch.student.offset
        )[state, rank]
        teacher_hidden = block_hidden[state, offset].to(student_hidden.dtype)

        row_weight = batch.weight[state]
        if self.normalization == "step_mean":
            row_weight = row_weight / count[state]
        out = fused_step_kl(
            student_hidden,
            teacher_hidden,
            weight,
            row_weight=row_weight,
            divergence=self.divergence,
            beta=self.beta,
            clip=self.clip,
            clip_form=self.clip_form,
            top_k=None if self.top_k is None else min(self.top_k, len(weight)),
            tail=self.tail,
            reduction="sum",
        )
        overlap = top_k_overlap(student_hidden.detach(), teacher_hidden, weight)
        return StepOutput(out.loss, chosen, state, out.row_kl, out.row_clip_fraction, overlap)

    def choose(self, block_hidden: Tensor, weight: Tensor, batch: StepBatch, mask_id: int) -> Tensor:
        """(S, B) bool: K of each state, the k candidates the teacher is surest of, or what the student committed."""
        if self.selection == "student":
            return batch.committed & batch.candidates
        candidates = block_hidden.flatten(0, 1)[batch.candidate_index]
        _, row_confidence = choose_tokens(candidates, weight, self.confidence, mask_id=mask_id)
        confidence = row_confidence.new_full((batch.candidates.numel(),), -torch.inf)
        confidence[batch.candidate_index] = row_confidence
        return most_confident(confidence.view(batch.candidates.shape), batch.candidates, batch.k)


def top_k_overlap(student_hidden: Tensor, teacher_hidden: Tensor, weight: Tensor) -> Tensor:
    """(N,) share of each row's ``OVERLAP_K`` likeliest student entries that are among the teacher's."""
    k = min(OVERLAP_K, len(weight))
    mine = fused_confidence(student_hidden, weight, top_k=k).top_indices
    theirs = fused_confidence(teacher_hidden, weight, top_k=k).top_indices
    return (mine[:, :, None] == theirs[:, None, :]).any(-1).float().mean(-1)


def lessons_of(
    objective: Objective, rollouts: Sequence[Rollout], decoder: Decoder, seeds: Sequence[int]
) -> list[Lesson]:
    """The lessons of ``rollouts``, leaving out those with no step to train on."""
    lessons = [
        objective.lesson(rollout, decoder, int(mix_seeds(seed, 2)))
        for rollout, seed in zip(rollouts, seeds, strict=True)
    ]
    return [lesson for lesson in lessons if len(lesson.steps)]


def mean_metrics(outputs: Sequence[StepOutput]) -> dict[str, float]:
    """Means over all rows of K of several batches; nan where there are none."""
    return {
        name: float(torch.cat([getattr(output, field) for output in outputs]).mean())
        for name, field in (("kl", "kl"), ("clip_fraction", "clip_fraction"), ("overlap_top20", "overlap"))
    }
