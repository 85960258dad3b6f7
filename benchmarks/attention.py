"""prefix_attention, attention over a copy of the prefix for every sequence, and flex_attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case
from dopsd_kernels import prefix_attention


def tensors(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Random q, k, v and the prefix' keys and values, with gradients."""
    generator = torch.Generator(device).manual_seed(0)
    own = (case.groups, case.sequences, case.heads, case.length, case.width)
    shared = (case.groups, case.heads, case.prefix, case.width)
    drawn = [torch.randn(shape, generator=generator, device=device) for shape in (own, own, own, shared, shared)]
    return tuple(x.to(case.dtype).requires_grad_() for x in drawn)


def needs(case: Case) -> dict[str, float]:
    """Two products forward, four backward (scores computed again do not count); every tensor once."""
    queries = case.groups * case.sequences * case.heads * case.length
    product = 2 * queries * (case.prefix + case.length) * case.width
    own, shared = queries * case.width, case.groups * case.heads * case.prefix * case.width
    # q, k, v, out and the prefix' two; backward reads them and out's gradient, and writes the gradients.
    numbers = 4 * own + 2 * shared if case.phase == "forward" else 12 * own + 6 * shared
    return {"flops": product * (2 if case.phase == "forward" else 6), "bytes": numbers * case.dtype.itemsize}


def ours(case: Case, *tensors: Tensor, backend: str) -> Tensor:
    return prefix_attention(*tensors, backend=backend)


def concatenated(case: Case, q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor) -> Tensor:
    """PyTorch's attention over every sequence's own copy of the prefix."""
    keys, values = (
        torch.cat([prefix[:, None].expand(-1, q.shape[1], -1, -1, -1), own], 3).flatten(0, 1)
        for prefix, own in ((k_prefix, k), (v_prefix, v))
    )
    return F.scaled_dot_product_attention(q.flatten(0, 1), keys, values).view_as(q)


_compiled = functools.cache(torch.compile)


def flex(case: Case, q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor) -> Tensor:
    """flex_attention over the prefix and all of a group's sequences, with a mask that keeps these apart."""
    from torch.nn.attention.flex_attention import flex_attention

    queries, own_keys, own_values = (x.transpose(1, 2).flatten(2, 3) for x in (q, k, v))
    keys, values = torch.cat([k_prefix, own_keys], 2), torch.cat([v_prefix, own_values], 2)
    attend = flex_attention if q.device.type == "cpu" else _compiled(flex_attention)
    out = attend(queries, keys, values, block_mask=_mask(case.sequences, case.length, case.prefix, str(q.device)))
    return out.unflatten(2, (case.sequences, case.length)).transpose(1, 2)


@functools.cache
def _mask(sequences: int, length: int, prefix: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < prefix) | ((key - prefix) // length == query // length)

    return create_block_mask(allowed, None, None, sequences * length, prefix + sequences * length, device=device)
