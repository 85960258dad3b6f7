"""The passes of fused_token_logprob over a block of logits, in plain PyTorch."""

import torch
from torch import Tensor

# exp is 0 from here down in every dtype; -inf, which times 0 would be NaN, is raised to it.
LOWEST = -1e4
# On a CPU, passes over what its cache holds take a third of the time.
_CPU_BLOCK_BYTES = 1 << 20


def block_rows(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many rows' logits the passes should go over at a time."""
    return max(1, _CPU_BLOCK_BYTES // (dtype.itemsize * vocab)) if device.type == "cpu" else 1 << 30


def row_bytes(vocab: int, dtype: torch.dtype) -> int:
    """Return the memory that a pass needs per row, beside the logits."""
    return dtype.itemsize * vocab


def statistics(
    z: Tensor,  # (R, V) fp32 or fp64; overwritten
    bias: Tensor | None,  # (V,)
    inverse_temperature: float,
) -> Tensor:
    """Return peak, sum of exp(x - peak) and sum of exp(x - peak) (x - peak) as (3, R), of x = (z + bias) / T."""
    _scale(z, bias, inverse_temperature)
    peak = z.amax(-1)
    y = z.sub_(peak.clamp(min=torch.finfo(z.dtype).min)[:, None]).clamp_(min=LOWEST)
    exponentials = y.exp()
    total = exponentials.sum(-1)
    return torch.stack([peak, total, exponentials.mul_(y).sum(-1)])


def logit_gradient(
    z: Tensor,  # (R, V) fp32 or fp64; overwritten
    bias: Tensor | None,  # (V,)
    inverse_temperature: float,
    peak: Tensor,  # (R,)
    factor: Tensor,  # (R,)
    slope: Tensor | None,  # (R,); None: 0
    columns: Tensor,  # (R, m) int64
    upstream: Tensor,  # (R, m)
    gradient: Tensor,  # (R, V), written; z, or its memory row by row
) -> None:
    """Write exp(x - peak) (factor + slope (x - peak)), and add to each column what is upstream of it."""
    _scale(z, bias, inverse_temperature)
    y = z.sub_(peak[:, None])
    if slope is None:
        y.exp_().mul_(factor[:, None])
    else:
        exponentials = y.clamp_(min=LOWEST).exp()
        y.mul_(slope[:, None]).add_(factor[:, None]).mul_(exponentials)
    y.scatter_add_(1, columns, upstream)
    if gradient is not z:
        gradient.copy_(y.to(gradient.dtype))


def _scale(z: Tensor, bias: Tensor | None, inverse_temperature: float) -> None:
    if bias is not None:
        z.add_(bias)
    if inverse_temperature != 1:
        z.mul_(inverse_temperature)
