"""fused_step_kl: the passes over a block of logits.

The logits of a block of rows lie in memory (library products put them there). Per row and split of the vocabulary
one program reads them

    1. _normalizers: the maximum m and the sum l of exp(z - m) on either side,
    2. _row_sums: the loss, the divergence without the clip, the clipped entries, and S = sum of pulls,
    3. _logit_gradient: pull - s S, rounded once to the dtype of the product that follows.

Each pass begins by merging what all splits of the pass before it left for the row, so nothing but the launches
orders them, and the same merge takes the parts of other processes when the vocabulary is sharded. Blocks are large
rather than small. Of a chunk of 256 rows at V = 126464 three passes read 3 x 259 MB and write 65 MB. In blocks of
32 MiB 518 MB of that come from an L2 cache of 50 MB, little faster than the memory, but it takes 30 launches, each with
its start and its end on an idle GPU; in blocks of 128 MiB it takes 12.

With a top-k, whose rest is one more entry, the bucket, the support is one number per row, the k-th largest key of the
teacher's: an entry belongs to it iff its key is not smaller. A key holds the value and, for ties, the column, so the
support has exactly k entries, and every pass streams over all columns alike, with no gather and no limit on the
columns' places.

Logarithms of probabilities are kept as ((z - m) - log l): z - m is exact near the maximum, where a logit of 1e4 with
a plain logsumexp would lose the digits that matter.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import LAUNCH, choose
from ..common.topk import group_topk, ordered_keys
from ..common.topk_kernels import ordered_key
from ..common.vocab_group import VocabGroup
from .contracts import StepKLOptions
from .divergence_kernels import DIVERGENCES

_NORMALIZERS = tl.constexpr(8)  # m and l of the student, of the teacher; with a bucket, of what lies outside
_SUMS = tl.constexpr(4)  # loss, kl, clipped entries, S
# Arguments whose divisors no memory access depends on: a kernel is not compiled again for them.
_VARYING = ("rows", "first_row", "first_column")


@triton.jit
def _load(
    z,  # (R, V) logits, any floating dtype
    bias,  # (V,) fp32, or None
    row_offset,
    columns,
    inside,
    inverse_temperature,
):
    """Columns of a row of logits, in fp32; -inf outside the vocabulary, for exp(-inf) adds nothing."""
    x = tl.load(z + row_offset + columns, mask=inside, other=-float("inf")).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + columns, mask=inside, other=0.0)
    return x * inverse_temperature


@triton.jit
def _extend(m, sum_exp, z):
    """Add a tile of logits to a maximum and the sum of exp(z - m); a tile of -inf alone changes nothing."""
    new = tl.maximum(m, tl.max(z, 0))
    shift = tl.where(new == -float("inf"), 0.0, new)
    return new, sum_exp * tl.exp(m - shift) + tl.sum(tl.exp(z - shift), 0)


@triton.jit
def _merge(
    normalizers,  # (PARTS, R, 8) fp32
    row,
    rows,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
):
    """Return m and log l of a row over all parts; m is 0 and log l -inf where every logit is -inf."""
    part = tl.arange(0, PADDED_PARTS)
    at = normalizers + (part * rows + row) * _NORMALIZERS + FIRST
    m = tl.load(at, mask=part < PARTS, other=-float("inf"))
    sum_exp = tl.load(at + 1, mask=part < PARTS, other=0.0)
    highest = tl.max(m, 0)
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    return shift, tl.log(tl.sum(sum_exp * tl.exp(m - shift), 0))


@triton.jit
def _join(m, log_l, m_rest, log_l_rest):
    """Merge two normalizers, of which the second may be empty (log l of -inf)."""
    highest = tl.maximum(m + log_l, m_rest + log_l_rest)
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    total = tl.exp((m - shift) + log_l) + tl.exp((m_rest - shift) + log_l_rest)
    return shift, tl.log(total)


@triton.jit
def _terms(
    s,
    t,
    ratio,  # log(s / t); anything where s or t is 0
    beta,
    clip,
    DIVERGENCE: tl.constexpr,
    CLIPPED: tl.constexpr,
    NONNEGATIVE: tl.constexpr,
):
    """Return each entry's clipped contribution, its term of the divergence, whether it is clipped, and its pull."""
    contribution, term, pull = DIVERGENCE(s, t, ratio, beta, NONNEGATIVE)
    clipped = contribution > clip
    if CLIPPED:
        return tl.where(clipped, clip, contribution), term, clipped, tl.where(clipped, 0.0, pull)
    return term, term, clipped, pull


@triton.jit
def _bucket(
    normalizers,  # (PARTS, R, 8) fp32
    row,
    rows,
    m_s,
    log_l_s,
    m_t,
    log_l_t,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
):
    """Return the normalizers with the rest added, the rest's probabilities and log ratio, and its own normalizer."""
    m_rest_s, log_rest_s = _merge(normalizers, row, rows, 4, PARTS, PADDED_PARTS)
    m_rest_t, log_rest_t = _merge(normalizers, row, rows, 6, PARTS, PADDED_PARTS)
    m_s, log_l_s = _join(m_s, log_l_s, m_rest_s, log_rest_s)
    m_t, log_l_t = _join(m_t, log_l_t, m_rest_t, log_rest_t)
    log_s = ((m_rest_s - m_s) + log_rest_s) - log_l_s
    log_t = ((m_rest_t - m_t) + log_rest_t) - log_l_t
    return m_s, log_l_s, m_t, log_l_t, tl.exp(log_s), tl.exp(log_t), log_s - log_t, m_rest_s, log_rest_s


@triton.jit
def _probabilities(
    z_s,  # (R, V)
    z_t,  # (R, V)
    bias_s,  # (V,) fp32, or None
    bias_t,  # (V,) fp32, or None
    offset_s,
    offset_t,
    columns,
    inside,
    inverse_temperature,
    m_s,
    log_l_s,
    m_t,
    log_l_t,
):
    """Return s, t and log(s / t) of some columns of a row, and the logits; s and t are 0 outside the vocabulary."""
    x_s = _load(z_s, bias_s, offset_s, columns, inside, inverse_temperature)
    x_t = _load(z_t, bias_t, offset_t, columns, inside, inverse_temperature)
    ratio = ((x_s - m_s) - (x_t - m_t)) - (log_l_s - log_l_t)
    return tl.exp((x_s - m_s) - log_l_s), tl.exp((x_t - m_t) - log_l_t), ratio, x_s, x_t


@triton.jit(do_not_specialize=_VARYING)
def _normalizers(
    z_s,  # (R, V)
    z_t,  # (R, V)
    bias_s,  # (V,) fp32, or None
    bias_t,  # (V,) fp32, or None
    stride_s,
    stride_t,
    threshold,  # (R,) int64 smallest key of the support, or None
    normalizers,  # (SPLITS, R, 8) fp32
    rows,
    first_row,
    vocab,
    first_column,
    split_columns,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row, split = first_row + tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, vocab)
    lowest = -float("inf")
    m_s, m_t, m_rest_s, m_rest_t = lowest, lowest, lowest, lowest
    l_s, l_t, l_rest_s, l_rest_t = 0.0, 0.0, 0.0, 0.0
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < end
        s = _load(z_s, bias_s, row * stride_s, columns, inside, inverse_temperature)
        t = _load(z_t, bias_t, row * stride_t, columns, inside, inverse_temperature)
        if threshold is not None:
            support = ordered_key(t, first_column + columns) >= tl.load(threshold + row)
            m_rest_s, l_rest_s = _extend(m_rest_s, l_rest_s, tl.where(support, lowest, s))
            m_rest_t, l_rest_t = _extend(m_rest_t, l_rest_t, tl.where(support, lowest, t))
            s = tl.where(support, s, lowest)
            t = tl.where(support, t, lowest)
        m_s, l_s = _extend(m_s, l_s, s)
        m_t, l_t = _extend(m_t, l_t, t)
    at = normalizers + (split * rows + row) * _NORMALIZERS
    tl.store(at, m_s)
    tl.store(at + 1, l_s)
    tl.store(at + 2, m_t)
    tl.store(at + 3, l_t)
    if threshold is not None:
        tl.store(at + 4, m_rest_s)
        tl.store(at + 5, l_rest_s)
        tl.store(at + 6, m_rest_t)
        tl.store(at + 7, l_rest_t)


@triton.jit(do_not_specialize=_VARYING)
def _row_sums(
    z_s,  # (R, V)
    z_t,  # (R, V)
    bias_s,  # (V,) fp32, or None
    bias_t,  # (V,) fp32, or None
    stride_s,
    stride_t,
    threshold,  # (R,) int64, or None
    normalizers,  # (PARTS, R, 8) fp32
    sums,  # (SPLITS, R, 4) fp32
    rows,
    first_row,
    vocab,
    first_column,
    split_columns,
    inverse_temperature,
    beta,
    clip,
    DIVERGENCE: tl.constexpr,
    CLIPPED: tl.constexpr,
    NONNEGATIVE: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, split = first_row + tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, vocab)
    m_s, log_l_s = _merge(normalizers, row, rows, 0, PARTS, PADDED_PARTS)
    m_t, log_l_t = _merge(normalizers, row, rows, 2, PARTS, PADDED_PARTS)
    # A row with a NaN logit, or with no finite one, has no distribution: NaN must reach its sums.
    loss = (log_l_s - log_l_s) + (log_l_t - log_l_t)
    kl, count, total = loss, loss, loss
    if threshold is not None:
        m_s, log_l_s, m_t, log_l_t, rest_s, rest_t, rest_ratio, _m_rest, _log_rest = _bucket(
            normalizers, row, rows, m_s, log_l_s, m_t, log_l_t, PARTS, PADDED_PARTS
        )
        rest_contribution, rest_term, rest_clipped, rest_pull = _terms(
            rest_s, rest_t, rest_ratio, beta, clip, DIVERGENCE, CLIPPED, NONNEGATIVE
        )
        once = (split == 0) & (first_column == 0)  # the bucket is one entry of the row, not of the split
        loss += tl.where(once, rest_contribution, 0.0)
        kl += tl.where(once, rest_term, 0.0)
        total += tl.where(once, rest_pull, 0.0)
        if CLIPPED:
            count += tl.where(once & rest_clipped, 1.0, 0.0)
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < end
        s, t, ratio, _x_s, x_t = _probabilities(
            z_s, z_t, bias_s, bias_t, row * stride_s, row * stride_t, columns, inside, inverse_temperature,
            m_s, log_l_s, m_t, log_l_t,
        )  # fmt: skip
        if threshold is not None:
            support = ordered_key(x_t, first_column + columns) >= tl.load(threshold + row)
            s = tl.where(support & inside, s, 0.0)
            t = tl.where(support & inside, t, 0.0)
        contribution, term, clipped, pull = _terms(s, t, ratio, beta, clip, DIVERGENCE, CLIPPED, NONNEGATIVE)
        loss += tl.sum(contribution, 0)
        kl += tl.sum(term, 0)
        total += tl.sum(pull, 0)
        if CLIPPED:
            count += tl.sum(clipped.to(tl.float32), 0)
    at = sums + (split * rows + row) * _SUMS
    tl.store(at, loss)
    tl.store(at + 1, kl)
    tl.store(at + 2, count)
    tl.store(at + 3, total)


@triton.jit(do_not_specialize=_VARYING)
def _logit_gradient(
    z_s,  # (R, V)
    z_t,  # (R, V)
    bias_s,  # (V,) fp32, or None
    bias_t,  # (V,) fp32, or None
    stride_s,
    stride_t,
    threshold,  # (R,) int64, or None
    normalizers,  # (PARTS, R, 8) fp32
    sums,  # (PARTS, R, 4) fp32
    scale,  # (R,) fp32, or None
    gradient,  # (R, V)
    stride_gradient,
    rows,
    first_row,
    vocab,
    first_column,
    split_columns,
    inverse_temperature,
    beta,
    clip,
    DIVERGENCE: tl.constexpr,
    CLIPPED: tl.constexpr,
    NONNEGATIVE: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, split = first_row + tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, vocab)
    m_s, log_l_s = _merge(normalizers, row, rows, 0, PARTS, PADDED_PARTS)
    m_t, log_l_t = _merge(normalizers, row, rows, 2, PARTS, PADDED_PARTS)
    part = tl.arange(0, PADDED_PARTS)
    total = tl.sum(tl.load(sums + (part * rows + row) * _SUMS + 3, mask=part < PARTS, other=0.0), 0)
    if threshold is not None:
        m_s, log_l_s, m_t, log_l_t, rest_s, rest_t, rest_ratio, m_rest, log_rest = _bucket(
            normalizers, row, rows, m_s, log_l_s, m_t, log_l_t, PARTS, PADDED_PARTS
        )
        _rest_contribution, _rest_term, _rest_clipped, rest_pull = _terms(
            rest_s, rest_t, rest_ratio, beta, clip, DIVERGENCE, CLIPPED, NONNEGATIVE
        )
        rest_gradient = rest_pull - rest_s * total
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < end
        s, t, ratio, x_s, x_t = _probabilities(
            z_s, z_t, bias_s, bias_t, row * stride_s, row * stride_t, columns, inside, inverse_temperature,
            m_s, log_l_s, m_t, log_l_t,
        )  # fmt: skip
        _contribution, _term, _clipped, pull = _terms(s, t, ratio, beta, clip, DIVERGENCE, CLIPPED, NONNEGATIVE)
        dz = pull - s * total
        if threshold is not None:
            # An entry of the rest has its share of the bucket's gradient.
            support = ordered_key(x_t, first_column + columns) >= tl.load(threshold + row)
            dz = tl.where(support, dz, rest_gradient * tl.exp((x_s - m_rest) - log_rest))
        if scale is not None:
            dz *= tl.load(scale + row)
        at = gradient + row * stride_gradient + columns
        tl.store(at, dz.to(gradient.dtype.element_ty), mask=inside)


def rows(
    z_s: Tensor,  # (R, V) fp16, bf16 or fp32, columns contiguous
    z_t: Tensor,  # (R, V); its bias may be added to it
    bias_s: Tensor | None,  # (V,) fp32
    bias_t: Tensor | None,  # (V,) fp32
    options: StepKLOptions,
    group: VocabGroup,
    blocks: Sequence[slice],  # of rows, one after the other
    gradient: Tensor | None,  # (R, V), written if given; may share memory with blocks before the one it is written for
    scale: Tensor | None,  # (R,) fp32 factor of each row's gradient
) -> Tensor:
    """Return (row_loss, row_kl, row_clip_fraction) as (3, R) in fp32."""
    count, vocab = z_s.shape
    config = choose("step_kl_rows", z_s.device, 0, 0, group.widest)
    block = config["BLOCK"]
    # A split's columns are whole blocks: its first load is then aligned like the row.
    split_columns = triton.cdiv(triton.cdiv(group.widest, config["SPLITS"]), block) * block
    splits = triton.cdiv(group.widest, split_columns)
    parts = splits * group.size
    threshold = None
    if options.top_k is not None:
        # Before all passes: what a block needs for it, its columns' keys, is no part of a row's own memory.
        if bias_t is not None:
            z_t, bias_t = z_t.add_(bias_t), None
        threshold = torch.cat([_smallest_key(z_t[span], options, group) for span in blocks])
    sides: dict[str, Any] = {
        "z_s": z_s,
        "z_t": z_t,
        "bias_s": bias_s,
        "bias_t": bias_t,
        "stride_s": z_s.stride(0),
        "stride_t": z_t.stride(0),
        "threshold": threshold,
        "rows": count,
    }
    columns: dict[str, Any] = {
        "vocab": vocab,
        "first_column": group.first_column,
        "split_columns": split_columns,
        "inverse_temperature": 1 / options.temperature,
        "BLOCK": block,
        "num_warps": config["num_warps"],
        **LAUNCH,
    }
    terms: dict[str, Any] = {
        "beta": options.beta,
        "clip": 0.0 if options.clip is None else options.clip,
        "DIVERGENCE": DIVERGENCES[options.divergence],
        "CLIPPED": options.clip is not None,
        "NONNEGATIVE": options.nonnegative,
        "PARTS": parts,
        "PADDED_PARTS": triton.next_power_of_2(parts),
    }
    normalizers = z_s.new_empty((splits, count, _NORMALIZERS.value), dtype=torch.float32)
    sums = z_s.new_empty((splits, count, _SUMS.value), dtype=torch.float32)
    # Other processes' parts are exchanged for all rows at once: that costs more than reading logits again.
    for span in blocks if group.size == 1 else [slice(0, count)]:
        grid = (span.stop - span.start, splits)
        _normalizers[grid](normalizers=normalizers, first_row=span.start, **sides, **columns)
        merged = group.gather(normalizers)
        _row_sums[grid](normalizers=merged, sums=sums, first_row=span.start, **sides, **columns, **terms)
        total = group.gather(sums)
        if gradient is None:
            continue
        for part in [span] if group.size == 1 else blocks:
            _logit_gradient[(part.stop - part.start, splits)](
                normalizers=merged,
                sums=total,
                scale=scale,
                gradient=gradient,
                stride_gradient=gradient.stride(0),
                first_row=part.start,
                **sides,
                **columns,
                **terms,
            )
    stats = total.sum(0)[:, :3].T.contiguous()
    stats[2] /= options.entries(group.vocab)
    return stats


def _smallest_key(z_t: Tensor, options: StepKLOptions, group: VocabGroup) -> Tensor:  # (R, V) -> (R,) int64
    """Return the smallest key of each row's top-k."""
    assert options.top_k is not None
    top = group_topk(z_t, options.top_k, group, 1 / options.temperature)
    return ordered_keys(top.values[:, -1], top.ids[:, -1])


def block_rows(vocab: int, device: torch.device) -> int:
    """Return how many rows' logits the passes should go over at a time."""
    config = choose("step_kl_rows", device, 0, 0, vocab)
    return max(1, (config["CACHE_MIB"] << 20) // (2 * vocab * 4))


def row_bytes(device: torch.device) -> int:
    """Return the memory of a row's numbers: those of every split, and their merge."""
    splits = choose("step_kl_rows", device)["SPLITS"]
    return 2 * splits * (_NORMALIZERS.value + _SUMS.value) * 4 + 8
