"""fused_confidence in tiles of rows and vocabulary, in plain PyTorch.

One pass over the vocabulary per chunk of rows: each tile of logits is reduced to the rows' largest logit,
logsumexp, top-k and best noisy score, and merged with what came before. A later tile wins only if it is
strictly larger, so ties go to the lowest id whatever the tiles are. Small problems are one tile, and then
nothing is merged.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dopsd_kernels.contracts import ConfidenceOutput
from dopsd_kernels.products import full_precision
from dopsd_kernels.topk import stable_topk

# Logits of one tile: 4 MiB in fp32, and ten times that for the noise of a sampling call.
_TILE_LOGITS = 1 << 20
# Rows that share a reading (and conversion) of the weight.
_CHUNK_ROWS = 1024

_MASK = 0xFFFFFFFF


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


def confidence(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    temperature: float,
    seed: Tensor | None,  # (N,) int64; None at temperature 0
    top_k: int,
    exclude: Tensor | None,  # int64 ids
) -> ConfidenceOutput:
    """Return the outputs of `fused_confidence` for flattened rows."""
    count, vocab = hidden.shape[0], weight.shape[0]
    chunks = []
    for start in range(0, max(count, 1), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        chunk_seed = None if seed is None else seed[rows]
        # Multiples of 4: a Philox counter serves four columns.
        tile_columns = max(4, _TILE_LOGITS // max(min(count, _CHUNK_ROWS), weight.shape[1]) // 4 * 4)
        best = None
        for begin in range(0, vocab, tile_columns):
            end = min(begin + tile_columns, vocab)
            z = _logits(hidden[rows], weight[begin:end], None if bias is None else bias[begin:end])
            if exclude is not None:
                inside = exclude if tile_columns >= vocab else exclude[(exclude >= begin) & (exclude < end)] - begin
                z.index_fill_(1, inside, -math.inf)
            tile = _reduce(z, begin, temperature, chunk_seed, top_k)
            best = tile if best is None else _merge(best, tile, top_k)
        assert best is not None  # V >= 1
        chunks.append(best)
    best = chunks[0] if len(chunks) == 1 else _Best(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
    return ConfidenceOutput(
        best.token, best.logit, best.logsumexp, best.max_logit, best.argmax, best.top_values, best.top_indices
    )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    hidden, tile = hidden.to(dtype), weight.to(dtype).T
    with full_precision():
        return hidden @ tile if bias is None else torch.addmm(bias.to(dtype), hidden, tile)


def _reduce(z: Tensor, begin: int, temperature: float, seed: Tensor | None, top_k: int) -> _Best:
    """Reduce a tile of logits (R, C) whose first column is `begin`."""
    max_logit, argmax = z.max(-1)
    score, token, logit = max_logit, argmax, max_logit
    if seed is not None:
        score, token = gumbel_noise(seed, begin, z.shape[1], z.dtype).add_(z, alpha=1 / temperature).max(-1)
        logit = z.gather(-1, token[:, None])[:, 0]
    top_values, top_indices = stable_topk(z, min(top_k, z.shape[1])) if top_k else (z[:, :0], argmax[:, None][:, :0])
    # The largest entry's term is exactly 1, so the sum cannot vanish; a row of -inf alone has the logsumexp
    # -inf.
    shift = max_logit.clamp(min=torch.finfo(z.dtype).min)
    logsumexp = z.sub_(shift[:, None]).exp_().sum(-1).log_().add_(shift)
    return _Best(max_logit, argmax + begin, logsumexp, score, token + begin, logit, top_values, top_indices + begin)


def _merge(a: _Best, b: _Best, top_k: int) -> _Best:
    """Merge two runs of columns, a before b."""
    values = torch.cat([a.top_values, b.top_values], -1)
    indices = torch.cat([a.top_indices, b.top_indices], -1)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    larger, chosen = b.max_logit > a.max_logit, b.score > a.score
    return _Best(
        max_logit=torch.where(larger, b.max_logit, a.max_logit),
        argmax=torch.where(larger, b.argmax, a.argmax),
        logsumexp=torch.logaddexp(a.logsumexp, b.logsumexp),
        score=torch.where(chosen, b.score, a.score),
        token=torch.where(chosen, b.token, a.token),
        logit=torch.where(chosen, b.logit, a.logit),
        top_values=values[:, :top_k],
        top_indices=indices.gather(-1, order)[:, :top_k],
    )


def gumbel_noise(seed: Tensor, begin: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the noise (R, columns) of the rows' seeds from column `begin`, a multiple of 4, on.

    Philox4x32-10 with the seed as key and (column // 4, 0, 0, 0) as counter; column % 4 selects the word.
    """
    # Both of a round's products are one operation on a leading dimension of 2. Words are kept modulo 2**32
    # only where a product needs them clean: wrapped int64 products hold both 32-bit halves, and XOR does not
    # mix bits.
    multiplier = seed.new_tensor([0xD2511F53, 0xCD9E8D57])[:, None, None]
    rounds = torch.arange(10, device=seed.device)[:, None, None]
    increment = seed.new_tensor([0x9E3779B9, 0xBB67AE85])[:, None]
    keys = (torch.stack([seed, seed >> 32]) + rounds * increment)[..., None]  # (10, 2, R, 1)
    counter = torch.arange(begin // 4, begin // 4 + (columns + 3) // 4, device=seed.device)
    even = torch.stack([counter, torch.zeros_like(counter)])[:, None]  # words 0 and 2: (2, 1, C / 4)
    odd = torch.zeros_like(even)  # words 1 and 3
    for key in keys:
        product = (even * multiplier).flip(0)
        even = ((product >> 32) ^ odd ^ key).bitwise_and_(_MASK)
        odd = product
    words = torch.stack([even, odd.bitwise_and_(_MASK)], -1)  # (2, R, C / 4, 2): word 2 a + b at [a, :, :, b]
    word = words.permute(1, 2, 0, 3).reshape(seed.shape[0], 4 * counter.numel())[:, :columns]
    return gumbel_of_word(word, dtype)


def gumbel_of_word(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn 32-bit words (int64) into standard Gumbel noise."""
    # Small words become large noise: the upper tail, which decides the argmax, keeps all 32 bits of
    # resolution.
    uniform = word.to(dtype).add_(0.5).mul_(2.0**-32).clamp_(max=1 - torch.finfo(dtype).eps / 2)
    exponential = uniform.neg_().log1p_().neg_()
    return exponential.log_().neg_()
