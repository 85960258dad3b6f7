"""What fused_confidence returns."""

from typing import NamedTuple

from torch import Tensor


class ConfidenceOutput(NamedTuple):
    """What `fused_confidence` returns; every field has the leading dimensions and no gradient."""

    token: Tensor  # int64, the chosen id: argmax, or a sample
    logit: Tensor  # the chosen id's logit; its probability is exp(logit - logsumexp)
    logsumexp: Tensor  # over the ids that can be chosen
    max_logit: Tensor  # the largest, that of argmax
    argmax: Tensor  # int64, ties to the lowest id
    top_values: Tensor  # (..., top_k) logits, largest first, ties to the lowest id
    top_indices: Tensor  # (..., top_k) int64
    entropy: Tensor  # in nats, over the ids that can be chosen; (..., 0) unless asked for
