"""The divergences of fused_step_kl, and its passes over a block of logits, in plain PyTorch.

With contributions phi_v(s_v, t_v) and pull_v = s_v dphi_v/ds_v on the kept set U (0 elsewhere), every divergence has
the same gradient with respect to the student's logits: pull_j - s_j sum_v pull_v.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dopsd_kernels.contracts import StepKLOptions
from dopsd_kernels.topk import group_topk
from dopsd_kernels.topk import row_bytes as topk_row_bytes
from dopsd_kernels.vocab_group import VocabGroup

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
    contributions, pull, kl = _contributions(log_s, log_t, s, options)
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
