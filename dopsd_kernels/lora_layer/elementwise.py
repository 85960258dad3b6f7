"""What a layer computes between its matrix products: by Triton kernels on a GPU, else in plain PyTorch.

In fp32 inside (fp64 for fp64), with one rounding at the end; PyTorch's SwiGLU of 16 bits has one after each operation.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..common.backends import choose_backend
from ..common.philox import philox
from ..common.products import compute_dtype

# Counters whose words are computed together: 8 MiB for one number of each, of which six are in use.
_COUNTERS = 1 << 20
# Columns of a row that a program's registers hold.
_WIDEST = 1 << 14


def rms_norm(
    x: Tensor,  # (N, d)
    weight: Tensor,  # (d,)
    eps: float,
    dtype: torch.dtype,
) -> Tensor:  # (N, d) in dtype
    """x / sqrt(mean(x^2) + eps) * weight."""
    if (kernels := _kernels(x, weight, width=x.shape[1])) is not None:
        return kernels.rms_norm(x, weight, eps, dtype)
    wide = compute_dtype(x)
    if x.dtype == wide:
        normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt_()
    else:
        normed = x.to(wide)
        normed *= (normed.square().mean(-1, keepdim=True) + eps).rsqrt_()
    return normed.mul_(weight).to(dtype)


def rms_norm_backward(
    gradient: Tensor,  # (N, d) of the result
    x: Tensor,  # (N, d)
    more: Tensor | None,  # (N, d), what else is x' gradient; None: 0
    weight: Tensor,  # (d,)
    eps: float,
) -> Tensor:  # (N, d)
    """With n = x / rms: (g w - n mean(g w n)) / rms, and `more`."""
    if (kernels := _kernels(gradient, x, weight, more, width=x.shape[1])) is not None:
        return kernels.rms_norm_backward(gradient, x, more, weight, eps)
    wide = compute_dtype(x)
    h = x.to(wide)
    inverse = (h.square().mean(-1, keepdim=True) + eps).rsqrt_()
    scaled = gradient * weight.to(wide)
    along = (scaled * h).mean(-1, keepdim=True).mul_(inverse.square())
    total = scaled.addcmul_(h, along, value=-1).mul_(inverse)
    return (total if more is None else total.add_(more)).to(x.dtype)


def swiglu(
    gate: Tensor,  # (N, h)
    up: Tensor,  # (N, h)
) -> Tensor:  # (N, h)
    """silu(gate) * up."""
    if (kernels := _kernels(gate, up)) is not None:
        return kernels.swiglu(gate, up)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_backward(
    gradient: Tensor,  # (N, h) of the result; overwritten
    gate: Tensor,  # (N, h)
    up: Tensor,  # (N, h)
) -> tuple[Tensor, Tensor, Tensor]:  # (N, h) of gate, of up, and the result again
    """With s = sigmoid(gate): g up s (1 + gate (1 - s)), g gate s, and gate s up."""
    if (kernels := _kernels(gradient, gate, up)) is not None:
        return kernels.swiglu_backward(gradient, gate, up)
    of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
    silu = torch.nn.functional.silu(gate)
    return of_gate, gradient.mul_(silu), silu.mul_(up)


def drop(
    x: Tensor,  # (N, d)
    probability: float,
    seed: int,
    total: Tensor | None = None,  # (N, d), contiguous; overwritten
) -> Tensor:  # (N, d)
    """Dropout with the mask that `LoraLinear` defines; linear, and its own transpose. A total is added, in place."""
    if (kernels := _kernels(x, total)) is not None:
        return kernels.drop(x, probability, seed, total)
    if isinstance(x, FakeTensor):  # shapes alone: what a kernel writes, and not the words of PyTorch's way on a CPU
        return x.clone() if total is None else total.add_(x)
    dropped = (x * _kept(x.numel(), probability, seed, x.device).view(x.shape)).mul_(1 / (1 - probability))
    return dropped if total is None else total.add_(dropped)


def _kept(count: int, probability: float, seed: int, device: torch.device) -> Tensor:  # (count,) bool
    """Which of so many entries stay."""
    # As unsigned numbers: flipping the highest bit of both keeps their order as signed ones.
    key, flip = torch.tensor([seed], device=device), torch.tensor(-(2**31), dtype=torch.int32, device=device)
    threshold, counters = int(probability * 2.0**32) - 2**31, (count + 3) // 4
    parts = [
        philox(key, torch.arange(begin, min(begin + _COUNTERS, counters), device=device)).bitwise_xor_(flip)
        >= threshold
        for begin in range(0, counters, _COUNTERS)
    ]
    return torch.cat([part.flatten() for part in parts] or [key.bool()[:0]])[:count]


def rotary(
    x: Tensor,  # (B, H, T, D)
    cos: Tensor,  # (B or 1, 1, T, D)
    sin: Tensor,  # (B or 1, 1, T, D)
    transposed: bool = False,
) -> Tensor:  # (B, H, T, D)
    """x cos + (-x2, x1) sin with the halves x1 and x2 of x along D; or, for a gradient, the transpose of that map."""
    if (kernels := _kernels(x, cos, sin)) is not None:
        return kernels.rotary(x, cos, sin, transposed)
    wide, half = x.to(compute_dtype(x)), x.shape[-1] // 2
    (first, second), (low, high) = wide.tensor_split(2, -1), sin.tensor_split(2, -1)
    turned = wide * cos
    if transposed:
        low, high = -high, -low
    turned[..., :half].addcmul_(second, low, value=-1)
    turned[..., half:].addcmul_(first, high)
    return turned.to(x.dtype)


def _kernels(*tensors: Tensor | None, width: int = 0) -> Any:
    """The Triton kernels if they take these tensors, with rows of so many columns; else None."""
    also = f"the kernels take rows of up to {_WIDEST} columns, but not {width}" if width > _WIDEST else None
    if choose_backend("auto", tensors, also) == "torch":
        return None
    from . import kernels

    return kernels
