"""The operators behind fused_token_logprob, and their gradient.

torch.compile sees two opaque operators, forward and backward: which rows enter the backward's products depends on the
data, and the products are library calls. Eager code calls the same functions directly, so that profilers and counters
of operations see what is inside.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._ops import add_op_namespace_prefix
from ..common.arguments import check_entries, check_integer
from ..common.backends import as_traced, choose_backend, undisturbed
from ..common.head import Head, gradient_dtype
from ..common.products import compute_dtype
from ..common.vocab_group import VocabGroup
from . import chunked
from .contracts import TokenLogprobOptions


def _token_logprob(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    tokens: Tensor,  # (N, m)
    exclude: list[int],
    temperature: float,
    workspace_bytes: int,
    vocab_group: str | None,
    check_finite: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens' log-probabilities (N, m), the entropies (N,), and what the backward needs of a row (2, N)."""
    group = VocabGroup.of(vocab_group, weight.shape[0], hidden.device)
    for token in exclude[-1:]:  # the largest
        check_integer("exclude", token, 0, group.vocab - 1)
    if len(exclude) == group.vocab:
        raise ValueError(f"exclude holds all {group.vocab} ids, but must leave one that has a probability.")
    if check_finite:
        check_entries(hidden=hidden, weight=weight, bias=bias)
    if check_finite or tokens.device.type == "cpu":
        _check_ids(tokens, exclude, group.vocab)
    head, options = Head(hidden, weight, bias), TokenLogprobOptions(exclude, temperature)
    with undisturbed(hidden):
        return chunked.token_logprob(head, tokens, options, workspace_bytes, group, choose_backend(backend, head))


_token_logprob_operator = torch.library.custom_op(
    add_op_namespace_prefix("token_logprob"), _token_logprob, mutates_args=()
)


@_token_logprob_operator.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, count = compute_dtype(hidden), hidden.shape[0]
    shapes = (tokens.shape, (count,), (2, count))
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


def _token_logprob_backward(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    tokens: Tensor,  # (N, m)
    entropy: Tensor,  # (N,)
    normalizers: Tensor,  # (2, N)
    of_logprob: Tensor | None,  # (N, m) upstream gradients; None: 0
    of_entropy: Tensor | None,  # (N,)
    needs: list[bool],  # of hidden, weight and bias
    exclude: list[int],
    temperature: float,
    workspace_bytes: int,
    vocab_group: str | None,
    check_finite: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias; (0,) for one not needed."""
    group = VocabGroup.of(vocab_group, weight.shape[0], hidden.device)
    head, options = Head(hidden, weight, bias), TokenLogprobOptions(exclude, temperature)
    rows = chunked.Rows(tokens, entropy, normalizers, of_logprob, of_entropy)
    wanted = (needs[0], needs[1], needs[2])
    backend = choose_backend(backend, head)
    with undisturbed(hidden):
        gradients = chunked.gradients(head, rows, wanted, options, workspace_bytes, group, backend)
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return d_hidden, d_weight, d_bias


_backward_operator = torch.library.custom_op(
    add_op_namespace_prefix("token_logprob_backward"), _token_logprob_backward, mutates_args=()
)


@_backward_operator.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    entropy: Tensor,
    normalizers: Tensor,
    of_logprob: Tensor | None,
    of_entropy: Tensor | None,
    needs: list[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(hidden)
    return (
        hidden.new_empty(hidden.shape, dtype=gradient_dtype(hidden)) if needs[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape, dtype=dtype) if needs[1] else hidden.new_empty(0),
        weight.new_empty(weight.shape[:1], dtype=dtype) if needs[2] else hidden.new_empty(0),
    )


def _check_ids(tokens: Tensor, exclude: list[int], vocab: int) -> None:
    """Require tokens that have a probability."""
    bad = (tokens < 0) | (tokens >= vocab)
    if exclude:
        bad |= torch.isin(tokens, torch.tensor(exclude, device=tokens.device))
    if bool(bad.any()):
        ids = tokens[bad].unique().tolist()
        named = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
        without = " and not in exclude" if exclude else ""
        raise ValueError(f"tokens holds {named}, but must hold ids from 0 to {vocab - 1}{without}.")


class TokenLogprobFunction(torch.autograd.Function):
    """fused_token_logprob for flattened rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, d)
        weight: Tensor,  # (V, d)
        bias: Tensor | None,  # (V,)
        tokens: Tensor,  # (N, m)
        needs: tuple[bool, bool, bool],
        options: TokenLogprobOptions,
        settings: tuple[Any, ...],  # of the computation
    ) -> tuple[Tensor, Tensor]:
        inputs = (hidden, weight, bias, tokens)
        logprob, entropy, normalizers = as_traced(_token_logprob_operator, _token_logprob)(*inputs, *options, *settings)
        ctx.needs, ctx.options, ctx.settings = needs, options, settings
        ctx.save_for_backward(*inputs, entropy, normalizers)
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = as_traced(_backward_operator, _token_logprob_backward)(
            *ctx.saved_tensors, *upstream, list(ctx.needs), *ctx.options, *ctx.settings
        )
        # Autograd rounds these to the inputs' dtypes: only now, for unscaled fp16 would lose small gradients.
        return *(g if need else None for g, need in zip(grads, ctx.needs, strict=True)), *[None] * 4
