"""fused_step_kl: a student's divergence from its teacher, from hidden states, without their logits."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.arguments import (
    check_bias,
    check_choice,
    check_device,
    check_floating,
    check_head,
    check_integer,
    check_number,
    check_settings,
    check_shape,
)
from ..common.head import whole
from .contracts import StepKLOptions, StepKLOutput
from .divergences import DIVERGENCES
from .operators import StepKL, StepKLFromLogits


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
    workspace_bytes: int | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    check_finite: bool = False,
    backend: str = "auto",
) -> StepKLOutput:
    """Compute the step-level distillation loss of d-OPSD (the inner sum of Eq. 12) from hidden states.

    With s and t the softmax of the student's and the teacher's logits (hidden @ weight.T + bias) /
    temperature, each of the N rows (all leading dimensions, flattened) has the loss sum_v min(contribution_v,
    clip), where contribution_v is

    =================  ===========================  =====================================
    divergence         clip_form "plain"            clip_form "nonnegative"
    =================  ===========================  =====================================
    "reverse_kl"       s log(s/t)                   s log(s/t) - s + t
    "forward_kl"       t log(t/s)                   t log(t/s) - t + s
    "jsd"              (1-beta) s log(s/m) + beta t log(t/m)
    "skew_reverse_kl"  s log(s/m)                   s log(s/m) - s + m
    "skew_forward_kl"  t log(t/m)                   t log(t/m) - t + m
    =================  ===========================  =====================================

    with m = (1-beta) s + beta t. The skew divergences are those of DistiLLM (Ko et al., 2024), whose alpha, the share
    of a side's own distribution in the mixture, is 1 - beta for "skew_reverse_kl" and beta for "skew_forward_kl". They
    and "jsd" are finite whatever the supports.

    "plain" is the paper's clip. It moves the optimum: once the student's largest entries are clipped, the
    negative contributions that are left pull the student away from its teacher. The terms added by
    "nonnegative" sum to 0, so that without a clip both forms are the same divergence; with one, every kept
    entry pulls towards s = t.

    The logits never exist as a whole: rows are processed in chunks that fit in `workspace_bytes`. For "mean"
    and "sum" the gradient is computed in the forward pass and stored in the compute dtype, or bf16 for bf16
    `student_hidden` (one hidden-sized tensor, and one weight-sized tensor if the weight is trained); for "none" it
    is recomputed in the backward pass, for the rows that have an upstream gradient. The compute dtype is fp64 for
    fp64 `student_hidden` and else fp32. On a GPU, hidden states and weight of one 16-bit dtype are multiplied as
    they are, into fp32 logits, and the logits' gradient is rounded to that dtype once; else, tensors of other dtypes
    are converted, weights in tiles. Autocast has no effect inside. There is no second derivative.

    Args:
        student_hidden: (..., d), fp16, bf16, fp32 or fp64. Gets a gradient.
        teacher_hidden: (..., d_t) with the same leading dimensions. No teacher tensor may require a gradient.
        weight: (V, d), the LM head; one that FSDP2 has sharded is gathered. Gets a gradient, accumulated in the
            compute dtype, if it requires one; that gradient is the student's alone, also when the teacher uses the
            same weight.
        teacher_weight: (V, d_t). None: the teacher uses `weight`, as a constant, and `bias` unless
            `teacher_bias` is given. With a `teacher_weight`, a teacher without `teacher_bias` has no bias.
        bias: (V,), entries may be -inf. Gets a gradient if it requires one.
        teacher_bias: (V,), entries may be -inf.
        row_weight: (N,) or the leading dimensions, finite and nonnegative. Rows of weight 0 are not computed,
            and have 0 in every output.
        divergence: "reverse_kl" (student against teacher), "forward_kl", "jsd", "skew_reverse_kl" or
            "skew_forward_kl".
        beta: teacher's share of the mixture m, in (0, 1).
        clip: upper bound of every contribution, >= 0. None: no clip, and `clip_form` does not matter.
        clip_form: "plain" or "nonnegative".
        top_k: restrict the divergence to the teacher's k largest entries, ties to the lowest id. None: all V.
        tail: with `top_k`, "renormalize" both sides on those entries, or keep the others as one "bucket"
            entry. To renormalize takes one product over the vocabulary, the teacher's: of the student's weight, k rows
            per row are read, and each row of a workspace holds them too.
        temperature: divides both sides' logits, > 0. The loss is not multiplied by its square.
        reduction: "mean" divides the weighted sum of row losses by the number of rows of non-zero weight,
            "sum" is the weighted sum, "none" is the weighted loss of every row.
        workspace_bytes: limit of the tensors that exist at once beside inputs, outputs and gradients. Buffers
            of the allocator and of the matrix products come on top. None: 64 MiB, on a GPU 256 MiB.
        vocab_group: a process group over which the vocabulary is sharded, as in tensor parallelism: each process
            gives its consecutive rows of the weights and biases, in rank order, and the same hidden states and
            options. Outputs and the gradient of `student_hidden` are those of the whole vocabulary, on every
            process. Only numbers per row are exchanged, and that gradient.
        check_finite: look for NaN and infinities in all inputs first. That reads each once, and waits for a GPU.
        backend: "torch", or "triton" for the kernels, which need a GPU and fp16, bf16 or fp32. "auto" takes the
            kernels where they can be used.

    Returns:
        StepKLOutput: `loss`, and for every row, detached and in the leading dimensions, `row_loss`
        (unweighted), `row_kl` (the divergence without the clip) and `row_clip_fraction` (share of the entries
        above the clip; with `top_k`, of the k or k + 1 entries). All are in the compute dtype. With no rows,
        or all of weight 0, the loss is 0 and has zero gradients. Where the student has mass and the teacher
        has none, the reverse KL is infinite; an unclipped row of infinite loss has no meaningful gradient.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range, or `backend` is "triton" and
            the kernels cannot be used.
    """
    weight, teacher_weight = whole(weight), None if teacher_weight is None else whole(teacher_weight)
    bias, teacher_bias = (None if x is None else whole(x) for x in (bias, teacher_bias))
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
    options = check_options(divergence, beta, clip, clip_form, top_k, tail, temperature, vocab, vocab_group)
    settings = check_settings(workspace_bytes, vocab_group, check_finite, backend, device)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if row_weight is not None:
        row_weight = _check_row_weight(row_weight, leading, device)
    if teacher_weight is None and teacher_bias is None and bias is not None:
        teacher_bias = bias.detach()
    grad_enabled = torch.is_grad_enabled()
    needs = (
        grad_enabled and student_hidden.requires_grad,
        grad_enabled and weight.requires_grad,
        grad_enabled and bias is not None and bias.requires_grad,
    )
    outputs = StepKL.apply(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        weight,
        bias,
        teacher_hidden.reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight,
        teacher_bias,
        row_weight,
        reduction,
        needs,
        options,
        settings,
    )
    return StepKLOutput(*(x.reshape(leading) if x.dim() else x for x in outputs))


def step_kl_from_logits(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    *,
    row_weight: Tensor | None = None,  # (N,)
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    clip: float | None = None,
    clip_form: str = "plain",
    top_k: int | None = None,
    tail: str = "renormalize",
    temperature: float = 1.0,
    reduction: str = "mean",
    workspace_bytes: int | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    check_finite: bool = False,
    backend: str = "auto",
) -> StepKLOutput:
    """Compute `fused_step_kl`'s loss from logits, for a model whose LM head cannot be reached.

    The same divergences, clips, reductions and outputs; see there. Beyond the logits and the student's gradient, both
    of which are the caller's, only the workspace is used: softmaxes, losses and masks of N x V never exist. The
    gradient is computed in the backward pass, in fp32, and rounded once to the logits' dtype.

    Args:
        student_logits: (..., V), fp16, bf16, fp32 or fp64. Gets a gradient.
        teacher_logits: (..., V), same shape; may not require a gradient.
        others: as for `fused_step_kl`. With a `vocab_group` the logits are this process' columns, and so is the
            gradient.

    Returns:
        StepKLOutput, as `fused_step_kl`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.
    """
    check_floating("student_logits", student_logits)
    check_floating("teacher_logits", teacher_logits)
    if student_logits.dim() == 0 or student_logits.shape[-1] == 0:
        raise ValueError(f"student_logits has shape {tuple(student_logits.shape)}, but must have (..., V) with V >= 1.")
    *leading, vocab = student_logits.shape
    device = student_logits.device
    check_shape("teacher_logits", teacher_logits, (*leading, vocab), "that of student_logits")
    check_device("teacher_logits", teacher_logits, device)
    _check_frozen("teacher_logits", teacher_logits)
    options = check_options(divergence, beta, clip, clip_form, top_k, tail, temperature, vocab, vocab_group)
    settings = check_settings(workspace_bytes, vocab_group, check_finite, backend, device)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if row_weight is not None:
        row_weight = _check_row_weight(row_weight, torch.Size(leading), device)
    outputs = StepKLFromLogits.apply(
        student_logits.reshape(-1, vocab), teacher_logits.reshape(-1, vocab), row_weight, reduction, options, settings
    )
    return StepKLOutput(*(x.reshape(leading) if x.dim() else x for x in outputs))


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


def check_options(
    divergence: str,
    beta: float,
    clip: float | None,
    clip_form: str,
    top_k: int | None,
    tail: str,
    temperature: float,
    vocab: int,
    vocab_group: dist.ProcessGroup | None,
) -> StepKLOptions:
    """Check what defines a row's loss."""
    check_choice("divergence", divergence, tuple(DIVERGENCES))
    check_choice("clip_form", clip_form, ("plain", "nonnegative"))
    check_choice("tail", tail, ("renormalize", "bucket"))
    check_number("beta", beta, 0, above=True, high=1)
    check_number("temperature", temperature, 0, above=True)
    if clip is not None:
        check_number("clip", clip, 0)
    if top_k is not None:
        # How many columns the other processes of a group hold is known only later.
        check_integer("top_k", top_k, 1, vocab if vocab_group is None else 1 << 62)
    return StepKLOptions(divergence, beta, clip, clip_form, top_k, tail, temperature)


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
    return flat
