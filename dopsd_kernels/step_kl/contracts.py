"""The types that fused_step_kl and its implementations share."""

from typing import Literal, NamedTuple

from torch import Tensor

# The names in the tables of divergences, as a type.
Divergence = Literal["reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl"]


class StepKLOutput(NamedTuple):
    """What `fused_step_kl` returns; the `row_*` fields have the leading dimensions and no gradient."""

    loss: Tensor  # () for "mean" and "sum", the leading dimensions for "none"
    row_loss: Tensor  # each row's clipped divergence, before its row weight
    row_kl: Tensor  # the same divergence without the clip
    row_clip_fraction: Tensor  # share of the row's entries whose contribution was above the clip


class StepKLOptions(NamedTuple):
    """The settings of `fused_step_kl` that define a row's loss; its docstring explains each."""

    divergence: str = "reverse_kl"
    beta: float = 0.5
    clip: float | None = None
    clip_form: str = "plain"
    top_k: int | None = None
    tail: str = "renormalize"
    temperature: float = 1.0

    @property
    def nonnegative(self) -> bool:
        """Whether contributions and pulls are those of the nonnegative form; without a clip both have one gradient."""
        return self.clip is None or self.clip_form == "nonnegative"

    @property
    def renormalized(self) -> bool:
        """Whether nothing outside the teacher's top-k matters, to the loss or to its gradient."""
        return self.top_k is not None and self.tail == "renormalize"

    def entries(self, vocab: int) -> int:
        """Return how many entries a row's divergence has: those of the vocabulary, or of the teacher's top-k."""
        if self.top_k is None:
            return vocab
        return self.top_k + (self.tail == "bucket")
