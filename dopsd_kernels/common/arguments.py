"""Checks of arguments that the public ops share; each raises one sentence that names the argument."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .workspace import CPU_BYTES, GPU_BYTES

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(name: str, tensor: Any) -> None:
    """Require a tensor of fp16, bf16, fp32 or fp64."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but is a {type(tensor).__name__}.")
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, but is {tensor.dtype}.")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], why: str) -> None:
    """Require an exact shape."""
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but must have {tuple(shape)}: {why}.")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Require the device of the first argument."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but must be on {device} like the other tensors.")


def check_head(hidden_name: str, hidden: Any, weight_name: str, weight: Any) -> None:
    """Require hidden (..., d) and weight (V, d) with V and d of at least 1."""
    check_floating(hidden_name, hidden)
    check_floating(weight_name, weight)
    if hidden.dim() == 0:
        raise ValueError(f"{hidden_name} is a scalar, but must have shape (..., d).")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{weight_name} has shape {tuple(weight.shape)}, but must have (V, d) with V, d >= 1.")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name} has width {hidden.shape[-1]}, but {weight_name} needs width {weight.shape[1]}."
        )


def check_bias(name: str, bias: Any, vocab: int, device: torch.device) -> None:
    """Require None or a floating (V,) tensor."""
    if bias is None:
        return
    check_floating(name, bias)
    check_shape(name, bias, (vocab,), "one entry per row of the weight")
    check_device(name, bias, device)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Require one of several strings."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, choices))}.")


def check_number(name: str, value: Any, low: float, *, above: bool = False, high: float = math.inf) -> None:
    """Require a finite number in [low, high), or in (low, high) with `above`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, but is a {type(value).__name__}.")
    # Comparisons alone: torch.compile cannot trace isfinite of a number that changes between calls. NaN fails both.
    if not (value < high and (value > low if above else value >= low)):
        interval = f"{'above' if above else 'at least'} {low}" + ("" if high == math.inf else f" and below {high}")
        raise ValueError(f"{name} is {value}, but must be finite, {interval}.")


def check_integer(name: str, value: Any, low: int, high: int) -> None:
    """Require an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, but is a {type(value).__name__}.")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, but must be between {low} and {high}.")


def check_settings(
    workspace_bytes: int | None,
    vocab_group: dist.ProcessGroup | None,
    check_finite: bool,
    backend: str,
    device: torch.device,
) -> tuple[int, str | None, bool, str]:
    """Check what defines how an op is computed, and return it in the order of the operators."""
    if workspace_bytes is None:
        workspace_bytes = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    check_integer("workspace_bytes", workspace_bytes, 1, 1 << 62)
    check_choice("backend", backend, ("auto", "triton", "torch"))
    if not isinstance(check_finite, bool):
        raise TypeError(f"check_finite must be a bool, but is a {type(check_finite).__name__}.")
    if vocab_group is not None and not isinstance(vocab_group, dist.ProcessGroup):
        raise TypeError(f"vocab_group must be a torch.distributed.ProcessGroup, but is a {type(vocab_group).__name__}.")
    return workspace_bytes, None if vocab_group is None else vocab_group.group_name, check_finite, backend


def check_entries(**tensors: Tensor | None) -> None:
    """Require finite entries; of a bias, -inf is one."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.numel() == 0:
            continue
        low, high = tensor.aminmax()  # NaN if there is one; and no mask as large as the tensor
        if not bool(high.isfinite() & (low.isfinite() if "bias" not in name else True)):
            raise ValueError(f"{name} has {'+inf' if 'bias' in name else 'infinite'} or NaN entries.")
