"""A model's confidence in its tokens at masked positions, and the choice of the most confident positions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dopsd_kernels import fused_confidence

Confidence = Literal["probability", "logit", "margin", "entropy"]


def choose_tokens(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    kind: Confidence,
    *,
    mask_id: int,
    temperature: float = 0.0,
    seeds: Tensor | None = None,  # (N,) int64, needed when temperature > 0
) -> tuple[Tensor, Tensor]:
    """A token for each row and the model's confidence in it, without the rows' logits.

    ``probability`` and ``logit`` are those of the chosen token, at temperature 1; ``margin`` is the gap between the two
    largest probabilities; ``entropy`` is the negative entropy, so that larger means more confident in every case. The
    mask token is never chosen and has no probability.

    Returns:
        tokens (N,) int64 and confidences (N,) in fp32 (fp64 for fp64 ``hidden``).
    """
    out = fused_confidence(
        hidden,
        weight,
        temperature=temperature,
        seed=seeds,
        top_k=2 if kind == "margin" else 0,
        exclude=(mask_id,),
        entropy=kind == "entropy",
    )
    if kind == "logit":
        return out.token, out.logit
    if kind == "margin":
        first, second = (out.top_values - out.logsumexp[:, None]).exp().unbind(-1)
        return out.token, first - second
    if kind == "entropy":
        return out.token, -out.entropy
    return out.token, (out.logit - out.logsumexp).exp()


def most_confident(
    confidence: Tensor,  # (S, B)
    candidates: Tensor,  # (S, B) bool
    count: Tensor,  # (S,) int64
) -> Tensor:  # (S, B) bool
    """The ``count`` candidates of each row with the highest confidence; ties go to the lower position."""
    order = confidence.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return candidates & (rank < count[:, None])
