"""fused_step_kl: a student's divergence from its teacher, from hidden states, without their logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dopsd_kernels import chunked_step_kl
from dopsd_kernels.arguments import (
    check_backend,
    check_bias,
    check_choice,
    check_device,
    check_floating,
    check_head,
    check_integer,
    check_number,
    check_shape,
)
from dopsd_kernels.chunked_step_kl import Gradients, Head
from dopsd_kernels.contracts import StepKLOptions, StepKLOutput

# Products of about 190 rows at V = 32768, enough for their full rate on a CPU, and of 50 at V = 126464.
# A GPU needs about 256 rows to be limited by arithmetic, not by reading the weight: 384 MiB at V = 126464.
DEFAULT_WORKSPACE_BYTES = 64 << 20


def fused_step_kl(
    student_hidden: Tensor,  # (..., d)
    teacher_hidden: Tensor,  # (..., d_t)
    weight: Tensor,  # (V, d)
    *,
    teacher_weight: Tensor | None = None,  # (V, d_t)
    bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    row_weight: Tensor | None = None,  # (N,)
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    clip: float | None = None,
    clip_form: str = "plain",
    top_k: int | None = None,
    tail: str = "renormalize",
    temperature: float = 1.0,
    reduction: str = "mean",
    grad_threshold: float = 0.0,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    backend: str = "auto",
) -> StepKLOutput:
    """Compute the step-level distillation loss of d-OPSD (the inner sum of Eq. 12) from hidden states.

    With s and t the softmax of the student's and the teacher's logits (hidden @ weight.T + bias) /
    temperature, each of the N rows (all leading dimensions, flattened) has the loss sum_v min(contribution_v,
    clip), where contribution_v is

    =============  ===========================  =====================================
    divergence     clip_form "plain"            clip_form "nonnegative"
    =============  ===========================  =====================================
    "reverse_kl"   s log(s/t)                   s log(s/t) - s + t
    "forward_kl"   t log(t/s)                   t log(t/s) - t + s
    "jsd"          (1-beta) s log(s/m) + beta t log(t/m), m = (1-beta) s + beta t
    =============  ===========================  =====================================

    "plain" is the paper's clip. It moves the optimum: once the student's largest entries are clipped, the
    negative contributions that are left pull the student away from its teacher. The terms added by
    "nonnegative" sum to 0, so that without a clip both forms are the same divergence; with one, every kept
    entry pulls towards s = t.

    The logits never exist as a whole: rows are processed in chunks that fit in `workspace_bytes`. For "mean"
    and "sum" the gradient is computed in the forward pass and stored in the compute dtype (one hidden-sized
    tensor, and one weight-sized tensor if the weight is trained); for "none" it is recomputed in the backward
    pass, for the rows that have an upstream gradient. The compute dtype is fp64 for fp64 `student_hidden` and
    else fp32; tensors of other dtypes are converted, weights in tiles. Autocast has no effect inside. There
    is no second derivative.

    Args:
        student_hidden: (..., d), fp16, bf16, fp32 or fp64. Gets a gradient.
        teacher_hidden: (..., d_t) with the same leading dimensions. No teacher tensor may require a gradient.
        weight: (V, d), the LM head. Gets a gradient, accumulated in the compute dtype, if it requires one;
            that gradient is the student's alone, also when the teacher uses the same weight.
        teacher_weight: (V, d_t). None: the teacher uses `weight`, as a constant, and `bias` unless
            `teacher_bias` is given. With a `teacher_weight`, a teacher without `teacher_bias` has no bias.
        bias: (V,), entries may be -inf. Gets a gradient if it requires one.
        teacher_bias: (V,), entries may be -inf.
        row_weight: (N,) or the leading dimensions, finite and nonnegative. Rows of weight 0 are not computed,
            and have 0 in every output.
        divergence: "reverse_kl" (student against teacher), "forward_kl" or "jsd".
        beta: teacher's share of the mixture of "jsd", in (0, 1).
        clip: upper bound of every contribution, >= 0. None: no clip, and `clip_form` does not matter.
        clip_form: "plain" or "nonnegative".
        top_k: restrict the divergence to the teacher's k largest entries, ties to the lowest id. None: all V.
        tail: with `top_k`, "renormalize" both sides on those entries, or keep the others as one "bucket"
            entry.
        temperature: divides both sides' logits, > 0. The loss is not multiplied by its square.
        reduction: "mean" divides the weighted sum of row losses by the number of rows of non-zero weight,
            "sum" is the weighted sum, "none" is the weighted loss of every row.
        grad_threshold: 0 is exact. Else, blocks of 256 vocabulary columns (fewer if the workspace is small)
            where no row of the chunk has a gradient entry of that size with respect to its own logits are
            left out of the gradients of `student_hidden` and `weight`. That changes entry i of a row's
            gradient by less than grad_threshold * scale / temperature * sum of |weight[v, i]| over the
            columns left out, where scale is the row's weight, divided by the number of rows for "mean".
        workspace_bytes: limit of the tensors that exist at once beside inputs, outputs and gradients. Buffers
            of the allocator and of the matrix products come on top.
        backend: "auto" or "torch". This version has no "triton".

    Returns:
        StepKLOutput: `loss`, and for every row, detached and in the leading dimensions, `row_loss`
        (unweighted), `row_kl` (the divergence without the clip) and `row_clip_fraction` (share of the entries
        above the clip; with `top_k`, of the k or k + 1 entries). All are in the compute dtype. With no rows,
        or all of weight 0, the loss is 0 and has zero gradients. Where the student has mass and the teacher
        has none, the reverse KL is infinite; an unclipped row of infinite loss has no meaningful gradient.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.
        NotImplementedError: `backend` is "triton".
    """
    check_head("student_hidden", student_hidden, "weight", weight)
    if teacher_weight is None:
        check_head("teacher_hidden", teacher_hidden, "weight", weight)
    else:
        check_head("teacher_hidden", teacher_hidden, "teacher_weight", teacher_weight)
        _check_frozen("teacher_weight", teacher_weight)
        check_shape("teacher_weight", teacher_weight, (weight.shape[0], teacher_weight.shape[1]), "one vocabulary")
    leading = student_hidden.shape[:-1]
    check_shape("teacher_hidden", teacher_hidden, (*leading, teacher_hidden.shape[-1]), "student_hidden's rows")
    device, vocab = student_hidden.device, weight.shape[0]
    for name, tensor in (
        ("teacher_hidden", teacher_hidden),
        ("weight", weight),
        ("teacher_weight", teacher_weight),
    ):
        if tensor is not None:
            check_device(name, tensor, device)
    check_bias("bias", bias, vocab, device)
    check_bias("teacher_bias", teacher_bias, vocab, device)
    _check_frozen("teacher_hidden", teacher_hidden)
    _check_frozen("teacher_bias", teacher_bias)
    check_choice("divergence", divergence, ("reverse_kl", "forward_kl", "jsd"))
    check_choice("clip_form", clip_form, ("plain", "nonnegative"))
    check_choice("tail", tail, ("renormalize", "bucket"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_number("beta", beta, 0, above=True, high=1)
    check_number("temperature", temperature, 0, above=True)
    check_number("grad_threshold", grad_threshold, 0)
    if clip is not None:
        check_number("clip", clip, 0)
    if top_k is not None:
        check_integer("top_k", top_k, 1, vocab)
    check_integer("workspace_bytes", workspace_bytes, 1, 1 << 62)
    check_backend(backend)
    rows = None
    if row_weight is not None:
        row_weight = _check_row_weight(row_weight, leading, device)
        rows = row_weight.nonzero()[:, 0]
        if rows.numel() == row_weight.numel():
            rows = None

    if teacher_weight is None:
        teacher_weight = weight.detach()
        if teacher_bias is None and bias is not None:
            teacher_bias = bias.detach()
    grad_enabled = torch.is_grad_enabled()
    needs = (
        grad_enabled and student_hidden.requires_grad,
        grad_enabled and weight.requires_grad,
        grad_enabled and bias is not None and bias.requires_grad,
    )
    settings = _Settings(
        options=StepKLOptions(divergence, beta, clip, clip_form, top_k, tail, temperature),
        reduction=reduction,
        grad_threshold=grad_threshold,
        workspace_bytes=workspace_bytes,
        needs=needs,
    )
    outputs = _StepKL.apply(
        student_hidden.reshape(-1, weight.shape[1]),
        weight,
        bias,
        teacher_hidden.reshape(-1, teacher_weight.shape[1]),
        teacher_weight,
        teacher_bias,
        row_weight,
        rows,
        settings,
    )
    loss, *per_row = (x.reshape(leading) if x.dim() else x for x in outputs)
    return StepKLOutput(loss, *per_row)


def step_mean_weights(step_ids: Tensor) -> Tensor:  # (N,) -> (N,)
    """Return the row weights of Eq. 12: the mean over steps of the mean over each step's rows.

    Row i gets 1 / (number of distinct steps * number of rows of its step), so that the weights sum to 1; use
    them with reduction "sum".

    Args:
        step_ids: (N,) integers, equal for the rows of one step; any values in any order. N = 0 gives no
            weights.

    Returns:
        (N,) fp32 weights.

    Raises:
        TypeError, ValueError: `step_ids` does not hold integers, or is not one-dimensional.
    """
    if not isinstance(step_ids, Tensor):
        raise TypeError(f"step_ids must be a torch.Tensor, but is a {type(step_ids).__name__}.")
    if step_ids.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"step_ids must hold integers, but is {step_ids.dtype}.")
    if step_ids.dim() != 1:
        raise ValueError(f"step_ids has shape {tuple(step_ids.shape)}, but must have (N,).")
    steps, step_of_row, rows_of_step = torch.unique(step_ids, return_inverse=True, return_counts=True)
    share: Tensor = 1.0 / (steps.numel() * rows_of_step[step_of_row])
    return share.to(torch.float32)


@dataclass(frozen=True)
class _Settings:
    options: StepKLOptions
    reduction: str
    grad_threshold: float
    workspace_bytes: int
    needs: tuple[bool, bool, bool]  # of hidden, weight and bias

    def run(
        self,
        student: Head,
        teacher: Head,
        rows: Tensor | None,
        row_scale: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Gradients]:
        # Which of the operations inside autocast would round is PyTorch's to change.
        with torch.autocast(student.hidden.device.type, enabled=False):
            return chunked_step_kl.step_kl(
                student,
                teacher,
                rows,
                row_scale,
                needs,
                self.options,
                self.grad_threshold,
                self.workspace_bytes,
            )


class _StepKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, d)
        weight: Tensor,  # (V, d)
        bias: Tensor | None,  # (V,)
        teacher_hidden: Tensor,  # (N, d_t)
        teacher_weight: Tensor,  # (V, d_t)
        teacher_bias: Tensor | None,  # (V,)
        row_weight: Tensor | None,  # (N,)
        rows: Tensor | None,  # (A,) the rows of non-zero weight; None for all
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        student, teacher = Head(hidden, weight, bias), Head(teacher_hidden, teacher_weight, teacher_bias)
        dtype = chunked_step_kl.compute_dtype(hidden)
        if row_weight is None:
            row_weight = hidden.new_ones(hidden.shape[0], dtype=dtype)
        row_weight = row_weight.to(dtype)
        scale = row_weight if rows is None else row_weight[rows]
        if settings.reduction == "mean":
            scale = scale / max(scale.numel(), 1)

        recompute = settings.reduction == "none"
        needs = (False, False, False) if recompute else settings.needs
        stats, grads = settings.run(student, teacher, rows, scale, needs)
        row_loss, row_kl, row_clip_fraction = stats.unbind()
        loss = row_weight * row_loss
        if settings.reduction != "none":
            loss = loss.sum()
        if settings.reduction == "mean":
            loss = loss / max(scale.numel(), 1)

        ctx.settings = settings
        ctx.save_for_backward(*((*student, *teacher, row_weight) if recompute else grads))
        ctx.mark_non_differentiable(row_loss, row_kl, row_clip_fraction)
        return loss, row_loss, row_kl, row_clip_fraction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        settings: _Settings = ctx.settings
        if settings.reduction == "none":
            *sides, row_weight = ctx.saved_tensors
            student, teacher = Head(*sides[:3]), Head(*sides[3:])
            scale = upstream * row_weight
            rows = scale.nonzero()[:, 0]
            grads = settings.run(student, teacher, rows, scale[rows], settings.needs)[1]
        else:
            grads = Gradients(*(None if g is None else g * upstream for g in ctx.saved_tensors))
        # Autograd rounds these to the inputs' dtypes: only now, for unscaled fp16 would lose small gradients.
        return *grads, None, None, None, None, None, None


def _check_frozen(name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.requires_grad:
        raise ValueError(f"{name} requires a gradient, but the teacher gets none: pass {name}.detach().")


def _check_row_weight(row_weight: Any, leading: torch.Size, device: torch.device) -> Tensor:
    """Return the row weights as (N,)."""
    check_floating("row_weight", row_weight)
    rows = leading.numel()
    if row_weight.shape not in (leading, (rows,)):
        raise ValueError(
            f"row_weight has shape {tuple(row_weight.shape)}, but must have ({rows},) or {tuple(leading)}."
        )
    check_device("row_weight", row_weight, device)
    if row_weight.requires_grad:
        raise ValueError("row_weight requires a gradient, but gets none: pass row_weight.detach().")
    flat: Tensor = row_weight.reshape(-1)
    if not bool(((flat >= 0) & (flat < torch.inf)).all()):
        raise ValueError("row_weight has negative, infinite or NaN entries, but must be finite and nonnegative.")
    return flat
