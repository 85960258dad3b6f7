"""What the layers' ops are given of a linear layer, and the checks of it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.arguments import check_device, check_floating, check_number, check_shape


class LoraLinear(NamedTuple):
    """A frozen linear layer with an adapter, or without: x W^T + bias + scale dropout(x) A^T B^T.

    Args:
        weight: W (out, in), without a gradient; or what returns it, called once in each pass, of a layer that stores
            its weight in another form (quantised, sharded).
        bias: (out,), without a gradient; None: 0.
        lora_a: A (r, in); None: no adapter.
        lora_b: B (out, r).
        scale: of the adapter's product.
        dropout: probability with which an entry of the adapter's input is 0; the others are divided by 1 - dropout.
        seed: of the dropout: entry i of the flattened input falls out if word i % 4 of the Philox4x32-10 counter i // 4
            with this key is below dropout 2^32.
    """

    weight: Tensor | Callable[[], Tensor]
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    seed: int = 0

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """(out, in) in the dtype of the products."""
        weight = self.weight if isinstance(self.weight, Tensor) else self.weight()
        return weight.to(dtype)


def check_linear(name: str, linear: LoraLinear, x: Tensor) -> None:
    """Require a layer for the width of ``x`` (..., in), with both matrices of an adapter or none, on its device."""
    weight, bias, a, b, _, dropout, _ = linear
    width = x.shape[-1]
    if isinstance(weight, Tensor):
        check_floating(f"{name}.weight", weight)
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(f"{name}.weight has shape {tuple(weight.shape)}, but must have (out, {width}).")
        check_device(f"{name}.weight", weight, x.device)
        if weight.requires_grad:
            raise ValueError(f"{name}.weight requires a gradient, but only adapters get one here.")
    if bias is not None and bias.requires_grad:
        raise ValueError(f"{name}.bias requires a gradient, but only adapters get one here.")
    if (a is None) != (b is None):
        raise ValueError(f"{name} has one of lora_a and lora_b, but must have both or none.")
    if a is None or b is None:
        return
    for part, tensor in (("lora_a", a), ("lora_b", b)):
        check_floating(f"{name}.{part}", tensor)
        check_device(f"{name}.{part}", tensor, x.device)
        if tensor.dim() != 2:
            raise ValueError(f"{name}.{part} has shape {tuple(tensor.shape)}, but must have two dimensions.")
    check_shape(f"{name}.lora_a", a, (b.shape[1], width), "the rank of lora_b and the width of the input")
    if isinstance(weight, Tensor):
        check_shape(f"{name}.lora_b", b, (weight.shape[0], a.shape[0]), "a row for each output and the rank of lora_a")
    check_number(f"{name}.dropout", dropout, 0.0, high=1.0)


def check_norm(norm: tuple[Tensor, float] | None, x: Tensor) -> None:
    """Require None, or a weight (in,) without a gradient and what is added to the mean of squares."""
    if norm is None:
        return
    weight, eps = norm
    check_floating("norm[0]", weight)
    check_shape("norm[0]", weight, x.shape[-1:], "one entry per column of x")
    check_device("norm[0]", weight, x.device)
    check_number("norm[1]", eps, 0.0)
    if weight.requires_grad:
        raise ValueError("norm[0] requires a gradient, but only adapters get one here.")


def adapters_of(linears: Sequence[LoraLinear]) -> list[Tensor]:
    """A and B of each layer that has them, in order."""
    return [x for linear in linears for x in (linear.lora_a, linear.lora_b) if x is not None]
