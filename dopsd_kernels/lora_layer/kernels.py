"""What a layer computes between its matrix products, each in one pass over memory.

All of it is bound by memory, so every number is read once, computed with in fp32, rounded once and written once. A
norm's row lies in the registers of one program; its backward makes the norm's factor again, and adds the residual's
gradient on the way. The nonlinearity and the dropout go over flat memory. A token's rotary tables are read once for
several heads. Any size of program that keeps the memory busy is as fast as another, so there is nothing to tune.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import LAUNCH
from ..common.philox_kernels import philox_words

# Columns of a row for each warp; entries of flat memory, and heads of a token, for each program.
_WARP_COLUMNS, _BLOCK, _HEADS = 512, 2048, 16

# ------------------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------------------


@triton.jit
def _rms_norm(
    x,  # (N, d), the last stride is 1
    weight,  # (d,)
    out,  # (N, d)
    stride,  # of x' rows
    width,  # d
    eps,
    BLOCK: tl.constexpr,  # at least d
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    normed = h * tl.rsqrt(tl.sum(h * h, 0) / width + eps) * w
    tl.store(out + row * width + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(
    gradient,  # (N, d), the last stride is 1
    x,  # (N, d), the last stride is 1
    more,  # (N, d), the last stride is 1; None: 0
    weight,  # (d,)
    out,  # (N, d)
    gradient_stride,  # of rows
    stride,  # of x' rows
    more_stride,  # of rows
    width,  # d
    eps,
    BLOCK: tl.constexpr,  # at least d
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.load(gradient + row * gradient_stride + column, mask=inside, other=0.0).to(tl.float32)
    scaled *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(h * h, 0) / width + eps)
    along = tl.sum(scaled * h, 0) / width * inverse * inverse
    total = (scaled - h * along) * inverse
    if more is not None:
        total += tl.load(more + row * more_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(
    gate,  # (count,)
    up,  # (count,)
    out,  # (count,)
    count,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    g = tl.load(gate + place, mask=inside).to(tl.float32)
    u = tl.load(up + place, mask=inside).to(tl.float32)
    tl.store(out + place, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    gradient,  # (count,); that of up is written over it
    gate,  # (count,)
    up,  # (count,)
    of_gate,  # (count,)
    out,  # (count,): as `_swiglu` has it
    count,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    d = tl.load(gradient + place, mask=inside).to(tl.float32)
    g = tl.load(gate + place, mask=inside).to(tl.float32)
    u = tl.load(up + place, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    tl.store(of_gate + place, (d * u * sigmoid * (1 + g * (1 - sigmoid))).to(of_gate.dtype.element_ty), mask=inside)
    tl.store(gradient + place, (d * silu).to(gradient.dtype.element_ty), mask=inside)
    tl.store(out + place, (silu * u).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _drop(
    x,  # (count,)
    total,  # (count,), added; None: 0
    out,  # (count,), total where there is one
    count,
    seed: tl.int64,
    threshold: tl.int64,  # below 2^32
    scale,  # of what is kept
    BLOCK: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    place = begin + tl.arange(0, BLOCK)
    inside = place < count
    word = tl.reshape(philox_words(tl.full((1,), 0, tl.int64) + seed, begin, BLOCK), (BLOCK,))
    h = tl.load(x + place, mask=inside).to(tl.float32)
    # A product, as everywhere in PyTorch: NaN stays.
    kept = h * tl.where(word >= threshold.to(tl.uint32), scale, 0.0)
    if total is not None:
        kept += tl.load(total + place, mask=inside).to(tl.float32)
    tl.store(out + place, kept.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotary(
    x,  # (B, H, T, D), the last stride is 1
    cos,  # (B or 1, 1, T, D)
    sin,  # (B or 1, 1, T, D)
    out,  # (B, H, T, D), the last stride is 1
    x_batch,  # strides
    x_head,
    x_token,
    out_batch,
    out_head,
    out_token,
    table_batch,
    heads,  # H
    length,  # T
    half,  # D / 2
    TRANSPOSED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    COLUMNS: tl.constexpr,  # at least D / 2
):
    batch = (tl.program_id(0) // length).to(tl.int64)
    token = (tl.program_id(0) % length).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    table = batch * table_batch + token * 2 * half + column
    cos_1 = tl.load(cos + table, mask=column < half).to(tl.float32)
    sin_1 = tl.load(sin + table, mask=column < half).to(tl.float32)
    cos_2 = tl.load(cos + table + half, mask=column < half).to(tl.float32)
    sin_2 = tl.load(sin + table + half, mask=column < half).to(tl.float32)
    inside = (head < heads) & (column < half)
    at_x = x + batch * x_batch + token * x_token + head * x_head + column
    first = tl.load(at_x, mask=inside).to(tl.float32)
    second = tl.load(at_x + half, mask=inside).to(tl.float32)
    if TRANSPOSED:
        new_first = first * cos_1 + second * sin_2
        new_second = second * cos_2 - first * sin_1
    else:
        new_first = first * cos_1 - second * sin_1
        new_second = second * cos_2 + first * sin_2
    at_out = out + batch * out_batch + token * out_token + head * out_head + column
    tl.store(at_out, new_first.to(out.dtype.element_ty), mask=inside)
    tl.store(at_out + half, new_second.to(out.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------------------
# Launch; as the functions of elementwise.py
# ------------------------------------------------------------------------------------------------------------


def rms_norm(
    x: Tensor,  # (N, d)
    weight: Tensor,  # (d,)
    eps: float,
    dtype: torch.dtype,
) -> Tensor:  # (N, d) in dtype
    """x / sqrt(mean(x^2) + eps) * weight."""
    x, out = _rows(x), x.new_empty(x.shape, dtype=dtype)
    if x.numel():
        _rms_norm[(len(x),)](x, weight.contiguous(), out, x.stride(0), x.shape[1], eps, **_row_launch(x))
    return out


def rms_norm_backward(
    gradient: Tensor,  # (N, d) of the result
    x: Tensor,  # (N, d)
    more: Tensor | None,  # (N, d); None: 0
    weight: Tensor,  # (d,)
    eps: float,
) -> Tensor:  # (N, d)
    """The gradient of x, and `more`."""
    gradient, x, out = _rows(gradient), _rows(x), x.new_empty(x.shape)
    more = None if more is None else _rows(more)
    if x.numel():
        _rms_norm_backward[(len(x),)](
            gradient,
            x,
            more,
            weight.contiguous(),
            out,
            gradient.stride(0),
            x.stride(0),
            0 if more is None else more.stride(0),
            x.shape[1],
            eps,
            **_row_launch(x),
        )
    return out


def swiglu(
    gate: Tensor,  # (N, h)
    up: Tensor,  # (N, h)
) -> Tensor:  # (N, h)
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if gate.numel():
        _swiglu[_blocks(gate)](gate, up, out, gate.numel(), **_FLAT)
    return out


def swiglu_backward(
    gradient: Tensor,  # (N, h) of the result; overwritten
    gate: Tensor,  # (N, h)
    up: Tensor,  # (N, h)
) -> tuple[Tensor, Tensor, Tensor]:  # (N, h) of gate, of up, and the result again
    """The gradients of gate and up, and silu(gate) * up."""
    gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
    of_gate, out = torch.empty_like(gate), torch.empty_like(gate)
    if gate.numel():
        _swiglu_backward[_blocks(gate)](gradient, gate, up, of_gate, out, gate.numel(), **_FLAT)
    return of_gate, gradient, out


def drop(
    x: Tensor,  # (N, d)
    probability: float,
    seed: int,
    total: Tensor | None = None,  # (N, d), contiguous; overwritten
) -> Tensor:  # (N, d)
    """Dropout with the mask that `LoraLinear` defines, added to the total in place if there is one."""
    x = x.contiguous()
    out = torch.empty_like(x) if total is None else total
    if x.numel():
        threshold, scale = int(probability * 2.0**32), 1 / (1 - probability)
        _drop[_blocks(x)](x, total, out, x.numel(), seed, threshold, scale, **_FLAT)
    return out


def rotary(
    x: Tensor,  # (B, H, T, D)
    cos: Tensor,  # (B or 1, 1, T, D)
    sin: Tensor,  # (B or 1, 1, T, D)
    transposed: bool = False,
) -> Tensor:  # (B, H, T, D), with the strides of x if these have no gaps
    """The rotary embedding, or its transpose."""
    batch, heads, length, width = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _rotary[(batch * length, -(-heads // _HEADS))](
            x,
            cos.contiguous(),
            sin.contiguous(),
            out,
            *x.stride()[:3],
            *out.stride()[:3],
            0 if len(cos) == 1 else length * width,
            heads,
            length,
            width // 2,
            TRANSPOSED=transposed,
            COLUMNS=_power_of_2(width // 2),
            BLOCK_H=_HEADS,
            num_warps=4,
            **LAUNCH,
        )
    return out


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _row_launch(x: Tensor) -> dict[str, Any]:
    columns = _power_of_2(x.shape[1])
    return {"BLOCK": columns, "num_warps": min(max(columns // _WARP_COLUMNS, 1), 16), **LAUNCH}


_FLAT = {"BLOCK": _BLOCK, "num_warps": 8, **LAUNCH}


def _blocks(x: Tensor) -> tuple[int]:
    return (-(-x.numel() // _BLOCK),)


def _power_of_2(n: int) -> int:  # at least n, which is at least 1
    return 1 << (n - 1).bit_length()
