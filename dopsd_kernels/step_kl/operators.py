"""The operators behind fused_step_kl and step_kl_from_logits, and their gradients.

torch.compile sees opaque operators: which rows enter the products depends on the data, and the products are library
calls. Eager code calls the same functions directly, so that profilers and counters of operations see what is inside.
They know nothing of autograd; the two autograd functions around them cost less per call than a registered formula
would, and torch.compile traces through them.
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
from . import chunked, renormalized
from .contracts import StepKLOptions


def _step_kl(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    teacher_hidden: Tensor,  # (N, d_t)
    teacher_weight: Tensor | None,  # (V, d_t); None: `weight`
    teacher_bias: Tensor | None,  # (V,)
    row_weight: Tensor | None,  # (N,)
    upstream: Tensor | None,  # (N,) further factor of each row's gradient, of either sign
    needs: list[bool],  # of hidden, weight and bias
    divergence: str,
    beta: float,
    clip: float | None,
    clip_form: str,
    top_k: int | None,
    tail: str,
    temperature: float,
    mean: bool,  # divide the gradients by the number of rows of non-zero weight
    workspace_bytes: int,
    vocab_group: str | None,
    check_finite: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the row outputs (3, N), and the gradients of the weighted sum of row losses; (0,) for one not needed."""
    if check_finite:
        check_entries(
            student_hidden=hidden,
            weight=weight,
            bias=bias,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
        )
    group = _group(vocab_group, weight.shape[0], hidden.device, top_k)
    student = Head(hidden, weight, bias)
    teacher = Head(teacher_hidden, weight if teacher_weight is None else teacher_weight, teacher_bias)
    rows, scale = _selected_rows(row_weight, upstream, mean, hidden)
    options = StepKLOptions(divergence, beta, clip, clip_form, top_k, tail, temperature)
    backend = choose_backend(backend, (*student, *teacher))
    call = (student, teacher, rows, scale, (needs[0], needs[1], needs[2]), options, workspace_bytes, group)
    with undisturbed(hidden):
        if options.renormalized:
            stats, grads = renormalized.step_kl(*call)
        else:
            stats, grads = chunked.step_kl(*call, backend)
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if g is None else g for g in grads)
    return stats, d_hidden, d_weight, d_bias


_step_kl_operator = torch.library.custom_op(add_op_namespace_prefix("step_kl"), _step_kl, mutates_args=())


@_step_kl_operator.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    row_weight: Tensor | None,
    upstream: Tensor | None,
    needs: list[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(hidden)
    return (
        hidden.new_empty((3, hidden.shape[0]), dtype=dtype),
        hidden.new_empty(hidden.shape, dtype=gradient_dtype(hidden)) if needs[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape, dtype=dtype) if needs[1] else hidden.new_empty(0),
        weight.new_empty(weight.shape[:1], dtype=dtype) if needs[2] else hidden.new_empty(0),
    )


def _step_kl_from_logits(
    student: Tensor,  # (N, V)
    teacher: Tensor,  # (N, V)
    row_weight: Tensor | None,  # (N,)
    upstream: Tensor | None,  # (N,)
    want_grad: bool,
    divergence: str,
    beta: float,
    clip: float | None,
    clip_form: str,
    top_k: int | None,
    tail: str,
    temperature: float,
    mean: bool,
    workspace_bytes: int,
    vocab_group: str | None,
    check_finite: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the row outputs (3, N), and the gradient (N, V) of the weighted sum of row losses, (0,) if not wanted."""
    if check_finite:
        check_entries(student_logits=student, teacher_logits=teacher)
    rows, scale = _selected_rows(row_weight, upstream, mean, student)
    options = StepKLOptions(divergence, beta, clip, clip_form, top_k, tail, temperature)
    backend = choose_backend(backend, (student, teacher))
    group = _group(vocab_group, student.shape[1], student.device, top_k)
    call = (student, teacher, rows, scale, want_grad, options, workspace_bytes, group)
    with undisturbed(student):
        if options.renormalized:
            return renormalized.step_kl_from_logits(*call)
        return chunked.step_kl_from_logits(*call, backend)


_from_logits_operator = torch.library.custom_op(
    add_op_namespace_prefix("step_kl_from_logits"), _step_kl_from_logits, mutates_args=()
)


@_from_logits_operator.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    row_weight: Tensor | None,
    upstream: Tensor | None,
    want_grad: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    stats = student.new_empty((3, student.shape[0]), dtype=compute_dtype(student))
    return stats, student.new_empty(student.shape if want_grad else (0,))


def _group(name: str | None, vocab: int, device: torch.device, top_k: int | None) -> VocabGroup:
    group = VocabGroup.of(name, vocab, device)
    if top_k is not None:
        check_integer("top_k", top_k, 1, group.vocab)
    return group


def _selected_rows(
    row_weight: Tensor | None,  # (N,)
    upstream: Tensor | None,  # (N,)
    mean: bool,
    hidden: Tensor,  # (N, ...)
) -> tuple[Tensor | None, Tensor | None]:
    """Return the rows of non-zero weight (None: all) and the factor of each one's gradient (None: 1)."""
    count, dtype = hidden.shape[0], compute_dtype(hidden)
    rows, scale = None, None
    if upstream is not None:
        scale = upstream.to(dtype) if row_weight is None else upstream.to(dtype) * row_weight.to(dtype)
    elif row_weight is not None:
        if not bool(((row_weight >= 0) & (row_weight < torch.inf)).all()):
            raise ValueError("row_weight has negative, infinite or NaN entries, but must be finite and nonnegative.")
        scale = row_weight.to(dtype)
    if scale is not None:
        rows = scale.nonzero()[:, 0]
        if rows.numel() == count:
            rows = None
        else:
            count, scale = rows.numel(), scale[rows]
    if mean and count:
        scale = hidden.new_ones(count, dtype=dtype) / count if scale is None else scale / count
    return rows, scale


def _reduced(row_loss: Tensor, row_weight: Tensor | None, reduction: str) -> Tensor:
    """Return the loss of the rows' losses (N,)."""
    loss = row_loss.clone() if row_weight is None else row_loss * row_weight.to(row_loss.dtype)
    if reduction == "none":
        return loss
    loss = loss.sum()
    if reduction == "mean":
        # A tensor that is made of a number would wait for a GPU.
        loss = loss / (max(row_loss.numel(), 1) if row_weight is None else (row_weight != 0).sum().clamp(min=1))
    return loss


class StepKL(torch.autograd.Function):
    """fused_step_kl for flattened rows: the gradient is computed in the forward, or for "none" in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, d)
        weight: Tensor,  # (V, d)
        bias: Tensor | None,  # (V,)
        teacher_hidden: Tensor,  # (N, d_t)
        teacher_weight: Tensor | None,  # (V, d_t)
        teacher_bias: Tensor | None,  # (V,)
        row_weight: Tensor | None,  # (N,)
        reduction: str,
        needs: tuple[bool, bool, bool],
        options: StepKLOptions,
        settings: tuple[Any, ...],  # of the computation
    ) -> tuple[Tensor, ...]:
        inputs = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, row_weight)
        recompute = reduction == "none"
        wanted = [need and not recompute for need in needs]
        stats, *grads = as_traced(_step_kl_operator, _step_kl)(
            *inputs, None, wanted, *options, reduction == "mean", *settings
        )
        row_loss, row_kl, row_clip_fraction = stats.unbind()
        ctx.needs, ctx.options, ctx.settings, ctx.recompute = needs, options, settings, recompute
        ctx.save_for_backward(*(inputs if recompute else grads))
        ctx.mark_non_differentiable(row_loss, row_kl, row_clip_fraction)
        return _reduced(row_loss, row_weight, reduction), row_loss, row_kl, row_clip_fraction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.recompute:
            grads = as_traced(_step_kl_operator, _step_kl)(
                *ctx.saved_tensors, upstream, list(ctx.needs), *ctx.options, False, *ctx.settings
            )[1:]
        else:
            grads = tuple(g * upstream for g in ctx.saved_tensors)
        # Autograd rounds these to the inputs' dtypes: only now, for unscaled fp16 would lose small gradients.
        return *(g if need else None for g, need in zip(grads, ctx.needs, strict=True)), *[None] * 8


class StepKLFromLogits(torch.autograd.Function):
    """step_kl_from_logits for flattened rows.

    The gradient is computed in the backward: the logits are kept anyway, and it would be as large as they are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (N, V)
        teacher: Tensor,  # (N, V)
        row_weight: Tensor | None,  # (N,)
        reduction: str,
        options: StepKLOptions,
        settings: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        stats, _ = as_traced(_from_logits_operator, _step_kl_from_logits)(
            student, teacher, row_weight, None, False, *options, False, *settings
        )
        row_loss, row_kl, row_clip_fraction = stats.unbind()
        ctx.reduction, ctx.options, ctx.settings = reduction, options, settings
        ctx.save_for_backward(student, teacher, row_weight)
        ctx.mark_non_differentiable(row_loss, row_kl, row_clip_fraction)
        return _reduced(row_loss, row_weight, reduction), row_loss, row_kl, row_clip_fraction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        student, teacher, row_weight = ctx.saved_tensors
        upstream = upstream.expand(student.shape[0]).contiguous()
        mean = ctx.reduction == "mean"
        call = (student, teacher, row_weight, upstream, True, *ctx.options, mean, *ctx.settings)
        return as_traced(_from_logits_operator, _step_kl_from_logits)(*call)[1], None, None, None, None, None
