"""fused_token_logprob: the passes over a chunk's logits, one program per row.

A row of 126464 logits is 0.5 MB, and a chunk has hundreds of rows: enough programs for a GPU, and none has to wait for
what others found, so that each pass is one launch. Its second pass writes the gradient where the logits were. In 16
bits column v of it lies over column v / 2 of the logits, which the program has read, for it goes over the row in order
and waits for all its threads before it writes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import LAUNCH, choose
from .passes import LOWEST

_LOWEST = tl.constexpr(LOWEST)


@triton.jit
def _shifted(
    z,  # (R, V) fp32
    bias,  # (V,) fp32, or None
    row_offset,
    columns,
    inside,
    inverse_temperature,
):
    """Columns of a row of logits over the temperature; -inf outside the vocabulary, for exp(-inf) adds nothing."""
    x = tl.load(z + row_offset + columns, mask=inside, other=-float("inf"))
    if bias is not None:
        x += tl.load(bias + columns, mask=inside, other=0.0)
    return x * inverse_temperature


@triton.jit
def _below(x, peak):
    """Return x - peak, -1e4 where it is less: exp is 0 there, and a product with it too. NaN stays."""
    y = x - peak
    return tl.where(y < _LOWEST, _LOWEST, y)


@triton.jit
def _statistics(
    z,  # (R, V) fp32
    bias,  # (V,) fp32, or None
    parts,  # (3, R) fp32
    stride,
    vocab,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    peak = -float("inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = _shifted(z, bias, row * stride, columns, columns < vocab, inverse_temperature)
        new = tl.maximum(peak, tl.max(x, 0))
        from_here = tl.where(new == -float("inf"), 0.0, new)
        shift = _below(peak, from_here)
        y = _below(x, from_here)
        exponentials = tl.exp(y)
        weighted = tl.exp(shift) * (weighted + shift * total) + tl.sum(exponentials * y, 0)
        total = tl.exp(shift) * total + tl.sum(exponentials, 0)
        peak = new
    rows = tl.num_programs(0)
    tl.store(parts + row, peak)
    tl.store(parts + rows + row, total)
    tl.store(parts + 2 * rows + row, weighted)


@triton.jit
def _logit_gradient(
    z,  # (R, V) fp32
    bias,  # (V,) fp32, or None
    peak,  # (R,) fp32
    factor,  # (R,) fp32
    slope,  # (R,) fp32, or None
    columns,  # (R, TOKENS) int64
    upstream,  # (R, TOKENS) fp32
    gradient,  # (R, V), over z
    stride,
    stride_gradient,
    vocab,
    tokens,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    highest = tl.load(peak + row)
    constant = tl.load(factor + row)
    for start in range(0, vocab, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < vocab
        y = _below(_shifted(z, bias, row * stride, place, inside, inverse_temperature), highest)
        dz = tl.exp(y)
        if slope is None:
            dz *= constant
        else:
            dz *= constant + tl.load(slope + row) * y
        for token in range(tokens):
            column = tl.load(columns + row * tokens + token)
            if (column >= start) & (column < start + BLOCK):
                dz += tl.where(place == column, tl.load(upstream + row * tokens + token), 0.0)
        tl.debug_barrier()
        tl.store(gradient + row * stride_gradient + place, dz.to(gradient.dtype.element_ty), mask=inside)


def block_rows(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many rows' logits a launch should go over: all."""
    return 1 << 30


def row_bytes(vocab: int, dtype: torch.dtype) -> int:
    """Return the memory that a pass needs per row, beside the logits."""
    return 0


def statistics(
    z: Tensor,  # (R, V) fp32, columns contiguous
    bias: Tensor | None,  # (V,) fp32
    inverse_temperature: float,
) -> Tensor:
    """Return peak, sum of exp(x - peak) and sum of exp(x - peak) (x - peak) as (3, R), of x = (z + bias) / T."""
    parts = z.new_empty((3, len(z)))
    _statistics[(len(z),)](
        z=z,
        bias=bias,
        parts=parts,
        stride=z.stride(0),
        vocab=z.shape[1],
        inverse_temperature=inverse_temperature,
        **_launch(z),
    )
    return parts


def logit_gradient(
    z: Tensor,  # (R, V) fp32, columns contiguous
    bias: Tensor | None,  # (V,) fp32
    inverse_temperature: float,
    peak: Tensor,  # (R,) fp32
    factor: Tensor,  # (R,) fp32
    slope: Tensor | None,  # (R,) fp32; None: 0
    columns: Tensor,  # (R, m) int64
    upstream: Tensor,  # (R, m) fp32
    gradient: Tensor,  # (R, V), written; z, or its memory row by row
) -> None:
    """Write exp(x - peak) (factor + slope (x - peak)), and add to each column what is upstream of it."""
    _logit_gradient[(len(z),)](
        z=z,
        bias=bias,
        peak=peak,
        factor=factor,
        slope=slope,
        columns=columns.contiguous(),
        upstream=upstream.contiguous(),
        gradient=gradient,
        stride=z.stride(0),
        stride_gradient=gradient.stride(0),
        vocab=z.shape[1],
        tokens=columns.shape[1],
        inverse_temperature=inverse_temperature,
        **_launch(z),
    )


def _launch(z: Tensor) -> dict[str, Any]:
    return {**choose("token_logprob_rows", z.device, 0, 0, z.shape[1]), **LAUNCH}
