"""fused_token_logprob: log-probabilities of given tokens from hidden states, without the logits."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.arguments import check_bias, check_device, check_head, check_integer, check_number, check_settings
from ..common.head import whole
from .contracts import TokenLogprob, TokenLogprobOptions
from .operators import TokenLogprobFunction


def fused_token_logprob(
    hidden: Tensor,  # (..., d)
    weight: Tensor,  # (V, d)
    tokens: Tensor,  # (...) or (..., m) int64
    *,
    bias: Tensor | None = None,  # (V,)
    exclude: Sequence[int] = (),
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    check_finite: bool = False,
    backend: str = "auto",
) -> TokenLogprob:
    """Compute log p(token) of given tokens, and the entropy of p, from hidden states.

    p is the softmax of (hidden @ weight.T + bias) / temperature. Cross-entropy is the negative of `logprob`; policy
    gradients, ELBO estimates and entropy bonuses are sums of the outputs with whatever factors, for each entry may have
    its own upstream gradient.

    The logits never exist as a whole: rows are processed in chunks that fit in `workspace_bytes`. The forward pass
    takes one product with the weight for each row, however many of its tokens are asked for, and keeps a few numbers
    per row. The backward pass takes the product again, and one more for each gradient, for the rows that have an
    upstream gradient other than 0; others enter no product. Logits, sums and outputs are in the compute dtype, fp64 for
    fp64 `hidden` and else fp32. On a GPU, hidden states and weight of one 16-bit dtype are multiplied as they are, into
    fp32 logits, and the logits' gradient is rounded to that dtype once; else, tensors of other dtypes are converted,
    weights in tiles. Autocast has no effect inside. There is no second derivative.

    Args:
        hidden: (..., d), fp16, bf16, fp32 or fp64. Gets a gradient if it requires one.
        weight: (V, d), the LM head; one that FSDP2 has sharded is gathered. Gets a gradient, accumulated in the
            compute dtype, if it requires one.
        tokens: int64 ids, the leading dimensions or those and one more, m: each row's tokens, of which any may be
            equal, and m may be 0.
        bias: (V,), entries may be -inf. Gets a gradient if it requires one.
        exclude: ids that have no probability, such as that of a mask: the softmax is over the others.
        temperature: divides the logits, > 0.
        workspace_bytes: limit of the tensors that exist at once beside inputs, outputs and gradients. Buffers of the
            allocator and of the matrix products come on top. None: 64 MiB, on a GPU 256 MiB.
        vocab_group: a process group over which the vocabulary is sharded, as in tensor parallelism: each process gives
            its consecutive rows of the weight and bias, in rank order, and the same hidden states, tokens and options,
            whose ids are those of the whole vocabulary. Outputs and the gradient of `hidden` are the whole
            vocabulary's, on every process. Only numbers per row are exchanged, and that gradient.
        check_finite: look for NaN and infinities in all inputs first, and for bad tokens. That reads each once, and
            waits for a GPU.
        backend: "torch", or "triton" for the kernels, which need a GPU and fp16, bf16 or fp32. "auto" takes the
            kernels where they can be used.

    Returns:
        TokenLogprob: `logprob` in the shape of `tokens`, and the `entropy` of p in nats in the leading dimensions.
        A token whose bias is -inf has the log-probability -inf. NaN stays in its row.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range, or `backend` is "triton" and
            the kernels cannot be used. A token outside of the vocabulary, or excluded, is an error on a CPU and with
            `check_finite`; else, for nothing waits for the GPU, its log-probability is NaN, or -inf if excluded.
    """
    weight, bias = whole(weight), None if bias is None else whole(bias)
    check_head("hidden", hidden, "weight", weight)
    leading, device, vocab = hidden.shape[:-1], hidden.device, weight.shape[0]
    check_device("weight", weight, device)
    check_bias("bias", bias, vocab, device)
    _check_tokens(tokens, leading, device)
    check_number("temperature", temperature, 0, above=True)
    for token in exclude:
        # How many columns the other processes of a group hold is known only later.
        check_integer("exclude", token, 0, vocab - 1 if vocab_group is None else 1 << 62)
    settings = check_settings(workspace_bytes, vocab_group, check_finite, backend, device)
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias))
    logprob, entropy = TokenLogprobFunction.apply(
        hidden.reshape(-1, weight.shape[1]),
        weight,
        bias,
        tokens.reshape(leading.numel(), tokens.shape[-1] if tokens.dim() > len(leading) else 1),
        needs,
        TokenLogprobOptions(sorted(set(exclude)), temperature),
        settings,
    )
    return TokenLogprob(logprob.reshape(tokens.shape), entropy.reshape(leading))


def _check_tokens(tokens: Any, leading: torch.Size, device: torch.device) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a torch.Tensor, but is a {type(tokens).__name__}.")
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be int64, but is {tokens.dtype}.")
    if leading not in (tokens.shape, tokens.shape[:-1]):
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}, but must have {tuple(leading)}, or that and the tokens of a row."
        )
    check_device("tokens", tokens, device)
