"""Samples by the Gumbel maximum: the argmax of score = logit / temperature + noise, with little of the noise computed.

The noise of a row and a column is a hash of both, and would be most of a sample's cost. Three facts spare it:

    - No noise is above 33 log 2 = 22.9, that of word 0. A column that ends below a score its row has reached, even with
      that, needs no word. Reached is the best score of earlier columns, or that of the largest logit.
    - Words come in fours, one Philox counter for four columns. Where most counters are needed, all are computed, whole
      rows at a time, which costs less for each.
    - -log(u) is above the noise -log(-log1p(-u)), and the bits of a float, read as an integer, are 2**23 (log2 + 127)
      at powers of 2, and below that between them. So a word bounds its noise without a logarithm. About one column of
      a row can still win then, and gets its noise.

Bounds decide only what is not computed. What can win is computed as everything would be: the sample is that of all the
noise, with ties to the lowest column.
"""

import math

import torch
from torch import Tensor

from ..common.philox import philox

_LARGEST_NOISE = 33 * math.log(2)
# A bound holds in exact arithmetic. With roundings of 2^-24, a column's score exceeds its computed bound by less than
# 8 (|score| + 128) of them: either is a sum of a few numbers of at most |score| + 110, the logarithms of the noise
# (below 23) are off by a few units in the last place, and the bits by one. The reached score is lowered by 64 times
# (|score| + 128) roundings, so that no column that ties with it or wins is left out.
_MARGIN = 2.0**-18
# Counters whose words are computed together: half a MiB for one number of each, of which six are in use.
_COUNTERS = 1 << 16
# Columns of a row whose words may all be computed together.
LONGEST = 4 * _COUNTERS
# One column in so many is looked at to see how many are needed, and the share above which all counters are computed.
_SAMPLED = 16
_MANY = 0.15

_MASK = 0xFFFFFFFF


def scores(
    z: Tensor,  # (R, C) logits
    begin: int,  # first column, a multiple of 4
    inverse_temperature: float,
    seed: Tensor,  # (R,) int64
    reached: Tensor,  # (R,) a score of one column, in here or before
) -> tuple[Tensor, Tensor, Tensor]:  # (M,), (M,), (M,)
    """Return row, column (both int64) and score of at least every column whose score is not below `reached`.

    Columns of NaN are left out. `C` is a multiple of 4.
    """
    # Infinite scores may tie with others, so nothing is left out of their rows.
    floor = torch.where(reached.isinf(), -math.inf, reached - _MARGIN * (reached.abs() + 128))[:, None]
    scaled = z if inverse_temperature == 1 else z * inverse_temperature
    counters = z.shape[1] // 4
    found = []
    if (scaled[:, ::_SAMPLED] >= floor - _LARGEST_NOISE).float().mean() > _MANY:
        counter = torch.arange(begin // 4, begin // 4 + counters, device=z.device)
        rows = max(1, _COUNTERS // counters)
        for first in range(0, z.shape[0], rows):
            part = slice(first, first + rows)
            words = philox(seed[part, None], counter).flatten(1)
            bound = _bound(words, scaled[part])
            able_rows = (bound.amax(1, keepdim=True) >= floor[part]).nonzero()[:, 0]  # a quick look
            able = (bound.index_select(0, able_rows) >= floor[part].index_select(0, able_rows)).nonzero()
            at = able_rows.index_select(0, able[:, 0]) * z.shape[1] + able[:, 1]
            found.append((at + first * z.shape[1], words.flatten().index_select(0, at)))
    else:
        needed = (scaled >= floor - _LARGEST_NOISE).view(torch.int32).flatten().nonzero()[:, 0]
        for fours in needed.split(_COUNTERS):
            row = fours // counters
            words = philox(seed.index_select(0, row), fours - row * counters + begin // 4)
            able = _bound(words, scaled.view(-1, 4).index_select(0, fours)) >= floor.index_select(0, row)
            at = able.flatten().nonzero()[:, 0]
            found.append((4 * fours.index_select(0, at // 4) + at % 4, words.flatten().index_select(0, at)))
    at, words = (torch.cat(x) for x in zip(*found, strict=True)) if found else (seed[:0], seed[:0].int())
    row = at // z.shape[1]
    return row, at - row * z.shape[1], score(z.flatten().index_select(0, at), words, inverse_temperature)


def all_scores(
    z: Tensor,  # (R, C) logits of columns 0, 1, ...
    inverse_temperature: float,
    seed: Tensor,  # (R,) int64
) -> Tensor:  # (R, C)
    """Return every score."""
    counter = torch.arange((z.shape[1] + 3) // 4, device=z.device)
    words = philox(seed[:, None], counter).flatten(1)[:, : z.shape[1]]
    return score(z, words, inverse_temperature)


def _bound(
    words: Tensor,  # (U, W) int32
    scaled: Tensor,  # (U, W) logits / temperature
) -> Tensor:  # (U, W)
    """Return numbers not below the scores."""
    # A word of 2**31 or more is negative here. Its absolute value is no larger, which bounds its noise as well.
    log2 = words.float().abs_().view(torch.int32).to(scaled.dtype)
    return log2.mul_(-math.log(2) * 2.0**-23).add_((127 + 32) * math.log(2)).add_(scaled)


def score(
    logit: Tensor,
    words: Tensor,  # int32, as many
    inverse_temperature: float,
) -> Tensor:
    """Return logit / temperature + noise."""
    return gumbel_of_word(words.long() & _MASK, logit.dtype).add_(logit, alpha=inverse_temperature)


def column_words(
    seed: Tensor,  # (M,) int64
    column: Tensor,  # (M,) int64
) -> Tensor:  # (M,) int32
    """Return the words of columns."""
    return philox(seed, column // 4).gather(-1, (column % 4)[:, None])[:, 0]


def gumbel_of_word(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn 32-bit words (int64) into standard Gumbel noise."""
    # Small words become large noise: the upper tail, which decides the argmax, keeps all 32 bits of
    # resolution.
    uniform = word.to(dtype).add_(0.5).mul_(2.0**-32).clamp_(max=1 - torch.finfo(dtype).eps / 2)
    exponential = uniform.neg_().log1p_().neg_()
    return exponential.log_().neg_()
