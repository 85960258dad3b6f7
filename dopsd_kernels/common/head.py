"""An LM head and its gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import products
from .vocab_group import VocabGroup

# fp16 knows nothing below 6e-8, and a gradient with respect to logits has many such entries, which a loss scale comes
# too late for. This factor leaves room for entries of 255, a divergence of that many nats.
FP16_BOOST = 256


class Head(NamedTuple):
    """An output layer and what enters it."""

    hidden: Tensor  # (N, d)
    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)


class Gradients(NamedTuple):
    """Gradients of a head; None where none was asked for.

    In fp32, or fp64 for fp64 hidden states; that of bf16 hidden states in bf16, which loses nothing more later.
    """

    hidden: Tensor | None  # (N, d)
    weight: Tensor | None  # (V, d)
    bias: Tensor | None  # (V,)


def gradient_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which the hidden states' gradient is returned."""
    return hidden.dtype if hidden.dtype == torch.bfloat16 else products.compute_dtype(hidden)


def new_gradients(head: Head, needs: tuple[bool, bool, bool]) -> Gradients:
    """Return gradients of 0 of the tensors that need one."""
    dtype, zeros = products.compute_dtype(head.hidden), head.hidden.new_zeros
    return Gradients(
        zeros(head.hidden.shape, dtype=gradient_dtype(head.hidden)) if needs[0] else None,
        zeros(head.weight.shape, dtype=dtype) if needs[1] else None,
        zeros(head.weight.shape[:1], dtype=dtype) if needs[2] else None,
    )


class ChunkedGradients:
    """Writes a head's gradients, from the logits' gradient dz of one chunk of rows after the other.

    dz lacks a factor of each row, which enters on the narrow side of the products.
    """

    def __init__(
        self,
        gradients: Gradients,  # of 0
        head: Head,
        row_scale: Tensor,  # (A,) factor of each computed row
        tile_columns: int,
        group: VocabGroup,
    ) -> None:
        self.gradients, self.head, self.tile_columns, self.group = gradients, head, tile_columns, group
        self.scale = row_scale[:, None]
        # For the weight's gradient that side is rounded to the operands' dtype, in which the factors, perhaps 1 / N and
        # an upstream gradient, would underflow: only their ratios enter, and the largest at the end, for all chunks.
        self.rounded = products.operand_dtype(head.hidden, head.weight) != row_scale.dtype
        tiny = torch.finfo(row_scale.dtype).tiny
        self.largest = row_scale.abs().amax().clamp(min=tiny) if self.rounded else row_scale.new_ones(())

    def add(
        self,
        chunk: slice,  # of the rows that are computed
        places: slice | Tensor,  # where these lie among all
        dz: Tensor,  # (R, V) in the operands' dtype
        hidden: Tensor | None,  # (R, d) as multiplied; only the weight's gradient needs it
    ) -> None:
        """Add a chunk's part."""
        of_hidden, of_weight, of_bias = self.gradients
        scale = self.scale[chunk]
        if of_hidden is not None:
            dh = products.hidden_gradient(dz, self.head.weight, self.tile_columns)
            of_hidden[places] = self.group.sum(dh).mul_(scale).to(of_hidden.dtype)
        if of_weight is not None:
            assert hidden is not None
            products.add_matmul(of_weight, dz.T, (hidden * (scale / self.largest)).to(dz.dtype))
        if of_bias is not None:
            products.add_bias_gradient(of_bias, dz, scale)

    def finish(self) -> Gradients:
        """Return the gradients, after the last chunk."""
        if self.gradients.weight is not None and self.rounded:
            self.gradients.weight.mul_(self.largest)
        return self.gradients


def whole(tensor: Any) -> Any:
    """Gather a parameter that FSDP2 has sharded; its gradient is averaged over the processes, as FSDP2 does."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import Partial

    gathered = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if gathered.requires_grad:
        gathered.register_hook(lambda gradient: gradient / mesh.size())
    return gathered
