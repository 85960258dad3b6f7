"""The passes of fused_step_kl over a block of logits, in plain PyTorch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.topk import group_topk
from ..common.topk import row_bytes as topk_row_bytes
from ..common.vocab_group import VocabGroup
from .contracts import StepKLOptions
from .divergences import terms

# Temporaries, in rows of V or of top_k entries of the logits' dtype.
_VOCAB_TEMPORARIES = 5
TOP_K_TEMPORARIES = 12


def row_bytes(vocab: int, options: StepKLOptions, dtype: torch.dtype) -> int:
    """Return the memory that `rows` needs per row, beside the logits."""
    over_vocab = dtype.itemsize * _VOCAB_TEMPORARIES * vocab
    if options.top_k is None:
        return over_vocab
    # The top-k is found before anything else.
    entries = options.entries(vocab)
    return max(over_vocab, topk_row_bytes(vocab, options.top_k)) + dtype.itemsize * TOP_K_TEMPORARIES * entries


def rows(
    z_s: Tensor,  # (R, V) fp32 or fp64; overwritten
    z_t: Tensor,  # (R, V); overwritten
    bias_s: Tensor | None,  # (V,)
    bias_t: Tensor | None,  # (V,)
    options: StepKLOptions,
    group: VocabGroup,
    blocks: Sequence[slice],  # of rows, one after the other; a block's temporaries exist at once
    gradient: Tensor | None,  # (R, V), written if given; z_s, or memory of blocks before the one it is written for
    scale: Tensor | None,  # (R,) factor of each row's gradient
) -> Tensor:
    """Return (row_loss, row_kl, row_clip_fraction) as (3, R)."""
    stats = []
    for block in blocks:
        for z, bias in ((z_s[block], bias_s), (z_t[block], bias_t)):
            if bias is not None:
                z.add_(bias)
            if options.temperature != 1:
                z.mul_(1 / options.temperature)
        stats.append(_logit_gradient(z_s[block], z_t[block], options, group, gradient is not None))
        if gradient is not None:
            if scale is not None:
                z_s[block].mul_(scale[block, None])
            if gradient is not z_s:
                gradient[block].copy_(z_s[block])
    return torch.cat(stats, dim=1)


def _logit_gradient(z_s: Tensor, z_t: Tensor, options: StepKLOptions, group: VocabGroup, want_grad: bool) -> Tensor:
    """Return the rows' (loss, kl, clip fraction); with `want_grad`, the gradient ends in z_s."""
    if options.top_k is None:
        log_s, log_t = _log_softmax(z_s, group), _log_softmax(z_t, group)
        return divergence(log_s, log_t, options, want_grad, group)

    # The teacher's top-k, and one more entry whose logit is the logsumexp of the rest. Every process of a group has
    # all of them, so that nothing below is reduced.
    alone = VocabGroup.of(None, options.entries(group.vocab), z_s.device)
    top = group_topk(z_t, options.top_k, group)
    support_s = group.sum(top.local(z_s.gather(-1, top.columns)))
    nothing = torch.full_like(support_s, -math.inf)
    for z in (z_s, z_t):
        z.scatter_reduce_(-1, top.columns, top.local(nothing, math.inf), "amin")
    rest_s, rest_t = (group.gather(z.logsumexp(-1)[None]).logsumexp(0)[:, None] for z in (z_s, z_t))
    grad = torch.cat([support_s, rest_s], -1).log_softmax(-1)
    stats = divergence(grad, torch.cat([top.values, rest_t], -1).log_softmax(-1), options, want_grad, alone)
    if want_grad:
        # An entry of the rest gets its share of the bucket's gradient; an empty rest has no shares.
        z_s.sub_(rest_s.masked_fill(rest_s == -math.inf, 0)).exp_().mul_(grad[:, -1:])
        z_s.scatter_add_(-1, top.columns, top.local(grad[:, :-1]))
    return stats


def _log_softmax(z: Tensor, group: VocabGroup) -> Tensor:
    """Turn logits into logarithms of probabilities in place."""
    if group.group is None:
        return torch.log_softmax(z, -1, out=z)
    highest = z.amax(-1)
    highest.masked_fill_(highest == -math.inf, torch.finfo(z.dtype).min)
    log_sum = z.sub_(highest[:, None]).logsumexp(-1)
    all_highest, all_log_sums = group.gather(torch.stack([highest, log_sum])[None]).unbind(1)
    overall = all_highest.amax(0)
    log_total = ((all_highest - overall) + all_log_sums).logsumexp(0)
    return z.sub_(((overall - highest) + log_total)[:, None])


def divergence(log_s: Tensor, log_t: Tensor, options: StepKLOptions, want_grad: bool, group: VocabGroup) -> Tensor:
    """Return (loss, kl, clip fraction) (3, R) of log s and log t (R, K); with `want_grad`, the gradient is in log_s."""
    # 0 log 0 below is 0, by replacing NaN. A row whose logits hold a NaN is NaN in every column, so one shows it.
    broken = (log_s[:, 0] + log_t[:, 0]).isnan()
    s = log_s.exp()
    contributions, pull, kl = terms(log_s, log_t, s, options)
    loss, clipped = kl, torch.zeros_like(kl)
    if options.clip is not None:
        loss = contributions.clamp(max=options.clip).sum(-1)
        # 0 or 1 in place: masks of bool are several times slower on a CPU.
        kept = contributions.le_(options.clip)
        clipped = kept.shape[-1] - kept.sum(-1)
        pull.clamp_(max=torch.finfo(pull.dtype).max).mul_(kept)  # an infinite contribution is a clipped one
    sums = group.sum(torch.stack([loss, kl, clipped, pull.sum(-1) if want_grad else kl]))
    if want_grad:
        torch.addcmul(pull, s, sums[3, :, None], value=-1, out=log_s)
    sums[2] /= group.vocab
    return sums[:3].masked_fill(broken, math.nan)
