"""The layers' ops: arguments are checked and flattened here.

torch.compile leaves them as they are: a weight may be any function, the products are library calls, and what is between
them is in kernels already.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.arguments import check_device, check_floating, check_shape
from ..common.backends import untraced
from .contracts import LoraLinear, adapters_of, check_linear, check_norm
from .functions import Project, Rotary, SwiGLU


def lora_linears(
    x: Tensor,
    linears: Sequence[LoraLinear],
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Linear layers of one input with their adapters, behind a norm if there is one, with a residual if there is one.

    With n = x / sqrt(mean(x^2) + eps) * weight, or n = x without a norm, each layer gives
    n W^T + bias + scale dropout(n) A^T B^T (LoRA, Hu et al. 2021); the residual is added to the last one's.

    For the backward pass x and the products with A are kept, and nothing else; the norm, the dropout and W in ``dtype``
    are computed again. Only x, the residual and adapters have gradients.

    Args:
        x: (..., d), fp16, bf16, fp32 or fp64.
        linears: at least one.
        norm: weight (d,) and eps.
        residual: (..., out) of the last layer.
        dtype: of the products; None for that of x.

    Returns:
        (..., out) of each layer in ``dtype``; with the residual, in what the two promote to.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, or a frozen one that requires a gradient.
    """
    dtype = _check(x, linears, norm, dtype)
    if not linears:
        raise ValueError("linears is empty, but must hold at least one layer.")
    flat, rest = x.reshape(-1, x.shape[-1]), None
    if residual is not None:
        check_floating("residual", residual)
        check_device("residual", residual, x.device)
        check_shape("residual", residual[..., :0], (*x.shape[:-1], 0), "a row for each of x")
        rest = residual.reshape(-1, residual.shape[-1])
    outputs = untraced(Project.apply)(flat, rest, norm, tuple(linears), dtype, *adapters_of(linears))
    return tuple(output.view(*x.shape[:-1], output.shape[-1]) for output in outputs)


def lora_swiglu(
    x: Tensor,
    gate: LoraLinear,
    up: LoraLinear,
    down: LoraLinear,
    *,
    norm: tuple[Tensor, float] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x + down(silu(gate(n)) * up(n)), with n and the layers as in :func:`lora_linears` (SwiGLU, Shazeer 2020).

    For the backward pass x, what gate and up give, and the products with A are kept.

    Args:
        x: (..., d), fp16, bf16, fp32 or fp64.
        gate, up: from width d to a common one, h.
        down: from width h to d.
        norm, dtype: as in :func:`lora_linears`.

    Returns:
        (..., d), in what the dtypes of x and of the products promote to.

    Raises:
        TypeError, ValueError: as :func:`lora_linears`.
    """
    dtype = _check(x, (gate, up), norm, dtype)
    linears = (gate, up, down)
    output: Tensor = untraced(SwiGLU.apply)(x.reshape(-1, x.shape[-1]), norm, linears, dtype, *adapters_of(linears))
    return output.view(x.shape)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, norm: tuple[Tensor, float] | None = None) -> Tensor:
    """Rotary embedding: n cos + (-n2, n1) sin with the halves n1 and n2 of n along D (RoFormer, Su et al. 2021).

    Here n = x, or with a norm x / sqrt(mean(x^2) + eps) * weight of each head (Qwen3's queries and keys).

    Only the tables are kept for the backward pass, and x if there is a norm; only x has a gradient.

    Args:
        x: (B, H, T, D) with an even D, fp16, bf16, fp32 or fp64; computed in fp32, of fp64 in fp64.
        cos, sin: (B or 1, 1, T, D).
        norm: weight (D,) and eps; n is rounded to the dtype of x.

    Returns:
        (B, H, T, D) in the dtype of x, with its strides if these leave no gaps.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, or a table that requires a gradient.
    """
    check_floating("x", x)
    if x.dim() != 4 or x.shape[3] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must have (B, H, T, D) with an even D.")
    for name, table in (("cos", cos), ("sin", sin)):
        check_floating(name, table)
        check_device(name, table, x.device)
        batch = 1 if table.shape[:1] == (1,) else len(x)
        check_shape(name, table, (batch, 1, *x.shape[2:]), "a row for each token of each sequence, or of all")
        if table.requires_grad:
            raise ValueError(f"{name} requires a gradient, but only x gets one here.")
    check_norm(norm, x)
    rotated: Tensor = untraced(Rotary.apply)(x, cos, sin, norm)
    return rotated


def _check(
    x: Tensor, linears: Sequence[LoraLinear], norm: tuple[Tensor, float] | None, dtype: torch.dtype | None
) -> torch.dtype:
    """Check what both ops share, and return the dtype of the products."""
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x is a scalar, but must have shape (..., d).")
    for number, linear in enumerate(linears):
        check_linear(f"linears[{number}]", linear, x)
    check_norm(norm, x)
    return x.dtype if dtype is None else dtype
