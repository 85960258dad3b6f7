"""The divergences of fused_step_kl as functions of Triton: what divergences.py has as functions of tensors.

Each takes s, t and ratio = log(s / t), which is anything where s or t is 0, and returns an entry's contribution, its
term of the divergence without a clip, and its pull. The nonnegative form differs from the plain one only if a clip is
to follow: NONNEGATIVE is true without one.
"""

import triton
import triton.language as tl


@triton.jit
def _reverse_kl(s, t, ratio, beta, NONNEGATIVE: tl.constexpr):
    term = tl.where(s > 0, s * ratio, 0.0)
    if NONNEGATIVE:
        return (term - s) + t, term, term
    return term, term, term + s


@triton.jit
def _forward_kl(s, t, ratio, beta, NONNEGATIVE: tl.constexpr):
    term = tl.where(t > 0, -t * ratio, 0.0)
    if NONNEGATIVE:
        return term + (s - t), term, s - t
    return term, term, -t


@triton.jit
def _jsd(s, t, ratio, beta, NONNEGATIVE: tl.constexpr):
    from_s, from_t = _log_mixture(ratio, beta)
    pull = tl.where(s > 0, -(1 - beta) * s * from_s, 0.0)
    term = pull + tl.where(t > 0, -beta * t * from_t, 0.0)
    return term, term, pull


@triton.jit
def _skew_reverse_kl(s, t, ratio, beta, NONNEGATIVE: tl.constexpr):
    from_s, _from_t = _log_mixture(ratio, beta)
    term = tl.where(s > 0, -s * from_s, 0.0)
    pull = term - tl.where(s > 0, beta * (1 - beta) * tl.exp(-from_s) * (s - t), 0.0)
    if NONNEGATIVE:
        return term - beta * (s - t), term, pull
    return term, term, pull + beta * s


@triton.jit
def _skew_forward_kl(s, t, ratio, beta, NONNEGATIVE: tl.constexpr):
    from_s, from_t = _log_mixture(ratio, beta)
    term = tl.where(t > 0, -t * from_t, 0.0)
    share = tl.where(s > 0, (1 - beta) * tl.exp(-from_s), 0.0)  # of the student in m
    if NONNEGATIVE:
        return term + (1 - beta) * (s - t), term, (1 - beta) * share * (s - t)
    return term, term, -share * t


@triton.jit
def _log_mixture(ratio, beta):
    """Return log(m / s) and log(m / t), by way of the larger of s and t, so that nothing overflows."""
    smaller_over_larger = tl.exp(-tl.abs(ratio))
    share = tl.where(ratio >= 0, beta, 1 - beta)
    above = tl.log((1 - share) + share * smaller_over_larger)  # log(m / larger)
    return tl.where(ratio >= 0, above, above - ratio), tl.where(ratio >= 0, above + ratio, above)


DIVERGENCES = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "jsd": _jsd,
    "skew_reverse_kl": _skew_reverse_kl,
    "skew_forward_kl": _skew_forward_kl,
}
