"""fused_step_kl in chunks of rows, in plain PyTorch.

For a chunk of rows: two products give the student's and the teacher's logits, in fp32 and in place;
element-wise passes turn them into the rows' losses and the gradient with respect to the student's logits,
which overwrites the student's logits; a third product takes that gradient to the hidden states. Only the
chunk's two logit buffers and a few temporaries ever exist, and they fit in the workspace.

    chunk (about 190 rows for V = 32768 and 64 MiB): products need many rows, for each reads the whole weight
      block (about 25 rows): element-wise passes do not, so their temporaries take a quarter of the space

With contributions phi_v(s_v, t_v) and pull_v = s_v dphi_v/ds_v on the kept set U (0 elsewhere), every
divergence has the same gradient with respect to the student's logits: pull_j - s_j sum_v pull_v.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dopsd_kernels.contracts import StepKLOptions
from dopsd_kernels.topk import stable_topk

# Temporaries of the element-wise passes, in rows of V or of top_k entries of the compute dtype.
_VOCAB_TEMPORARIES = 5
_TOP_K_TEMPORARIES = 12
# Columns that `grad_threshold` keeps or skips together.
_SKIP_COLUMNS = 256


class Head(NamedTuple):
    """One side's input and output layer."""

    hidden: Tensor  # (N, d)
    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)


class Gradients(NamedTuple):
    """Gradients of the weighted sum of row losses, in the compute dtype; None where none was asked for."""

    hidden: Tensor | None  # (N, d)
    weight: Tensor | None  # (V, d)
    bias: Tensor | None  # (V,)


@dataclass(frozen=True)
class Plan:
    """How the workspace is divided."""

    chunk_rows: int  # rows per product
    block_rows: int  # rows per element-wise pass
    tile_columns: int  # weight rows (vocabulary columns) converted to the compute dtype at once


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of logits and sums: fp64 for fp64 hidden states, else fp32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def plan_workspace(student: Head, teacher: Head, top_k: int | None, workspace_bytes: int) -> Plan:
    """Divide the workspace into a chunk's logits, a block's temporaries and a converted weight tile."""
    dtype = compute_dtype(student.hidden)
    vocab, width = student.weight.shape
    teacher_width = teacher.weight.shape[1]
    widest = max(width, teacher_width)
    # Per row: two rows of logits, and the hidden rows gathered, converted and differentiated.
    row_bytes = dtype.itemsize * (2 * vocab + 3 * width + 2 * teacher_width)
    top_k_entries = 0 if top_k is None else top_k + 1
    block_row_bytes = dtype.itemsize * (_VOCAB_TEMPORARIES * vocab + _TOP_K_TEMPORARIES * top_k_entries)
    converted = student.weight.dtype != dtype or teacher.weight.dtype != dtype
    column_bytes = dtype.itemsize * widest if converted else 0

    floor = row_bytes + block_row_bytes + column_bytes
    if workspace_bytes < floor:
        raise ValueError(f"workspace_bytes is {workspace_bytes}, but one row of {vocab} logits needs at least {floor}.")
    spare = workspace_bytes - floor
    block_rows = 1 + spare // 4 // block_row_bytes
    spare -= (block_rows - 1) * block_row_bytes
    tile_columns = vocab
    if converted:
        tile_columns = min(vocab, 1 + spare // 4 // column_bytes)
        spare -= (tile_columns - 1) * column_bytes
    return Plan(1 + spare // row_bytes, block_rows, tile_columns)


def step_kl(
    student: Head,
    teacher: Head,
    rows: Tensor | None,  # (A,) int64: the rows to compute; None for all
    row_scale: Tensor | None,  # (A,) upstream gradient of each computed row's loss; None for no gradients
    needs: tuple[bool, bool, bool],  # whether hidden, weight and bias need a gradient
    options: StepKLOptions,
    grad_threshold: float,
    workspace_bytes: int,
) -> tuple[Tensor, Gradients]:
    """Return (row_loss, row_kl, row_clip_fraction) stacked as (3, N), and the gradients."""
    plan = plan_workspace(student, teacher, options.top_k, workspace_bytes)
    dtype = compute_dtype(student.hidden)
    count = student.hidden.shape[0]
    vocab, width = student.weight.shape
    if row_scale is None:
        needs = (False, False, False)

    def zeros(wanted: bool, *shape: int) -> Tensor | None:
        return student.hidden.new_zeros(shape, dtype=dtype) if wanted else None

    grads = Gradients(zeros(needs[0], count, width), zeros(needs[1], vocab, width), zeros(needs[2], vocab))
    stats = student.hidden.new_zeros((3, count), dtype=dtype)
    active = count if rows is None else rows.numel()
    chunk_rows = min(plan.chunk_rows, active)
    buffers = student.hidden.new_empty((2, chunk_rows, vocab), dtype=dtype)

    for start in range(0, active, max(chunk_rows, 1)):
        stop = min(start + chunk_rows, active)
        chunk = slice(start, stop) if rows is None else rows[start:stop]
        hidden = student.hidden[chunk].to(dtype)
        z_s, z_t = buffers[0, : stop - start], buffers[1, : stop - start]
        _logits(hidden, student, options.temperature, plan.tile_columns, out=z_s)
        _logits(teacher.hidden[chunk].to(dtype), teacher, options.temperature, plan.tile_columns, out=z_t)
        chunk_stats = torch.cat(
            [
                _rows(s, t, options, any(needs))
                for s, t in zip(torch.split(z_s, plan.block_rows), torch.split(z_t, plan.block_rows), strict=True)
            ],
            dim=1,
        )
        stats[:, chunk] = chunk_stats
        if row_scale is not None:
            # z_s now holds the gradient of each row's own loss; the row's scale enters on the narrow side.
            scale = (row_scale[start:stop] / options.temperature)[:, None]
            _accumulate(z_s, hidden, scale, chunk, student.weight, grads, grad_threshold, plan.tile_columns)
    return stats, grads


def _logits(hidden: Tensor, head: Head, temperature: float, tile_columns: int, out: Tensor) -> None:
    """Write (hidden W^T + bias) / temperature to `out` (R, V), converting the weight in tiles if need be."""
    vocab = head.weight.shape[0]
    bias = None if head.bias is None else head.bias.to(out.dtype)
    for begin in range(0, vocab, tile_columns):
        tile = head.weight[begin : begin + tile_columns].to(out.dtype)
        z = out[:, begin : begin + tile_columns]
        if bias is None:
            torch.addmm(z, hidden, tile.T, beta=0, alpha=1 / temperature, out=z)
        else:
            addend = bias[begin : begin + tile_columns]
            torch.addmm(addend, hidden, tile.T, beta=1 / temperature, alpha=1 / temperature, out=z)


def _accumulate(
    dz: Tensor,  # (R, V) gradient of each row's loss with respect to its logits
    hidden: Tensor,  # (R, d)
    scale: Tensor,  # (R, 1)
    chunk: slice | Tensor,  # the rows' places among all rows
    weight: Tensor,  # (V, d)
    grads: Gradients,
    grad_threshold: float,
    tile_columns: int,
) -> None:
    """Take a chunk's gradient from the logits to the hidden states, the weight and the bias."""
    runs = _column_runs(dz, grad_threshold, tile_columns)
    if grads.hidden is not None:
        dh = torch.zeros_like(hidden)
        for columns in runs:
            dh.addmm_(dz[:, columns], weight[columns].to(dz.dtype))
        grads.hidden[chunk] = dh.mul_(scale)
    if grads.weight is not None:
        scaled = hidden * scale
        for columns in runs:
            grads.weight[columns].addmm_(dz[:, columns].T, scaled)
    if grads.bias is not None:
        grads.bias.addmv_(dz.T, scale[:, 0])


def _column_runs(dz: Tensor, grad_threshold: float, tile_columns: int) -> list[slice]:
    """Return the column ranges whose gradient enters the products: all of them when the threshold is 0."""
    vocab = dz.shape[1]
    if grad_threshold == 0:
        return [slice(begin, min(begin + tile_columns, vocab)) for begin in range(0, vocab, tile_columns)]
    width = min(_SKIP_COLUMNS, tile_columns)
    low, high = dz.aminmax(dim=0)
    peaks = torch.split(torch.maximum(high, -low), width)
    # NaN is not below the threshold: it must reach the gradient.
    kept = torch.stack([~(peak < grad_threshold).all() for peak in peaks]).tolist()
    return [slice(i * width, min((i + 1) * width, vocab)) for i, keep in enumerate(kept) if keep]


def _rows(z_s: Tensor, z_t: Tensor, options: StepKLOptions, want_grad: bool) -> Tensor:  # (R, V) twice -> (3, R)
    """Return a block's (loss, kl, clip fraction); with `want_grad`, the gradient ends in z_s."""
    if options.top_k is None:
        log_s, log_t = torch.log_softmax(z_s, -1, out=z_s), torch.log_softmax(z_t, -1, out=z_t)
        return _divergence(log_s, log_t, options, want_grad)

    # The teacher's top-k: k entries, and with a bucket one more whose logit is the logsumexp of the rest.
    kept = stable_topk(z_t, options.top_k)[1]
    support_s, support_t = z_s.gather(-1, kept), z_t.gather(-1, kept)
    if options.tail == "renormalize":
        grad = support_s.log_softmax(-1)
        stats = _divergence(grad, support_t.log_softmax(-1), options, want_grad)
        if want_grad:
            z_s.zero_().scatter_(-1, kept, grad)
        return stats
    rest_s = z_s.scatter_(-1, kept, -math.inf).logsumexp(-1, keepdim=True)
    rest_t = z_t.scatter_(-1, kept, -math.inf).logsumexp(-1, keepdim=True)
    grad = torch.cat([support_s, rest_s], -1).log_softmax(-1)
    stats = _divergence(grad, torch.cat([support_t, rest_t], -1).log_softmax(-1), options, want_grad)
    if want_grad:
        # An entry of the rest gets its share of the bucket's gradient; an empty rest has no shares.
        shares = z_s.sub_(rest_s.masked_fill(rest_s == -math.inf, 0)).exp_()
        shares.mul_(grad[:, -1:]).scatter_(-1, kept, grad[:, :-1])
    return stats


def _divergence(log_s: Tensor, log_t: Tensor, options: StepKLOptions, want_grad: bool) -> Tensor:  # (R, K) -> (3, R)
    """Return (loss, kl, clip fraction) of each row; with `want_grad`, the gradient overwrites log_s."""
    # 0 log 0 below is 0, by replacing NaN. A row whose logits hold a NaN is NaN in every column, so one shows
    # it.
    broken = (log_s[:, 0] + log_t[:, 0]).isnan()
    s = log_s.exp()
    contributions, pull, kl = _contributions(log_s, log_t, s, options)
    if options.clip is None:
        loss, clip_fraction = kl, torch.zeros_like(kl)
    else:
        loss = contributions.clamp(max=options.clip).sum(-1)
        # 0 or 1 in place: masks of bool are several times slower on a CPU.
        kept = contributions.le_(options.clip)
        clip_fraction = (kept.shape[-1] - kept.sum(-1)) / kept.shape[-1]
        pull.clamp_(max=torch.finfo(pull.dtype).max).mul_(kept)  # an infinite contribution is a clipped one
    if want_grad:
        torch.addcmul(pull, s, pull.sum(-1, keepdim=True), value=-1, out=log_s)
    return torch.stack([loss, kl, clip_fraction]).masked_fill_(broken, math.nan)


def _contributions(
    log_s: Tensor,  # (R, K)
    log_t: Tensor,  # (R, K)
    s: Tensor,  # (R, K)
    options: StepKLOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each entry's contribution and pull (two tensors if a clip is to follow), and the rows' kl."""
    if options.divergence == "jsd":
        # The contributions are nonnegative as they are: both clip forms are one.
        log_m = torch.logaddexp(log_s + math.log1p(-options.beta), log_t + math.log(options.beta))
        contributions = _weighted_log_ratio(log_t.exp(), log_t, log_m).mul_(options.beta)
        pull = _weighted_log_ratio(s, log_s, log_m).mul_(1 - options.beta)
        contributions.add_(pull)
        return contributions, pull, contributions.sum(-1)

    nonnegative = options.clip is None or options.clip_form == "nonnegative"
    if options.divergence == "reverse_kl":
        contributions = _weighted_log_ratio(s, log_s, log_t)
        kl = contributions.sum(-1)
        if options.clip is None:
            return contributions, contributions, kl
        if nonnegative:
            return (contributions - s).add_(log_t.exp()), contributions, kl
        return contributions, contributions + s, kl

    t = log_t.exp()
    contributions = _weighted_log_ratio(t, log_t, log_s)
    kl = contributions.sum(-1)
    if nonnegative:
        pull = s - t
        return contributions.add_(pull), pull, kl
    return contributions, t.neg_(), kl


def _weighted_log_ratio(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p log(p / q): 0 where p is 0, infinite where only q is."""
    return (log_p - log_q).mul_(p).nan_to_num_(nan=0.0, posinf=math.inf)
