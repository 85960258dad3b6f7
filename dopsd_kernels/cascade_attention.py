"""prefix_attention in plain PyTorch: the queries of several sequences meet their group's prefix in one product.

A chunk of sequences has scores over the prefix (G, H_kv, rows, P), rows being all queries of the chunk that share a
key head, and over its own keys (G, sequences, H_kv, queries, T). One softmax spans both. Only a chunk's scores exist.
The backward pass takes p = exp(score - logsumexp) and d score = p (d p - sum of d out * out), where logsumexp and out
are those over all keys, so that each of the two parts is differentiated by itself.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Scores of a chunk, in bytes.
_WORKSPACE_BYTES = 64 << 20


class _Chunk(NamedTuple):
    """Queries of some sequences, seen by the prefix and by their own keys."""

    sequences: slice
    to_prefix: Tensor  # (G, H_kv, c n T, D), n = H / H_kv
    to_own: Tensor  # (G, c, H_kv, n T, D)


def forward(
    q: Tensor,  # (G, S, H, T, D)
    k: Tensor,  # (G, S, H_kv, T, D)
    v: Tensor,  # (G, S, H_kv, T, D)
    k_prefix: Tensor,  # (G, H_kv, P, D)
    v_prefix: Tensor,  # (G, H_kv, P, D)
    prefix_mask: Tensor | None,  # (G, P) bool
    own_mask: Tensor | None,  # (G, S, T) bool
    scale: float,
    out: Tensor,  # (G, S, H, T, D), written
    lse: Tensor,  # (G, S, H, T), written
) -> None:
    """Write the output and the scores' logsumexp; -inf where a query sees no key."""
    dtype = lse.dtype
    k_prefix, v_prefix = k_prefix.to(dtype), v_prefix.to(dtype)
    for part in _chunks(q.shape, k.shape[2], k_prefix.shape[2], dtype):
        queries = _chunk(q, part, k.shape[2], dtype)
        prefix, own = _scores(queries, k[:, part].to(dtype), k_prefix, prefix_mask, own_mask, scale)
        normalizer = torch.logsumexp(own, -1)
        if k_prefix.shape[2]:
            normalizer = torch.logaddexp(normalizer, _to_own(torch.logsumexp(prefix, -1)[..., None], own.shape)[..., 0])
        prefix, own = _probabilities(prefix, own, normalizer)
        result = own @ v[:, part].to(dtype) + _to_own(prefix @ v_prefix, own.shape)
        out[:, part] = result.view(out[:, part].shape)
        lse[:, part] = normalizer.view(lse[:, part].shape)


def backward(
    grad: Tensor,  # (G, S, H, T, D)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_mask: Tensor | None,
    own_mask: Tensor | None,
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
    dtype, key_heads = lse.dtype, k.shape[2]
    keys, values = k_prefix.to(dtype), v_prefix.to(dtype)
    sum_k, sum_v = torch.zeros_like(keys), torch.zeros_like(values)
    for part in _chunks(q.shape, key_heads, keys.shape[2], dtype):
        queries, grads = (_chunk(x, part, key_heads, dtype) for x in (q, grad))
        own_keys, own_values = k[:, part].to(dtype), v[:, part].to(dtype)
        prefix, own = _scores(queries, own_keys, keys, prefix_mask, own_mask, scale)
        prefix, own = _probabilities(prefix, own, lse[:, part].reshape(own.shape[:-1]))
        delta = (grad[:, part].to(dtype) * out[:, part].to(dtype)).sum(-1, keepdim=True).view(*own.shape[:-1], 1)
        d_v[:, part] = own.mT @ grads.to_own
        sum_v += prefix.mT @ grads.to_prefix
        d_own = own.mul_((grads.to_own @ own_values.mT).sub_(delta)).mul_(scale)
        d_prefix = prefix.mul_((grads.to_prefix @ values.mT).sub_(_to_prefix(delta))).mul_(scale)
        d_k[:, part] = d_own.mT @ queries.to_own
        sum_k += d_prefix.mT @ queries.to_prefix
        result = d_own @ own_keys + _to_own(d_prefix @ keys, own.shape)
        d_q[:, part] = result.view(d_q[:, part].shape)
    d_k_prefix.copy_(sum_k)
    d_v_prefix.copy_(sum_v)


def _chunks(shape: torch.Size, key_heads: int, prefix: int, dtype: torch.dtype) -> Iterator[slice]:
    groups, sequences, heads, length, _ = shape
    bytes_each = 3 * groups * heads * length * (prefix + length) * dtype.itemsize
    count = max(1, _WORKSPACE_BYTES // bytes_each)
    return (slice(begin, min(begin + count, sequences)) for begin in range(0, sequences, count))


def _chunk(x: Tensor, part: slice, key_heads: int, dtype: torch.dtype) -> _Chunk:
    """Fold the query heads that share a key head into rows."""
    x = x[:, part].to(dtype)
    groups, count, heads, length, width = x.shape
    own = x.reshape(groups, count, key_heads, heads // key_heads * length, width)
    return _Chunk(part, _to_prefix(own), own)


def _to_prefix(x: Tensor) -> Tensor:  # (G, c, H_kv, n T, D) -> (G, H_kv, c n T, D)
    return x.transpose(1, 2).flatten(2, 3)


def _to_own(x: Tensor, shape: torch.Size) -> Tensor:  # (G, H_kv, c n T, D) -> (G, c, H_kv, n T, D)
    groups, count, key_heads, rows = shape[:4]
    return x.view(groups, key_heads, count, rows, x.shape[-1]).transpose(1, 2)


def _scores(
    queries: _Chunk,
    k: Tensor,  # (G, c, H_kv, T, D)
    k_prefix: Tensor,  # (G, H_kv, P, D)
    prefix_mask: Tensor | None,
    own_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # (G, H_kv, c n T, P), (G, c, H_kv, n T, T)
    prefix = (queries.to_prefix @ k_prefix.mT).mul_(scale)
    own = (queries.to_own @ k.mT).mul_(scale)
    if prefix_mask is not None:
        prefix.masked_fill_(~prefix_mask[:, None, None], -math.inf)
    if own_mask is not None:
        own.masked_fill_(~own_mask[:, queries.sequences, None, None], -math.inf)
    return prefix, own


def _probabilities(prefix: Tensor, own: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Turn scores into probabilities in place; those of a query that sees nothing are 0."""
    shift = lse.masked_fill(lse == -math.inf, 0.0)[..., None]
    return prefix.sub_(_to_prefix(shift)).exp_(), own.sub_(shift).exp_()
