"""The types that the public ops and their implementations share."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class StepKLOutput(NamedTuple):
    """What `fused_step_kl` returns; the `row_*` fields have the leading dimensions and no gradient."""

    loss: Tensor  # () for "mean" and "sum", the leading dimensions for "none"
    row_loss: Tensor  # each row's clipped divergence, before its row weight
    row_kl: Tensor  # the same divergence without the clip
    row_clip_fraction: Tensor  # share of the row's entries whose contribution was above the clip


class ConfidenceOutput(NamedTuple):
    """What `fused_confidence` returns; every field has the leading dimensions and no gradient."""

    token: Tensor  # int64, the chosen id: argmax, or a sample
    logit: Tensor  # the chosen id's logit; its probability is exp(logit - logsumexp)
    logsumexp: Tensor  # over the ids that can be chosen
    max_logit: Tensor
    argmax: Tensor  # int64, ties to the lowest id
    top_values: Tensor  # (..., top_k) logits, largest first, ties to the lowest id
    top_indices: Tensor  # (..., top_k) int64


@dataclass(frozen=True)
class StepKLOptions:
    """The settings of `fused_step_kl` that define a row's loss; its docstring explains each."""

    divergence: str = "reverse_kl"
    beta: float = 0.5
    clip: float | None = None
    clip_form: str = "plain"
    top_k: int | None = None
    tail: str = "renormalize"
    temperature: float = 1.0

    @property
    def renormalized(self) -> bool:
        """Whether nothing outside the teacher's top-k matters, to the loss or to its gradient."""
        return self.top_k is not None and self.tail == "renormalize"

    def entries(self, vocab: int) -> int:
        """Return how many entries a row's divergence has: those of the vocabulary, or of the teacher's top-k."""
        if self.top_k is None:
            return vocab
        return self.top_k + (self.tail == "bucket")
