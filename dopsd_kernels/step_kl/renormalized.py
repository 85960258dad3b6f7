"""fused_step_kl on the teacher's k largest entries alone, both sides renormalized.

Only the teacher's logits are needed of the whole vocabulary, one product instead of three. The student's logits are
those of k rows of the weight per row, which are gathered, and the gradient comes from the same k: for k = 20 and
V = 126464 that is less than a thousandth of a product's arithmetic. Everything is the libraries' work: nothing but the
product and a maximum of each block of columns goes over the vocabulary.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..common import products, topk
from ..common.head import FP16_BOOST, Gradients, Head, gradient_dtype
from ..common.topk import TopK, group_topk
from ..common.vocab_group import VocabGroup
from ..common.workspace import Plan, chunk_rows, divide
from .chunked import head_logits, new_outputs
from .contracts import StepKLOptions
from .passes import TOP_K_TEMPORARIES, divergence

# The C library gives larger tensors than 32 MiB back to the system after every call; to have their pages again costs
# as much as a third of the product that fills them.
_CPU_LOGITS_BYTES = 16 << 20


def plan_workspace(
    student: Head,
    teacher: Head,
    needs: tuple[bool, bool, bool],
    top_k: int,
    workspace_bytes: int,
    vocab: int,
) -> Plan:
    """Divide the workspace into rows of the teacher's logits, with all that belongs to them, and a converted tile."""
    compute = products.compute_dtype(student.hidden)
    operand = products.operand_dtype(student.hidden, student.weight)
    width, teacher_width = student.weight.shape[1], teacher.weight.shape[1]
    # Of a row's k rows of the weight: gathered, converted, and, for the weight's gradient, what is added to them.
    gathered = student.weight.dtype.itemsize + (operand.itemsize if student.weight.dtype != operand else 0)
    gathered = max(gathered, operand.itemsize + compute.itemsize if needs[1] else 0) * top_k * width
    gathered += TOP_K_TEMPORARIES * top_k * compute.itemsize
    # Hidden states, gathered and converted; the gradient before and after its rounding.
    hidden = max(operand.itemsize, student.hidden.itemsize) + gradient_dtype(student.hidden).itemsize
    hidden = (hidden + 2 * compute.itemsize) * width
    selected = max(topk.row_bytes(vocab, top_k), teacher_width * max(compute.itemsize, teacher.hidden.itemsize))
    row_bytes = compute.itemsize * products.row_stride(vocab) + 20 * top_k + max(selected, gathered + hidden)
    converted = teacher.weight.dtype != products.operand_dtype(teacher.hidden, teacher.weight)
    plan = divide(workspace_bytes, vocab, row_bytes, compute.itemsize * teacher_width * converted)
    if student.hidden.is_cuda:
        return plan
    return replace(plan, chunk_rows=min(plan.chunk_rows, 1 + _CPU_LOGITS_BYTES // (compute.itemsize * vocab)))


def step_kl(
    student: Head,
    teacher: Head,
    rows: Tensor | None,  # (A,) int64: the rows to compute; None for all
    row_scale: Tensor | None,  # (A,) upstream gradient of each computed row's loss; None for ones
    needs: tuple[bool, bool, bool],  # whether hidden, weight and bias need a gradient
    options: StepKLOptions,
    workspace_bytes: int,
    group: VocabGroup,
) -> tuple[Tensor, Gradients]:
    """Return (row_loss, row_kl, row_clip_fraction) stacked as (3, N), and the gradients."""
    assert options.top_k is not None
    plan = plan_workspace(student, teacher, needs, options.top_k, workspace_bytes, group.widest)
    dtype = products.compute_dtype(student.hidden)
    operand = products.operand_dtype(student.hidden, student.weight)
    boost = FP16_BOOST if operand == torch.float16 else 1
    stats, grads = new_outputs(student, needs)
    active = stats.shape[1] if rows is None else rows.numel()
    if active == 0:
        return stats, grads
    vocab = student.weight.shape[0]
    stride = products.row_stride(vocab)
    size = min(active, chunk_rows(active, plan, student.hidden))
    logits = student.hidden.new_empty((size, stride), dtype=dtype)[:, :vocab]
    bias_s, bias_t = (None if head.bias is None else head.bias.to(dtype) for head in (student, teacher))

    for chunk in products.tiles(active, size):
        places = chunk if rows is None else rows[chunk]
        z_t = logits[: chunk.stop - chunk.start]
        head_logits(teacher, places, plan.tile_columns, out=z_t)
        if bias_t is not None:
            z_t += bias_t
        top = group_topk(z_t, options.top_k, group, 1 / options.temperature)

        hidden = student.hidden[places].to(operand)
        weight = student.weight.index_select(0, top.columns.flatten()).to(operand).unflatten(0, top.columns.shape)
        z_s = products.matmul(hidden[:, None], weight.mT)[:, 0]
        if bias_s is not None:
            z_s += bias_s[top.columns]
        stats[:, places], dz = _divergence(z_s, top, options, any(needs), group)
        scale = None if row_scale is None else row_scale[chunk, None]
        if grads.hidden is not None:
            dh = products.matmul((dz * boost).to(operand)[:, None], weight)[:, 0]
            dh = group.sum(dh).mul_(1 / boost if scale is None else scale / boost)
            grads.hidden[places] = dh.to(grads.hidden.dtype)
        if scale is not None:
            dz *= scale
        if grads.weight is not None:
            products.add_rows(grads.weight, top.columns, dz[:, :, None] * hidden.to(dtype)[:, None])
        if grads.bias is not None:
            products.add_rows(grads.bias, top.columns, dz)
    return stats, grads


def step_kl_from_logits(
    student: Tensor,  # (N, V)
    teacher: Tensor,  # (N, V)
    rows: Tensor | None,  # (A,) int64: the rows to compute; None for all
    row_scale: Tensor | None,  # (A,) upstream gradient of each computed row's loss; None for ones
    want_grad: bool,
    options: StepKLOptions,
    workspace_bytes: int,
    group: VocabGroup,
) -> tuple[Tensor, Tensor]:
    """Return (row_loss, row_kl, row_clip_fraction) stacked as (3, N), and the gradient of `student`."""
    assert options.top_k is not None
    dtype = products.compute_dtype(student)
    stats = student.new_zeros((3, len(student)), dtype=dtype)
    gradient = student.new_zeros(student.shape if want_grad else (0,))
    row_bytes = topk.row_bytes(group.widest, options.top_k) + TOP_K_TEMPORARIES * options.top_k * dtype.itemsize
    if rows is not None:  # a copy of the selected rows
        row_bytes += teacher.dtype.itemsize * group.widest
    plan = divide(workspace_bytes, group.widest, row_bytes, 0)
    for block in products.tiles(len(student) if rows is None else len(rows), plan.chunk_rows):
        places = torch.arange(block.start, block.stop, device=student.device) if rows is None else rows[block]
        z_t = teacher[block if rows is None else places]
        top = group_topk(z_t, options.top_k, group, 1 / options.temperature)
        at = places[:, None], top.columns
        stats[:, places], dz = _divergence(student[at].to(dtype), top, options, want_grad, group)
        if want_grad:
            if row_scale is not None:
                dz *= row_scale[block, None]
            gradient.index_put_(at, dz.to(gradient.dtype), accumulate=True)
    return stats, gradient


def _divergence(
    z_s: Tensor,  # (R, k), right where this process holds the entry
    top: TopK,  # of the teacher
    options: StepKLOptions,
    want_grad: bool,
    group: VocabGroup,
) -> tuple[Tensor, Tensor]:
    """Return the rows' (loss, kl, clip fraction) (3, R), and with `want_grad` the gradient of z_s (R, k)."""
    log_s = (group.sum(top.local(z_s)) / options.temperature).log_softmax(-1)
    # All of a row's entries are here: nothing more is exchanged.
    alone = VocabGroup.of(None, log_s.shape[1], log_s.device)
    stats = divergence(log_s, top.values.log_softmax(-1), options, want_grad, alone)
    return stats, top.local(log_s) / options.temperature
