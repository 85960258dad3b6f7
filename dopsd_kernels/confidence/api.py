"""fused_confidence: what a decoder needs to know of an LM head's distribution, without its logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..common.arguments import (
    check_bias,
    check_choice,
    check_device,
    check_head,
    check_integer,
    check_number,
    check_shape,
)
from ..common.backends import as_traced, choose_backend
from ..common.products import compute_dtype
from . import chunked
from .contracts import ConfidenceOutput

# The largest top_k of the Triton kernels, which keep that many entries of a row in registers.
_MAX_TRITON_TOP_K = 128


def fused_confidence(
    hidden: Tensor,  # (..., d)
    weight: Tensor,  # (V, d)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 0.0,
    seed: int | Tensor | None = None,  # one, or (...,) int64
    top_k: int = 0,
    exclude: Sequence[int] = (),
    entropy: bool = False,
    backend: str = "auto",
) -> ConfidenceOutput:
    """Choose a token per row, and measure the head's confidence, without materialising the logits.

    The logits hidden @ weight.T + bias are computed tile by tile in fp32, or in fp64 for fp64 `hidden`;
    tensors of other dtypes are converted, weights tile by tile. Nothing has a gradient, and autocast has no
    effect inside.

    At temperature 0 the token is the argmax, ties to the lowest id. Above, it is the argmax of
    logit / temperature + Gumbel noise, that is a sample from softmax(logits / temperature). The noise is a
    function of the row's seed and the column alone (Philox4x32-10 with the seed as key and counter (column //
    4, 0, 0, 0), output word column % 4; uniform u = (word + 0.5) / 2**32, noise -log(-log1p(-u))), so that a
    row's sample does not depend on which other rows are computed with it.

    Beside inputs and outputs plain PyTorch needs at most 24 MiB (48 in fp64), up to 80 (112) for a sample of logits
    that are about equal, and with a `top_k` six times that of 1024 rows. The kernels need 28 bytes, and 8 for each of
    `top_k` rounded up to a power of 2, per row and part that the vocabulary is cut into: at most 8, or as many as all
    programs that run at once give each row.

    Args:
        hidden: (..., d), fp16, bf16, fp32 or fp64.
        weight: (V, d), the LM head.
        bias: (V,), entries may be -inf.
        temperature: at least 0.
        seed: required above temperature 0, ignored at 0. An int64 tensor of the leading dimensions holds one
            seed per row. With one integer, row i of the flattened rows has the seed + i.
        top_k: how many of the largest logits to return, at most the number of ids that can be chosen.
        exclude: ids that cannot be chosen. Their logits are -inf everywhere: no output counts them.
        entropy: whether to return the entropy of softmax(logits).
        backend: "auto" is "triton" on a GPU that there are kernels for, and "torch" elsewhere, for fp64 and for
            `top_k` above 128. "triton" raises where it cannot run. Both give the same ids, up to rounding of
            logits (and of scores, about 1e-6) that are nearly equal.

    Returns:
        ConfidenceOutput: the `token` with its `logit`; the `logsumexp`, `max_logit` and `argmax` of all
        logits; the `top_values` and `top_indices` (..., top_k), largest first, ties to the lowest id; and the
        `entropy` in nats, (..., 0) unless asked for. Logits are not divided by the temperature: the token's
        probability at temperature 1 is exp(logit - logsumexp), and the entropy is at temperature 1 too.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range, or `backend` is "triton"
            and cannot run.
    """
    check_head("hidden", hidden, "weight", weight)
    leading, device, vocab = hidden.shape[:-1], hidden.device, weight.shape[0]
    check_device("weight", weight, device)
    check_bias("bias", bias, vocab, device)
    check_number("temperature", temperature, 0)
    check_choice("backend", backend, ("auto", "triton", "torch"))
    for token in exclude:
        check_integer("exclude", token, 0, vocab - 1)
    excluded = sorted(set(exclude))
    if len(excluded) == vocab:
        raise ValueError(f"exclude holds all {vocab} ids, but must leave one that can be chosen.")
    check_integer("top_k", top_k, 0, vocab - len(excluded))
    if not isinstance(entropy, bool):
        raise TypeError(f"entropy must be a bool, but is a {type(entropy).__name__}.")
    seeds = _row_seeds(seed, leading, device) if temperature > 0 else None

    rows = hidden.reshape(-1, weight.shape[1])
    call = (rows, weight, bias, temperature, seeds, top_k, excluded, entropy, backend)
    with torch.no_grad():
        output = ConfidenceOutput(*as_traced(_confidence_operator, _confidence)(*call))
    if seeds is None:
        output = output._replace(token=output.argmax, logit=output.max_logit)
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


def _confidence(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    temperature: float,
    seed: Tensor | None,  # (N,) int64; None at temperature 0
    top_k: int,
    exclude: list[int],
    entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of `ConfidenceOutput`; without a seed, `token` and `logit` have no entries.

    An operator may not return one tensor twice.
    """
    also = f"top_k is above {_MAX_TRITON_TOP_K}" if top_k > _MAX_TRITON_TOP_K else None
    if choose_backend(backend, (hidden, weight, bias), also) == "triton":
        from .kernels import confidence

        output = _empty_output(hidden, seed, top_k, entropy)
        confidence(output, hidden, weight, bias, temperature, seed, top_k, exclude, entropy)
        return output
    ids = torch.tensor(exclude, device=hidden.device) if exclude else None
    with torch.autocast(hidden.device.type, enabled=False):
        output = chunked.confidence(hidden, weight, bias, temperature, seed, top_k, ids, entropy)
    if seed is not None:
        return output
    return output._replace(token=output.argmax.new_empty(0), logit=output.max_logit.new_empty(0))


def _empty_output(
    hidden: Tensor,  # (N, d)
    seed: Tensor | None,  # (N,)
    top_k: int,
    entropy: bool,
) -> ConfidenceOutput:
    """Return outputs to be written."""
    dtype = compute_dtype(hidden)
    count = hidden.shape[0]
    sampled = 0 if seed is None else count

    def ids(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.int64)

    def logits(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    return ConfidenceOutput(
        token=ids(sampled),
        logit=logits(sampled),
        logsumexp=logits(count),
        max_logit=logits(count),
        argmax=ids(count),
        top_values=logits(count, top_k),
        top_indices=ids(count, top_k),
        entropy=logits(count) if entropy else logits(count, 0),
    )


# Opaque to torch.compile, so that what depends on the device (backend, configurations) is decided when it runs.
_confidence_operator = torch.library.custom_op(add_op_namespace_prefix("confidence"), _confidence, mutates_args=())


@_confidence_operator.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    seed: Tensor | None,
    top_k: int,
    exclude: list[int],
    entropy: bool,
    backend: str,
) -> ConfidenceOutput:
    return _empty_output(hidden, seed, top_k, entropy)
