"""The divergences of fused_step_kl, in plain PyTorch; divergence_kernels.py has the same table for Triton.

With contributions phi_v(s_v, t_v) and pull_v = s_v dphi_v/ds_v on the kept set U (0 elsewhere), every divergence has
the same gradient with respect to the student's logits: pull_j - s_j sum_v pull_v.

Both forms of a divergence have one sum, since s and t have: the nonnegative one adds to the plain one's contributions
the multiple of s - t with which each has its minimum, 0, at s = t. Without a clip both have one gradient too, and the
pulls of the nonnegative form are taken: they vanish at s = t, where those of the other cancel only in the sum.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .contracts import StepKLOptions

# Each entry's contribution and pull (R, K), two tensors if a clip is to follow, and the rows' divergence (R,).
Terms = tuple[Tensor, Tensor, Tensor]


def _reverse_kl(log_s: Tensor, log_t: Tensor, s: Tensor, options: StepKLOptions) -> Terms:
    contributions = _weighted_log_ratio(s, log_s, log_t)
    kl = contributions.sum(-1)
    if options.clip is None:
        return contributions, contributions, kl
    if options.nonnegative:
        return (contributions - s).add_(log_t.exp()), contributions, kl
    return contributions, contributions + s, kl


def _forward_kl(log_s: Tensor, log_t: Tensor, s: Tensor, options: StepKLOptions) -> Terms:
    t = log_t.exp()
    contributions = _weighted_log_ratio(t, log_t, log_s)
    kl = contributions.sum(-1)
    if options.nonnegative:
        pull = s - t
        return contributions.add_(pull), pull, kl
    return contributions, t.neg_(), kl


def _jsd(log_s: Tensor, log_t: Tensor, s: Tensor, options: StepKLOptions) -> Terms:
    # The contributions are nonnegative as they are: both forms are one.
    log_m = _log_mixture(log_s, log_t, options)
    contributions = _weighted_log_ratio(log_t.exp(), log_t, log_m).mul_(options.beta)
    pull = _weighted_log_ratio(s, log_s, log_m).mul_(1 - options.beta)
    contributions.add_(pull)
    return contributions, pull, contributions.sum(-1)


def _skew_reverse_kl(log_s: Tensor, log_t: Tensor, s: Tensor, options: StepKLOptions) -> Terms:
    log_m = _log_mixture(log_s, log_t, options)
    contributions = _weighted_log_ratio(s, log_s, log_m)
    kl = contributions.sum(-1)
    # contribution = s log(s/m) - beta (s - t), pull = s log(s/m) - beta (1 - beta) (s/m) (s - t)
    difference = log_t.exp().neg_().add_(s)
    pull = _ratio(log_s, log_m).mul_(difference).mul_(-options.beta * (1 - options.beta)).add_(contributions)
    if options.nonnegative:
        return contributions.sub_(difference, alpha=options.beta), pull, kl
    return contributions, pull.add_(s, alpha=options.beta), kl


def _skew_forward_kl(log_s: Tensor, log_t: Tensor, s: Tensor, options: StepKLOptions) -> Terms:
    log_m, t, own = _log_mixture(log_s, log_t, options), log_t.exp(), 1 - options.beta
    contributions = _weighted_log_ratio(t, log_t, log_m)
    kl = contributions.sum(-1)
    # contribution = t log(t/m) + (1 - beta) (s - t), pull = (1 - beta)^2 (s/m) (s - t); plain: -(1 - beta) (s/m) t
    pull = _ratio(log_s, log_m)
    if options.nonnegative:
        difference = t.neg_().add_(s)
        return contributions.add_(difference, alpha=own), pull.mul_(difference).mul_(own * own), kl
    return contributions, pull.mul_(t).mul_(-own), kl


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Tensor, StepKLOptions], Terms]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "jsd": _jsd,
    "skew_reverse_kl": _skew_reverse_kl,
    "skew_forward_kl": _skew_forward_kl,
}


def terms(
    log_s: Tensor,  # (R, K)
    log_t: Tensor,  # (R, K)
    s: Tensor,  # (R, K)
    options: StepKLOptions,
) -> Terms:
    """Return each entry's contribution and pull, before a clip, and the rows' divergence."""
    return DIVERGENCES[options.divergence](log_s, log_t, s, options)


def _log_mixture(log_s: Tensor, log_t: Tensor, options: StepKLOptions) -> Tensor:
    """Return log m of m = (1 - beta) s + beta t."""
    return torch.logaddexp(log_s + math.log1p(-options.beta), log_t + math.log(options.beta))


def _weighted_log_ratio(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p log(p / q): 0 where p is 0, infinite where only q is."""
    return (log_p - log_q).mul_(p).nan_to_num_(nan=0.0, posinf=math.inf)


def _ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p / q, 0 where both are."""
    return (log_p - log_q).exp_().nan_to_num_(nan=0.0, posinf=math.inf)
