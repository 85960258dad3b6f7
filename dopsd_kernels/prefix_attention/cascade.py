"""prefix_attention in plain PyTorch: one attention over the prefix and one over own keys, merged by their logsumexp.

Towards the prefix, the queries of all sequences of a group are one long sequence; query heads that share a key head are
rows of it too. Each part gives its output o_i and the logsumexp l_i of its scores. With l = log(exp l_1 + exp l_2) the
whole is o = sum of exp(l_i - l) o_i. A probability of the whole is p = exp(score - l), and d score = p (d p - sum of
d out * out): so each part's backward pass, given the merged output and logsumexp in place of its own, is exact. On a
CPU both parts are PyTorch's fused attention, which keeps no scores; elsewhere scores exist for a chunk of sequences.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Scores of a chunk, in bytes.
_WORKSPACE_BYTES = 64 << 20


def is_fused(q: Tensor) -> bool:
    """Whether PyTorch has a fused attention here that takes and gives the logsumexp, for every dtype."""
    return q.device.type == "cpu"


class _Part(NamedTuple):
    """Operands of one attention, B batches of R rows that see K keys. They are contiguous.

    The fused operator takes other strides without an error, and computes something else.
    """

    q: Tensor  # (B, H_kv, R, D)
    k: Tensor  # (B, H_kv, K, D)
    v: Tensor  # (B, H_kv, K, D)
    mask: Tensor | None  # (B, K) bool, or (B, R, K)


def forward(
    q: Tensor,  # (G, S, H, T, D)
    k: Tensor,  # (G, S, H_kv, T, D)
    v: Tensor,  # (G, S, H_kv, T, D)
    k_prefix: Tensor,  # (G, H_kv, P, D)
    v_prefix: Tensor,  # (G, H_kv, P, D)
    prefix_mask: Tensor | None,  # (G, P) bool
    own_mask: Tensor | None,  # (G, S, T) bool
    prefix_length: Tensor | None,  # (G, S) int64
    scale: float,
    out: Tensor,  # (G, S, H, T, D), written
    lse: Tensor,  # (G, S, H, T), written
) -> None:
    """Write the output and the scores' logsumexp; -inf where a query sees no key."""
    attend = _fused if is_fused(q) else _explicit
    k_prefix, v_prefix = (x.to(lse.dtype).contiguous() for x in (k_prefix, v_prefix))
    for chunk in _chunks(q, k_prefix):
        rows = _rows(q[:, chunk], k.shape[2], lse.dtype)
        masks = prefix_mask, own_mask, prefix_length
        own, prefix = _parts(rows, k[:, chunk], v[:, chunk], k_prefix, v_prefix, *masks, chunk)
        result, normalizer = (x.view(*rows.shape[:4], *x.shape[3:]) for x in attend(own, scale))
        if prefix is not None:
            other, its = (_from_prefix(x, rows.shape) for x in attend(prefix, scale))
            merged = torch.logaddexp(normalizer, its)
            shift = merged.masked_fill(merged == -math.inf, 0.0)
            result = result * (normalizer - shift).exp()[..., None] + other * (its - shift).exp()[..., None]
            normalizer = merged
        out[:, chunk] = result.reshape(out[:, chunk].shape)
        lse[:, chunk] = normalizer.reshape(lse[:, chunk].shape)


def backward(
    grad: Tensor,  # (G, S, H, T, D)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_mask: Tensor | None,
    own_mask: Tensor | None,
    prefix_length: Tensor | None,
    out: Tensor,  # (G, S, H, T, D)
    lse: Tensor,  # (G, S, H, T)
    scale: float,
    d_q: Tensor,  # this and the following are written
    d_k: Tensor,
    d_v: Tensor,
    d_k_prefix: Tensor,
    d_v_prefix: Tensor,
) -> None:
    """Write the gradients of all five tensors."""
    differentiate = _fused_backward if is_fused(q) else _explicit_backward
    dtype, key_heads = lse.dtype, k.shape[2]
    k_prefix, v_prefix = (x.to(dtype).contiguous() for x in (k_prefix, v_prefix))
    sum_k, sum_v = torch.zeros_like(k_prefix), torch.zeros_like(v_prefix)
    # Rows that see nothing have probabilities exp(-inf - 0).
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    for chunk in _chunks(q, k_prefix):
        rows, grads, outs = (_rows(x[:, chunk], key_heads, dtype) for x in (q, grad, out))
        normalizer = lse[:, chunk].reshape(rows.shape[:4])
        masks = prefix_mask, own_mask, prefix_length
        own, prefix = _parts(rows, k[:, chunk], v[:, chunk], k_prefix, v_prefix, *masks, chunk)
        upstream, outputs, normalizers = (x.flatten(0, 1) for x in (grads, outs, normalizer))
        result, by_k, by_v = differentiate(own, upstream, outputs, normalizers, scale)
        d_k[:, chunk], d_v[:, chunk] = (x.view(k[:, chunk].shape) for x in (by_k, by_v))
        result = result.view(rows.shape)
        if prefix is not None:
            upstream, outputs, normalizers = (_to_prefix(x) for x in (grads, outs, normalizer))
            more, by_k, by_v = differentiate(prefix, upstream, outputs, normalizers, scale)
            result = result + _from_prefix(more, rows.shape)
            sum_k += by_k
            sum_v += by_v
        d_q[:, chunk] = result.reshape(d_q[:, chunk].shape)
    d_k_prefix.copy_(sum_k)
    d_v_prefix.copy_(sum_v)


# ------------------------------------------------------------------------------------------------------------
# One attention
# ------------------------------------------------------------------------------------------------------------


def _fused(part: _Part, scale: float) -> tuple[Tensor, Tensor]:  # (B, H_kv, R, D), (B, H_kv, R)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        part.q, part.k, part.v, attn_mask=_bias(part), scale=scale
    )
    if part.mask is not None:  # the operator says 0 for rows that see nothing
        lse = lse.masked_fill(~_to_rows(part.mask).any(-1), -math.inf)
    return out, lse


def _fused_backward(part: _Part, grad: Tensor, out: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, part.q, part.k, part.v, out, lse, 0.0, False, attn_mask=_bias(part), scale=scale
    )


def _bias(part: _Part) -> Tensor | None:  # (B, 1, 1 or R, K)
    if part.mask is None:
        return None
    return _to_rows(part.q.new_zeros(part.mask.shape).masked_fill(~part.mask, -math.inf))


def _to_rows(mask: Tensor) -> Tensor:  # (B, K) or (B, R, K) -> (B, 1, 1 or R, K)
    return mask[:, None, None] if mask.dim() == 2 else mask[:, None]


def _explicit(part: _Part, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(part, scale)
    lse = scores.logsumexp(-1)
    return _probabilities(scores, lse) @ part.v, lse


def _explicit_backward(
    part: _Part, grad: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    probabilities = _probabilities(_scores(part, scale), lse)
    d_v = probabilities.mT @ grad
    delta = (grad * out).sum(-1, keepdim=True)
    d_scores = probabilities.mul_((grad @ part.v.mT).sub_(delta)).mul_(scale)
    return d_scores @ part.k, d_scores.mT @ part.q, d_v


def _scores(part: _Part, scale: float) -> Tensor:  # (B, H_kv, R, K)
    scores = (part.q @ part.k.mT).mul_(scale)
    return scores if part.mask is None else scores.masked_fill_(~_to_rows(part.mask), -math.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """Turn scores into probabilities in place; those of a row that sees nothing are 0."""
    return scores.sub_(lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp_()


# ------------------------------------------------------------------------------------------------------------
# Two layouts
# ------------------------------------------------------------------------------------------------------------


def _chunks(q: Tensor, k_prefix: Tensor) -> Iterator[slice]:
    groups, sequences, heads, length, _ = q.shape
    count = sequences
    if not is_fused(q):
        bytes_each = 3 * groups * heads * length * (k_prefix.shape[2] + length) * k_prefix.itemsize
        count = max(1, _WORKSPACE_BYTES // bytes_each)
    return (slice(begin, min(begin + count, sequences)) for begin in range(0, sequences, count))


def _rows(x: Tensor, key_heads: int, dtype: torch.dtype) -> Tensor:  # (G, c, H, T, D) -> (G, c, H_kv, n T, D)
    groups, count, heads, length, width = x.shape
    return x.to(dtype).reshape(groups, count, key_heads, heads // key_heads * length, width).contiguous()


def _parts(
    rows: Tensor,  # (G, c, H_kv, n T, D)
    k: Tensor,  # (G, c, H_kv, T, D)
    v: Tensor,
    k_prefix: Tensor,  # (G, H_kv, P, D)
    v_prefix: Tensor,
    prefix_mask: Tensor | None,
    own_mask: Tensor | None,
    prefix_length: Tensor | None,
    chunk: slice,
) -> tuple[_Part, _Part | None]:
    """The attention to own keys, and that to the prefix, if there is one."""
    mask = None if own_mask is None else own_mask[:, chunk].flatten(0, 1)
    q, k, v = (x.to(rows.dtype).flatten(0, 1).contiguous() for x in (rows, k, v))
    own = _Part(q, k, v, mask)
    if not k_prefix.shape[2]:
        return own, None
    seen = prefix_mask
    if prefix_length is not None:
        reach = prefix_length[:, chunk].repeat_interleave(rows.shape[3], 1)  # (G, c n T)
        seen = torch.arange(k_prefix.shape[2], device=reach.device) < reach[..., None]
        seen = seen if prefix_mask is None else seen & prefix_mask[:, None]
    return own, _Part(_to_prefix(rows), k_prefix, v_prefix, seen)


def _to_prefix(x: Tensor) -> Tensor:  # (G, c, H_kv, n T, ...) -> (G, H_kv, c n T, ...)
    return x.transpose(1, 2).flatten(2, 3).contiguous()


def _from_prefix(x: Tensor, shape: torch.Size) -> Tensor:  # (G, H_kv, c n T, ...) -> (G, c, H_kv, n T, ...)
    groups, count, key_heads, rows = shape[:4]
    return x.view(groups, key_heads, count, rows, *x.shape[3:]).transpose(1, 2)
