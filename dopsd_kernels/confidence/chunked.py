"""fused_confidence in tiles of rows and vocabulary, in plain PyTorch.

One pass over the vocabulary per chunk of rows: each tile of logits brings the rows' largest logit, logsumexp, top-k
and best noisy score up to date. A later tile wins only if it is strictly larger, so ties go to the lowest id whatever
the tiles are. As everywhere in PyTorch, NaN is the largest. Small problems are one tile, and then nothing is merged.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.products import compute_dtype, full_precision
from ..common.topk import stable_topk
from . import gumbel
from .contracts import ConfidenceOutput

# Logits of one tile, and numbers of its weight and of its rows' hidden states where these are converted: 4 MiB each in
# fp32, 8 in fp64. Half as many would spare half of it, and take 5 % longer, or 10 with a top-k.
_TILE_LOGITS = 1 << 20
# A problem of so few logits is done faster with all of its noise than by finding out what it does not need.
_SMALL = 1 << 15
# Rows that share a reading (and conversion) of the weight.
_CHUNK_ROWS = 1024


class _Best(NamedTuple):
    """What is known of a chunk's rows after some tiles."""

    max_logit: Tensor  # (R,)
    argmax: Tensor  # (R,)
    logsumexp: Tensor  # (R,)
    score: Tensor  # (R,) of token: its logit, or its noisy logit
    token: Tensor  # (R,)
    logit: Tensor  # (R,) of token
    top_values: Tensor  # (R, k)
    top_indices: Tensor  # (R, k)
    entropy: Tensor  # (R,), or (R, 0) if it is not asked for


def confidence(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    temperature: float,
    seed: Tensor | None,  # (N,) int64; None at temperature 0
    top_k: int,
    exclude: Tensor | None,  # int64 ids
    entropy: bool,
) -> ConfidenceOutput:
    """Return the outputs of `fused_confidence` for flattened rows."""
    (count, width), vocab, dtype = hidden.shape, weight.shape[0], compute_dtype(hidden)
    # Multiples of 4: a Philox counter serves four columns.
    most = _CHUNK_ROWS if hidden.dtype == dtype else max(1, min(_CHUNK_ROWS, _TILE_LOGITS // width))
    column_numbers = max(min(count, most), 1 if weight.dtype == dtype else width)
    tile_columns = min(max(4, _TILE_LOGITS // column_numbers // 4 * 4), gumbel.LONGEST)
    chunks = []
    for start in range(0, max(count, 1), most):
        rows = slice(start, start + most)
        chunk = hidden[rows].to(dtype)
        chunk_seed = None if seed is None else seed[rows]
        best = None
        for begin in range(0, vocab, tile_columns):
            end = min(begin + tile_columns, vocab)
            z = _logits(chunk, weight[begin:end], None if bias is None else bias[begin:end])
            if exclude is not None:
                inside = exclude if tile_columns >= vocab else exclude[(exclude >= begin) & (exclude < end)] - begin
                z.index_fill_(1, inside, -math.inf)
            best = _add(best, z, begin, temperature, chunk_seed, top_k, entropy)
            del z  # before the next one is made
        assert best is not None  # V >= 1
        chunks.append(best)
    best = chunks[0] if len(chunks) == 1 else _Best(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
    return ConfidenceOutput(
        best.token,
        best.logit,
        best.logsumexp,
        best.max_logit,
        best.argmax,
        best.top_values,
        best.top_indices,
        best.entropy,
    )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    tile = weight.to(hidden.dtype).T
    with full_precision():
        return hidden @ tile if bias is None else torch.addmm(bias.to(hidden.dtype), hidden, tile)


def _add(
    best: _Best | None,  # of the columns before; None if there are none
    z: Tensor,  # (R, C) logits, overwritten
    begin: int,  # first column
    temperature: float,
    seed: Tensor | None,  # (R,)
    top_k: int,
    entropy: bool,
) -> _Best:
    """Bring what is known of the rows up to date with the next tile."""
    if best is None:
        peak, argmax = z.max(-1)
        max_logit = peak
    else:
        peak = z.amax(-1)  # a fraction of the cost of finding where it is
        max_logit, gained = torch.maximum(peak, best.max_logit), _larger(peak, best.max_logit).nonzero()[:, 0]
        argmax = best.argmax.index_copy(0, gained, z.index_select(0, gained).argmax(-1).add_(begin))
    score, token, logit = max_logit, argmax, max_logit
    if seed is not None:
        score, token, logit = _sample(best, z, begin, 1 / temperature, seed, max_logit, argmax)
    nothing = z.new_empty((len(z), 0)), argmax.new_empty((len(z), 0))  # no views: outputs may not share memory
    top_values, top_indices = _top(best, z, begin, top_k) if top_k else nothing
    # The largest entry's term is exactly 1, so the sum cannot vanish; a row of -inf alone has the logsumexp
    # -inf.
    shift = peak.clamp(min=torch.finfo(z.dtype).min)
    z.sub_(shift[:, None])
    exponentials = z.exp() if entropy else z.exp_()
    total = exponentials.sum(-1)
    tile_entropy = z.new_empty((len(z), 0))
    if entropy:
        # sum p log(1/p) with p = exp(z) / total; 0 where p is. A row of NaN has a total of NaN.
        tile_entropy = total.log() - exponentials.mul_(z).nan_to_num_(nan=0.0).sum(-1) / total
    logsumexp = total.log_().add_(shift)
    if best is not None:
        merged = torch.logaddexp(best.logsumexp, logsumexp)
        if entropy:
            # That of what falls into either part, and of which part it is. A part without mass adds nothing to it.
            both = torch.stack([best.logsumexp, logsumexp])
            log_p = both - merged
            of_parts = torch.stack([best.entropy, tile_entropy]) - log_p
            tile_entropy = torch.where(both == -math.inf, 0, log_p.exp() * of_parts).sum(0)
        logsumexp = merged
    return _Best(max_logit, argmax, logsumexp, score, token, logit, top_values, top_indices, tile_entropy)


def _larger(a: Tensor, b: Tensor) -> Tensor:  # (R,), (R,) -> (R,) bool
    return (a > b) | (a.isnan() & ~b.isnan())


def _top(best: _Best | None, z: Tensor, begin: int, top_k: int) -> tuple[Tensor, Tensor]:  # (R, k), (R, k)
    """Return the largest logits and their columns, with those of the columns before."""
    values, indices = stable_topk(z, min(top_k, z.shape[1]))
    if best is None:
        return values, indices.add_(begin)
    values, indices = torch.cat([best.top_values, values], -1), torch.cat([best.top_indices, indices.add_(begin)], -1)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values[:, :top_k], indices.gather(-1, order)[:, :top_k]


def _sample(
    best: _Best | None,
    z: Tensor,  # (R, C)
    begin: int,
    inverse_temperature: float,
    seed: Tensor,  # (R,)
    max_logit: Tensor,  # (R,) of all columns so far
    argmax: Tensor,  # (R,)
) -> tuple[Tensor, Tensor, Tensor]:  # (R,), (R,), (R,)
    """Return the best score so far, its token and that token's logit."""
    if best is None and z.numel() <= _SMALL:
        score, token = gumbel.all_scores(z, inverse_temperature, seed).max(-1)
        return score, token, z.gather(-1, token[:, None])[:, 0]
    # The largest logit is likely to win: its score comes first, and spares the noise of what ends below it.
    score, token = gumbel.score(max_logit, gumbel.column_words(seed, argmax), inverse_temperature), argmax
    if best is not None:
        leads = _larger(score, best.score)
        score, token = torch.where(leads, score, best.score), torch.where(leads, argmax, best.token)
    filled = pad(z, (0, -z.shape[1] % 4), value=-math.inf) if z.shape[1] % 4 else z
    row, column, scores = gumbel.scores(filled, begin, inverse_temperature, seed, score)
    largest = score.scatter_reduce(0, row, scores, "amax")
    wins = scores == largest.index_select(0, row)
    # Where scores are equal, the lowest id: that of an earlier tile stays.
    token = torch.where(largest > score, begin + z.shape[1], token)
    token = token.scatter_reduce(0, row[wins], column[wins].add_(begin), "amin")
    logit = z.gather(-1, (token - begin).clamp_(min=0)[:, None])[:, 0]
    if best is not None:
        logit = torch.where(token < begin, best.logit, logit)
    return largest, token, logit
