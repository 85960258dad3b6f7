"""fused_confidence: what a decoder needs to know of an LM head's distribution, without its logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dopsd_kernels import chunked_confidence
from dopsd_kernels.arguments import (
    check_backend,
    check_bias,
    check_device,
    check_head,
    check_integer,
    check_number,
    check_shape,
)
from dopsd_kernels.contracts import ConfidenceOutput


def fused_confidence(
    hidden: Tensor,  # (..., d)
    weight: Tensor,  # (V, d)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 0.0,
    seed: int | Tensor | None = None,  # one, or (...,) int64
    top_k: int = 0,
    exclude: Sequence[int] = (),
    backend: str = "auto",
) -> ConfidenceOutput:
    """Choose a token per row, and measure how sure the head is, without materialising the logits.

    The logits hidden @ weight.T + bias are computed tile by tile in fp32, or in fp64 for fp64 `hidden`;
    tensors of other dtypes are converted, weights tile by tile. Nothing has a gradient, and autocast has no
    effect inside.

    At temperature 0 the token is the argmax, ties to the lowest id. Above, it is the argmax of
    logit / temperature + Gumbel noise, that is a sample from softmax(logits / temperature). The noise is a
    function of the row's seed and the column alone (Philox4x32-10 with the seed as key and counter (column //
    4, 0, 0, 0), output word column % 4; uniform u = (word + 0.5) / 2**32, noise -log(-log1p(-u))), so that a
    row's sample does not depend on which other rows are computed with it.

    Args:
        hidden: (..., d), fp16, bf16, fp32 or fp64.
        weight: (V, d), the LM head.
        bias: (V,), entries may be -inf.
        temperature: at least 0.
        seed: required above temperature 0, ignored at 0. An int64 tensor of the leading dimensions holds one
            seed per row. With one integer, row i of the flattened rows has the seed + i.
        top_k: how many of the largest logits to return, at most the number of ids that can be chosen.
        exclude: ids that cannot be chosen. Their logits are -inf everywhere: no output counts them.
        backend: "auto" or "torch". This version has no "triton".

    Returns:
        ConfidenceOutput: the `token` with its `logit`; the `logsumexp`, `max_logit` and `argmax` of all
        logits; the `top_values` and `top_indices` (..., top_k), largest first, ties to the lowest id. Logits
        are not divided by the temperature: the token's probability at temperature 1 is exp(logit -
        logsumexp).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.
        NotImplementedError: `backend` is "triton".
    """
    check_head("hidden", hidden, "weight", weight)
    leading, device, vocab = hidden.shape[:-1], hidden.device, weight.shape[0]
    check_device("weight", weight, device)
    check_bias("bias", bias, vocab, device)
    check_number("temperature", temperature, 0)
    check_backend(backend)
    ids = None
    if len(exclude):
        for token in exclude:
            check_integer("exclude", token, 0, vocab - 1)
        distinct = sorted(set(exclude))
        if len(distinct) == vocab:
            raise ValueError(f"exclude holds all {vocab} ids, but must leave one that can be chosen.")
        ids = torch.tensor(distinct, device=device)
    check_integer("top_k", top_k, 0, vocab if ids is None else vocab - len(ids))
    seeds = _row_seeds(seed, leading, device) if temperature > 0 else None

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        output = chunked_confidence.confidence(
            hidden.reshape(-1, weight.shape[1]), weight, bias, temperature, seeds, top_k, ids
        )
    if len(leading) == 1:
        return output
    return ConfidenceOutput(*(x.reshape(leading + x.shape[1:]) for x in output))


def _row_seeds(seed: int | Tensor | None, leading: torch.Size, device: torch.device) -> Tensor:  # (N,) int64
    if seed is None:
        raise ValueError("seed is None, but a temperature above 0 needs one: an int or an int64 tensor.")
    if not isinstance(seed, Tensor):
        check_integer("seed", seed, -(1 << 63), (1 << 63) - 1)
        return torch.arange(leading.numel(), device=device) + seed
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int or a tensor of int64, but is a tensor of {seed.dtype}.")
    check_shape("seed", seed, leading, "one per row")
    check_device("seed", seed, device)
    return seed.reshape(-1)
