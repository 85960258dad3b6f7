"""The step-level objective (Eq. 12): from trajectories to a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dopsd.confidence import Confidence, choose_tokens, most_confident
from dopsd.errors import require
from dopsd.rollout import Rollout
from dopsd.sampler import mix_seeds
from dopsd.step_batch import Lesson, StepBatch
from dopsd.teacher import RevealScope, TeacherWeights, self_future
from dopsd_kernels import fused_confidence, fused_step_kl

# Entries compared by the overlap metric.
OVERLAP_K = 20


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

    def lesson(
        self, rollout: Rollout, encode: Callable[[str], Tensor], reference_prompt: str | None, eos_id: int, seed: int
    ) -> Lesson:
        """Which steps of a rollout are trained on, and what its teacher sees at each; drawn from ``seed`` alone."""
        trajectory = rollout.trajectory
        steps = torch.arange(trajectory.num_steps)
        if self.skip_last_block:
            last = len(trajectory.tokens) - trajectory.block_length
            steps = steps[trajectory.block_starts(steps) < last]
        if self.teacher_context == "reference":
            assert reference_prompt is not None
            nothing = torch.zeros(len(steps), len(trajectory.tokens), dtype=torch.bool)
            return Lesson(trajectory, steps, nothing, encode(reference_prompt).cpu())
        reveal = self_future(
            trajectory,
            steps,
            retain_ratio=self.retain_ratio,
            scope=self.reveal_scope,
            tail=self.reveal_tail,
            eos_id=eos_id,
            generator=torch.Generator().manual_seed(seed),
        )
        return Lesson(trajectory, steps, reveal, trajectory.prompt_ids)

    def forward(
        self, model: Any, teacher: TeacherWeights, batch: StepBatch, mask_id: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of states, as a sum over lessons of Eq. 12, and sums for the metrics.

        Args:
            model: the network shared by both sides, unwrapped; gradients flow to the student's pass only.
            teacher: whose weights the teacher's pass has.
            batch: the states.
            mask_id: the mask token.

        Returns:
            The loss (scalar; divide by the number of lessons for their mean), and detached sums over the rows of K:
            ``rows``, ``kl`` and ``loss_rows`` (unclipped and clipped divergence), ``clipped`` (share of clipped
            entries), ``overlap`` (share of the student's top 20 that is in the teacher's) and, per state,
            ``state_kl`` (S,) and ``chosen`` (S, B) bool, the positions K.
        """
        weight = model.lm_head_weight
        with teacher.active():
            block_hidden = model.hidden_states(
                batch.teacher.input_ids, batch.teacher.attention_mask, batch.columns + batch.teacher.offset
            )
            chosen = self.choose(block_hidden, weight, batch, mask_id)
        state, offset = chosen.nonzero(as_tuple=True)  # one entry per row of K
        teacher_hidden = block_hidden[state, offset]
        if not len(state):
            zero = block_hidden.new_zeros((), requires_grad=True)
            return zero, metric_sums(batch, chosen, state, zero.new_zeros(0), zero.new_zeros(0), zero.new_zeros(0), 0.0)

        # The student is read at K only; states with fewer positions are padded with a position that carries no row.
        count = chosen.sum(-1)
        rank = chosen.long().cumsum(-1)[state, offset] - 1
        read = batch.columns[:, :1].repeat(1, int(count.max())) + batch.student.offset
        read[state, rank] = batch.columns[state, offset] + batch.student.offset
        student_hidden = model.hidden_states(batch.student.input_ids, batch.student.attention_mask, read)[state, rank]

        row_weight = batch.weight[state]
        if self.normalization == "step_mean":
            row_weight = row_weight / count[state]
        out = fused_step_kl(
            student_hidden,
            teacher_hidden,
            weight.detach(),
            row_weight=row_weight,
            divergence=self.divergence,
            beta=self.beta,
            clip=self.clip,
            clip_form=self.clip_form,
            top_k=None if self.top_k is None else min(self.top_k, len(weight)),
            tail=self.tail,
            reduction="sum",
        )
        overlap = top_k_overlap(student_hidden.detach(), teacher_hidden, weight.detach())
        return out.loss, metric_sums(
            batch, chosen, state, out.row_loss, out.row_kl, out.row_clip_fraction, float(overlap.sum())
        )

    def choose(self, block_hidden: Tensor, weight: Tensor, batch: StepBatch, mask_id: int) -> Tensor:
        """(S, B) bool: K of each state, the k candidates the teacher is surest of, or what the student committed."""
        if self.selection == "student":
            return batch.committed & batch.candidates
        _, row_confidence = choose_tokens(block_hidden[batch.candidates], weight, self.confidence, mask_id=mask_id)
        confidence = row_confidence.new_full(batch.candidates.shape, -torch.inf)
        confidence[batch.candidates] = row_confidence
        return most_confident(confidence, batch.candidates, batch.k)


def metric_sums(
    batch: StepBatch, chosen: Tensor, state: Tensor, loss: Tensor, kl: Tensor, clipped: Tensor, overlap: float
) -> dict[str, Tensor]:
    """Sums over the rows of K, and per-state means, detached; see :meth:`Objective.forward`."""
    state_kl = kl.new_zeros(len(batch)).index_add_(0, state, kl.detach())
    return {
        "rows": torch.tensor(float(len(state))),
        "kl": kl.sum(),
        "loss_rows": loss.sum(),
        "clipped": clipped.sum(),
        "overlap": torch.tensor(overlap),
        "state_kl": state_kl / chosen.sum(-1).clamp_min(1),
        "chosen": chosen,
    }


def top_k_overlap(student_hidden: Tensor, teacher_hidden: Tensor, weight: Tensor) -> Tensor:
    """(N,) share of each row's ``OVERLAP_K`` likeliest student entries that are among the teacher's."""
    k = min(OVERLAP_K, len(weight))
    mine = fused_confidence(student_hidden, weight, top_k=k).top_indices
    theirs = fused_confidence(teacher_hidden, weight, top_k=k).top_indices
    return (mine[:, :, None] == theirs[:, None, :]).any(-1).float().mean(-1)


def lessons_of(
    objective: Objective,
    rollouts: Sequence[Rollout],
    decoder: Any,
    seeds: Sequence[int],
) -> list[Lesson]:
    """The lessons of ``rollouts``, leaving out those with no step to train on."""
    reference = objective.teacher_context == "reference"
    lessons = [
        objective.lesson(
            rollout,
            decoder.encode,
            decoder.task.reference_prompt(rollout.row) if reference else None,
            decoder.eos_id,
            int(mix_seeds(seed, 2)),
        )
        for rollout, seed in zip(rollouts, seeds, strict=True)
    ]
    return [lesson for lesson in lessons if len(lesson.steps)]


def mean_metrics(sums: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Means over all rows of K of several batches."""
    total = {key: sum(float(part[key]) for part in sums) for key in ("rows", "kl", "clipped", "overlap")}
    rows = max(total.pop("rows"), 1.0)
    return {
        "kl": total["kl"] / rows,
        "clip_fraction": total["clipped"] / rows,
        "overlap_top20": total["overlap"] / rows,
    }
