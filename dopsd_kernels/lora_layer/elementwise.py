"""What a layer computes between its matrix products; all in fp32 inside (fp64 for fp64), one rounding at the end."""

import torch
from torch import Tensor

from ..common.products import compute_dtype
from ..confidence.gumbel import philox


def rms_norm(
    x: Tensor,  # (N, d)
    weight: Tensor,  # (d,)
    eps: float,
    dtype: torch.dtype,
) -> Tensor:  # (N, d) in dtype
    """x / sqrt(mean(x^2) + eps) * weight."""
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
    weight: Tensor,  # (d,)
    eps: float,
) -> Tensor:  # (N, d), fp32 or fp64
    """With n = x / rms: (g w - n mean(g w n)) / rms."""
    wide = compute_dtype(x)
    x = x.to(wide)
    inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt_()
    scaled = gradient * weight.to(wide)
    along = (scaled * x).mean(-1, keepdim=True).mul_(inverse.square())
    return scaled.addcmul_(x, along, value=-1).mul_(inverse)


def swiglu(
    gate: Tensor,  # (N, h)
    up: Tensor,  # (N, h)
) -> Tensor:  # (N, h)
    """silu(gate) * up."""
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_backward(
    gradient: Tensor,  # (N, h) of the result
    gate: Tensor,  # (N, h)
    up: Tensor,  # (N, h)
) -> tuple[Tensor, Tensor, Tensor]:  # (N, h) of gate, of up, and the result again
    """With s = sigmoid(gate): g up s (1 + gate (1 - s)), g gate s, and gate s up."""
    of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
    silu = torch.nn.functional.silu(gate)
    return of_gate, gradient.mul_(silu), silu.mul_(up)


def drop(
    x: Tensor,  # (N, d)
    probability: float,
    seed: int,
) -> Tensor:  # (N, d)
    """Dropout with the mask that `LoraLinear` defines; linear, and its own transpose."""
    counters = torch.arange((x.numel() + 3) // 4, device=x.device)
    words = philox(torch.tensor([seed], device=x.device), counters).flatten()[: x.numel()].view(x.shape)
    # As unsigned numbers: flipping the highest bit of both keeps their order as signed ones.
    threshold = int(probability * 2.0**32) - 2**31
    kept = words.bitwise_xor_(torch.tensor(-(2**31), dtype=torch.int32, device=x.device)) >= threshold
    return (x * kept).mul_(1 / (1 - probability))
