"""The step-level objective (Eq. 12): from trajectories to a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dopsd.confidence import Confidence, choose_tokens, most_confident
from dopsd.errors import must_be
from dopsd.sampler import inference
from dopsd.step_batch import BlockInputs, Inputs, PackedInputs, StepBatch
from dopsd.teacher import TeacherView, TeacherWeights
from dopsd_kernels import fused_confidence, fused_step_kl
from dopsd_kernels.step_kl import Divergence, StepKLOutput

# Entries compared by the overlap metric.
OVERLAP_K = 20


@dataclass(frozen=True)
class StepOutput:
    """The objective on a batch of S states with R rows of K in all; everything but ``loss`` is detached.

    Args:
        loss: scalar, the sum over examples of Eq. 12; divide by their number for the mean.
        chosen: (S, B) bool, the positions K in each state's block.
        state: (R,) int64, the state of each row.
        divergence: (R,), without the clip.
        clip_fraction: (R,) share of vocabulary entries whose contribution was clipped.
        overlap: (R,) share of the student's 20 likeliest entries that are among the teacher's.
    """

    loss: Tensor
    chosen: Tensor
    state: Tensor
    divergence: Tensor
    clip_fraction: Tensor
    overlap: Tensor

    def state_divergence(self) -> Tensor:
        """(S,) mean divergence over each state's K; 0 where K is empty."""
        return state_means(self.divergence, self.state, self.chosen)


class Selection(NamedTuple):
    """K of a batch of S states, R rows in all.

    Args:
        chosen: (S, B) bool, the positions K in each state's block.
        state: (R,) int64, the state of each row.
        rank: (R,) int64, each row's number among its state's.
        columns: (S, max |K|) int64, K's response positions; one of them again where a state has fewer.
        teacher_hidden: (R, d), the teacher's states at K.
    """

    chosen: Tensor
    state: Tensor
    rank: Tensor
    columns: Tensor
    teacher_hidden: Tensor

    def hidden(self, model: Any, inputs: Inputs | PackedInputs | BlockInputs) -> Tensor:
        """(R, d), the network's states at K; nothing else is read."""
        return inputs.hidden_states(model, self.columns)[self.state, self.rank]


@dataclass(frozen=True, kw_only=True)
class Objective(TeacherView):
    """What is taught at each step; field meanings are those of the command-line options of the same names.

    ``workspace_bytes`` is no option: the limit of :func:`~dopsd_kernels.fused_step_kl`, None for its own default.

    Raises:
        UsageError: a field has a value that is not accepted.
    """

    selection: Literal["teacher", "student"]
    confidence: Confidence
    divergence: Divergence
    beta: float
    clip: float | None
    clip_form: Literal["plain", "nonnegative"]
    top_k: int | None
    tail: Literal["renormalize", "bucket"]
    normalization: Literal["step_mean", "batchmean"]
    workspace_bytes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        must_be(self.clip is None or self.clip >= 0, "clip", self.clip, "at least 0, or none")
        must_be(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1, or none")
        must_be(0 < self.beta < 1, "beta", self.beta, "strictly between 0 and 1")

    def forward(self, model: Any, teacher: TeacherWeights, batch: StepBatch, mask_id: int) -> StepOutput:
        """Both sides of a batch of states, and the divergence between them at K.

        Args:
            model: the network shared by both sides, unwrapped; gradients flow to the student's pass only.
            teacher: whose weights the teacher's pass has.
            batch: the states.
            mask_id: the mask token.
        """
        weight = model.lm_head_weight.detach()
        selection = self.select(model, teacher, batch, mask_id)
        chosen, state = selection.chosen, selection.state
        student_hidden = selection.hidden(model, batch.student)
        teacher_hidden = selection.teacher_hidden.to(student_hidden.dtype)

        row_weight = batch.weight[state]
        if self.normalization == "step_mean":
            row_weight = row_weight / chosen.sum(-1)[state]
        out = self.compare(student_hidden, teacher_hidden, weight, row_weight)
        overlap = top_k_overlap(student_hidden.detach(), teacher_hidden, weight)
        return StepOutput(out.loss, chosen, state, out.row_kl, out.row_clip_fraction, overlap)

    def compare(
        self,
        student_hidden: Tensor,  # (R, d)
        teacher_hidden: Tensor,  # (R, d)
        weight: Tensor,  # (V, d)
        row_weight: Tensor,  # (R,) fp32
    ) -> StepKLOutput:
        """The weighted sum of the rows' losses, and what else :func:`~dopsd_kernels.fused_step_kl` says of them."""
        return fused_step_kl(
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
            workspace_bytes=self.workspace_bytes,
        )

    def drift(self, model: Any, teacher: TeacherWeights, exact: StepBatch, reused: StepBatch, mask_id: int) -> Tensor:
        """(S,) how far reuse moves the student: mean over K of KL(exact || reused), without dropout or gradient.

        Both batches hold the same states; K is chosen with reuse, as it is when they are trained on.
        """
        selection = self.select(model, teacher, reused, mask_id)
        with inference(model):
            ours, theirs = (selection.hidden(model, batch.student) for batch in (exact, reused))
            weight, limit = model.lm_head_weight.detach(), self.workspace_bytes
            out = fused_step_kl(ours, theirs, weight, reduction="sum", workspace_bytes=limit)
        return state_means(out.row_kl, selection.state, selection.chosen)

    def select(self, model: Any, teacher: TeacherWeights, batch: StepBatch, mask_id: int) -> Selection:
        """The teacher's pass over a batch of states, and K."""
        with teacher.active():
            block_hidden = batch.teacher.hidden_states(model, batch.columns)
            chosen = self.choose(block_hidden, model.lm_head_weight.detach(), batch, mask_id)
        rows = batch.rows_by_commit if self.selection == "student" else batch.rows_by_confidence
        # One entry per row of K, in order: nonzero() without waiting to learn how many there are.
        index = chosen.flatten().byte().argsort(descending=True, stable=True)[: int(rows.sum())]
        state, offset = index // chosen.shape[1], index % chosen.shape[1]
        rank = chosen.long().cumsum(-1)[state, offset] - 1
        # The student is read at K only. States with fewer positions repeat one that then carries no row.
        columns = batch.columns[:, :1].repeat(1, max(1, int(rows.max())))
        columns[state, rank] = batch.columns[state, offset]
        return Selection(chosen, state, rank, columns, block_hidden[state, offset])

    def choose(self, block_hidden: Tensor, weight: Tensor, batch: StepBatch, mask_id: int) -> Tensor:
        """(S, B) bool: K of each state, the teacher's k most confident candidates, or what the student committed."""
        if self.selection == "student":
            return batch.committed & batch.candidates
        candidates = block_hidden.flatten(0, 1)[batch.candidate_index]
        _, row_confidence = choose_tokens(candidates, weight, self.confidence, mask_id=mask_id)
        confidence = row_confidence.new_full((batch.candidates.numel(),), -torch.inf)
        confidence[batch.candidate_index] = row_confidence
        return most_confident(confidence.view(batch.candidates.shape), batch.candidates, batch.k)


def state_means(
    values: Tensor,  # (R,)
    state: Tensor,  # (R,) int64
    chosen: Tensor,  # (S, B) bool
) -> Tensor:  # (S,)
    """Means over each state's K; 0 where K is empty."""
    total = values.new_zeros(len(chosen)).index_add_(0, state, values)
    return total / chosen.sum(-1).clamp_min(1)


def top_k_overlap(student_hidden: Tensor, teacher_hidden: Tensor, weight: Tensor) -> Tensor:
    """(N,) share of each row's ``OVERLAP_K`` likeliest student entries that are among the teacher's."""
    k = min(OVERLAP_K, len(weight))
    mine = fused_confidence(student_hidden, weight, top_k=k).top_indices
    theirs = fused_confidence(teacher_hidden, weight, top_k=k).top_indices
    return (mine[:, :, None] == theirs[:, None, :]).any(-1).float().mean(-1)
