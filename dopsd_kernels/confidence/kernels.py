"""fused_confidence: an LM head's product and everything that is asked of its logits, in one pass over the weight.

A program has a tile of rows and a contiguous share of the vocabulary (a split). For one tile of columns after the
other it computes the logits, and reduces them at once to what is known of its rows so far:

    - the key (see topk.py) of the largest logit, which is maximum and argmax together,
    - the sum of exp(logit - maximum), rescaled whenever the maximum grows,
    - for an entropy: the sum of (logit - maximum) exp(logit - maximum), likewise,
    - for a sample: the key of the largest logit / temperature + noise, and that token's logit,
    - for a top-k: the keys of the k largest logits.

A second kernel merges a row's splits. Keys decide every comparison, so ties go to the lowest column, and how the
vocabulary is divided changes nothing but the rounding of the sum.

Few rows (decoding) are bound by reading the weight once, so there are as many splits as keep the GPU's memory busy.
Many rows are an ordinary product: programs that run together are a group of row tiles with the same columns, whose
weight tiles and hidden states they share in the L2 cache.

A configuration is a tile of BLOCK_N x BLOCK_V logits, ROW_BYTES of every row per step of the product, GROUP row tiles
that run together, and the number of splits: PROGRAMS per multiprocessor, and SPLITS at least.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import LAUNCH, choose
from ..common.philox_kernels import philox_words
from ..common.topk_kernels import LOWEST_KEY, insert_largest, key_column, key_value, largest_key, ordered_key
from .contracts import ConfidenceOutput

# A row's keys that the merge reads at a time.
_MERGE_KEYS = 1024
# The largest top-k whose keys leave room in registers for tiles of 128 rows, alone and with a sample.
_FEW_KEYS, _FEW_KEYS_OF_SAMPLE = 32, 2
_LOWEST_KEY = tl.constexpr(LOWEST_KEY)
# Above the noise of every word: that of word 0 is 33 log 2 = 22.874.
_LARGEST_NOISE = tl.constexpr(22.88)

# ------------------------------------------------------------------------------------------------------------
# Noise
# ------------------------------------------------------------------------------------------------------------


@triton.jit
def gumbel_noise(
    seed,  # (R,) int64
    begin,  # first column, a multiple of 4
    COLUMNS: tl.constexpr,
):
    """Return the standard Gumbel noise (R, COLUMNS) that `reference.gumbel_noise` defines."""
    return gumbel_of_word(philox_words(seed, begin, COLUMNS))


@triton.jit
def gumbel_of_word(word):  # uint32
    """Turn 32-bit words into standard Gumbel noise.

    -log1p(-u) is log(1 - u) only where that keeps its digits. Below 1/8 it is the series u + u^2/2 + ... + u^8/8,
    whose remainder is below u^8/9 = 7e-9 of it. Above, rounding 1 - u (by at most 2^-25) changes it by at most 2.6e-7
    of it. The noise is off by as much, absolutely, beside the rounding of the two logarithms.
    """
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    series = 1 / 7 + u * (1 / 8)
    series = 1 / 5 + u * (1 / 6 + u * series)
    series = 1 / 3 + u * (1 / 4 + u * series)
    series = u * (1 + u * (1 / 2 + u * series))
    return -tl.log(tl.where(u < 0.125, series, -tl.log(1 - u)))


# ------------------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------------------


@triton.jit
def _shift(maximum):
    """Return what to subtract before exp: the maximum, but 0 for an infinite one, for inf - inf is NaN."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit
def _weighted(z):
    """Return z exp(z), 0 for -inf."""
    return tl.where(z == -float("inf"), 0.0, z) * tl.exp(z)


@triton.jit
def _moved(weighted, total, change):
    """Return the sum of z exp(z) when every z changes by as much; `total` is that of exp(z)."""
    return (weighted + tl.where(total == 0, 0.0, change) * total) * tl.exp(change)


@triton.jit(do_not_specialize=["rows", "splits", "split_tiles"])
def _confidence(
    hidden,  # (N, d), the last stride is 1
    weight,  # (V, d)
    bias,  # (V,) fp32, or None
    seed,  # (N,) int64, or None
    largest,  # (N, S) int64: keys of the largest logits
    total,  # (N, S) fp32: sums of exp(logit - largest)
    weighted,  # (N, S) fp32: sums of (logit - largest) exp(logit - largest); None without an entropy
    chosen,  # (N, S) int64: keys of the largest scores; None without a sample
    chosen_logit,  # (N, S) fp32; None without a sample
    top,  # (N, S, TOP_K) int64: keys of the largest logits, in any order; None without a top-k
    rows,  # N
    vocab,  # V
    width,  # d
    hidden_stride,  # of rows
    weight_stride,  # of rows
    weight_step,  # of columns
    splits,  # S
    split_tiles,  # vocabulary tiles of a split
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    SAMPLE: tl.constexpr,
    TOP_K: tl.constexpr,  # a power of 2, or 0
    UPCAST: tl.constexpr,  # convert operands to fp32
    OFFSET: tl.constexpr,  # type of offsets inside a tile: int32, or int64 where strides are too large for it
    EVEN_WIDTH: tl.constexpr,  # BLOCK_K divides d
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # row tiles that are computed together
):
    row_tiles = tl.cdiv(rows, BLOCK_N)
    program = tl.program_id(0)
    first_tile = program // (GROUP * splits) * GROUP
    group = tl.minimum(row_tiles - first_tile, GROUP)
    split = program % (GROUP * splits) // group
    first_row = (first_tile + program % (GROUP * splits) % group) * BLOCK_N
    step = tl.arange(0, BLOCK_K)
    # Inside a tile 32-bit offsets take half the registers of pointers. Rows and columns beyond the end read the last
    # one instead, so that no load needs a mask for them.
    tile_row = tl.minimum(tl.arange(0, BLOCK_N), rows - 1 - first_row)
    hidden_tile = hidden + first_row.to(tl.int64) * hidden_stride
    hidden_offset = tile_row.to(OFFSET)[:, None] * hidden_stride + step[None, :]
    best = tl.full((BLOCK_N,), _LOWEST_KEY, tl.int64)
    sum_exp = tl.zeros((BLOCK_N,), tl.float32)
    if weighted is not None:
        sum_weighted = tl.zeros((BLOCK_N,), tl.float32)
    if SAMPLE:
        best_score = tl.full((BLOCK_N,), _LOWEST_KEY, tl.int64)
        best_logit = tl.zeros((BLOCK_N,), tl.float32)
    if TOP_K > 0:
        kept = tl.full((BLOCK_N, TOP_K), _LOWEST_KEY, tl.int64)

    tiles = tl.cdiv(vocab, BLOCK_V)
    for tile in range(split * split_tiles, tl.minimum((split + 1) * split_tiles, tiles)):
        begin = tile * BLOCK_V
        tile_column = tl.minimum(tl.arange(0, BLOCK_V), vocab - 1 - begin)
        weight_tile = weight + tl.cast(begin, tl.int64) * weight_stride
        weight_offset = tile_column.to(OFFSET)[None, :] * weight_stride + step.to(OFFSET)[:, None] * weight_step
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for start in range(0, width, BLOCK_K):
            at_hidden = hidden_tile + start + hidden_offset
            at_weight = weight_tile + tl.cast(start, tl.int64) * weight_step + weight_offset
            if EVEN_WIDTH:
                h = tl.load(at_hidden)
                w = tl.load(at_weight)
            else:
                h = tl.load(at_hidden, mask=step[None, :] < width - start, other=0.0)
                w = tl.load(at_weight, mask=step[:, None] < width - start, other=0.0)
            if UPCAST:
                h = h.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(h, w, z, input_precision="ieee")

        column = begin + tl.arange(0, BLOCK_V)
        if HAS_BIAS:
            b = tl.load(bias + column, mask=column < vocab, other=-float("inf"))[None, :]
            z = tl.where(b == -float("inf"), -float("inf"), z + b)  # whatever the product is, NaN included
        else:
            z = tl.where(column[None, :] < vocab, z, -float("inf"))

        previous = key_value(best)
        tile_best = largest_key(z, column[None, :])
        if SAMPLE:
            # Most of a confident row's tiles end far below what it has reached, and then get no noise. The last term is
            # 16 roundings of the best score. Neither NaN nor infinities compare as too low.
            reached = key_value(best_score)
            highest = key_value(tile_best) * inverse_temperature + _LARGEST_NOISE
            too_low = highest < reached - tl.abs(reached) * 2.0**-20
            # The keys of a large top-k would not fit beside a branch, so there is none with them.
            can_win = (tl.min(too_low.to(tl.int32), 0) == 0) | (TOP_K > 32)
        best = tl.maximum(best, tile_best)
        shift = _shift(key_value(best))
        if weighted is not None:
            sum_weighted = _moved(sum_weighted, sum_exp, previous - shift) + tl.sum(_weighted(z - shift[:, None]), 1)
        sum_exp = sum_exp * tl.exp(previous - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
        if TOP_K > 0:
            kept = insert_largest(kept, ordered_key(z, column[None, :]))
        if SAMPLE:  # noqa: SIM102 (known when compiling; the other, when running)
            if can_win:
                # Volatile, so that it stays in the loop: else the keys of Philox' rounds wait in registers throughout.
                row_seed = tl.load(seed + first_row + tile_row, volatile=True)
                score = z * inverse_temperature + gumbel_noise(row_seed, begin, BLOCK_V)
                tile_score = largest_key(score, column[None, :])
                tile_logit = tl.sum(tl.where(column[None, :] == key_column(tile_score)[:, None], z, 0.0), 1)
                best_logit = tl.where(tile_score > best_score, tile_logit, best_logit)
                best_score = tl.maximum(best_score, tile_score)

    row = first_row + tl.arange(0, BLOCK_N)
    at = row.to(tl.int64) * splits + split
    inside = row < rows
    tl.store(largest + at, best, mask=inside)
    tl.store(total + at, sum_exp, mask=inside)
    if weighted is not None:
        tl.store(weighted + at, sum_weighted, mask=inside)
    if SAMPLE:
        tl.store(chosen + at, best_score, mask=inside)
        tl.store(chosen_logit + at, best_logit, mask=inside)
    if TOP_K > 0:
        tl.store(top + at[:, None] * TOP_K + tl.arange(0, TOP_K)[None, :], kept, mask=inside[:, None])


@triton.jit(do_not_specialize=["splits", "count"])
def _merge(
    largest,  # (N, S) int64; these six as `_confidence` leaves them
    total,  # (N, S) fp32
    weighted,  # (N, S) fp32, or None
    chosen,  # (N, S) int64, or None
    chosen_logit,  # (N, S) fp32, or None
    top,  # (N, S, TOP_K) int64, or None
    token,  # (N,) int64; this and the next are written with SAMPLE
    logit,  # (N,) fp32
    logsumexp,  # (N,) fp32
    max_logit,  # (N,) fp32
    argmax,  # (N,) int64
    top_values,  # (N, count) fp32; this and the next are written with TOP_K
    top_indices,  # (N, count) int64
    entropy,  # (N,) fp32, written with `weighted`
    splits,  # S
    count,  # how many of the largest logits are asked for
    SAMPLE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_S: tl.constexpr,  # at least S
    BLOCK_KEYS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    at = row * splits + split
    inside = split < splits
    keys = tl.load(largest + at, mask=inside, other=_LOWEST_KEY)
    best = tl.max(keys, 0)
    shift = _shift(key_value(best))
    split_total = tl.load(total + at, mask=inside, other=0.0)
    change = key_value(keys) - shift
    sum_exp = tl.sum(split_total * tl.exp(change), 0)
    tl.store(logsumexp + row, shift + tl.log(sum_exp))
    if weighted is not None:
        split_weighted = tl.load(weighted + at, mask=inside, other=0.0)
        tl.store(entropy + row, tl.log(sum_exp) - tl.sum(_moved(split_weighted, split_total, change), 0) / sum_exp)
    tl.store(max_logit + row, key_value(best))
    tl.store(argmax + row, key_column(best))
    if SAMPLE:
        scores = tl.load(chosen + at, mask=inside, other=_LOWEST_KEY)
        best_score = tl.max(scores, 0)
        logits = tl.load(chosen_logit + at, mask=inside, other=0.0)
        tl.store(token + row, key_column(best_score))
        tl.store(logit + row, tl.sum(tl.where(scores == best_score, logits, 0.0), 0))
    if TOP_K > 0:
        kept = tl.full((1, TOP_K), _LOWEST_KEY, tl.int64)
        for start in range(0, splits * TOP_K, BLOCK_KEYS):
            i = start + tl.arange(0, BLOCK_KEYS)
            candidates = tl.load(top + row * splits * TOP_K + i, mask=i < splits * TOP_K, other=_LOWEST_KEY)
            kept = insert_largest(kept, candidates[None, :])
        kept = tl.reshape(kept, (TOP_K,))
        rank = tl.sum((kept[None, :] > kept[:, None]).to(tl.int32), 1)  # keys differ, so ranks do
        place = row * count + rank
        tl.store(top_values + place, key_value(kept), mask=rank < count)
        tl.store(top_indices + place, key_column(kept), mask=rank < count)


# ------------------------------------------------------------------------------------------------------------
# Launch
# ------------------------------------------------------------------------------------------------------------


def confidence(
    output: ConfidenceOutput,  # written; without a seed, token and logit are not
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    temperature: float,
    seed: Tensor | None,  # (N,) int64; None at temperature 0
    top_k: int,
    exclude: Sequence[int],
    entropy: bool,
) -> None:
    """Compute `fused_confidence` for flattened rows of fp16, bf16 or fp32. Nothing waits for the GPU."""
    count, width = hidden.shape
    vocab = weight.shape[0]
    if count == 0:
        return
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    bias = _full_bias(bias, vocab, hidden.device, exclude)
    # The interpreter takes bf16 for integers unless it is converted first.
    upcast = hidden.dtype != weight.dtype or (hidden.dtype == torch.bfloat16 and triton.knobs.runtime.interpret)
    itemsize = 4 if upcast else hidden.itemsize
    # A sample and a top-k need more registers than a bare argmax, and fp32 products or many keys of a row even more.
    if itemsize == 4 or top_k > (_FEW_KEYS if seed is None else _FEW_KEYS_OF_SAMPLE):
        name = "confidence_wide"
    else:
        name = "confidence_argmax" if seed is None and not top_k else "confidence"
    config = choose(name, hidden.device, count, width, vocab)
    block_n, block_v, block_k = config["BLOCK_N"], config["BLOCK_V"], config["ROW_BYTES"] // itemsize
    launch = {"num_warps": config["num_warps"], "num_stages": config["num_stages"], **LAUNCH}
    reach = max(block_n * hidden.stride(0), block_v * weight.stride(0) + block_k * weight.stride(1))

    row_tiles, tiles = _cdiv(count, block_n), _cdiv(vocab, block_v)
    programs = config["PROGRAMS"] * _multiprocessors(hidden.device)
    # Rounded down: a few programs more than run at once would take as long as all of them.
    splits = max(programs // row_tiles, config["SPLITS"])
    split_tiles = _cdiv(tiles, splits)
    splits = _cdiv(tiles, split_tiles)

    kept = _power_of_2(top_k) if top_k else 0
    parts: dict[str, Any] = {
        "largest": hidden.new_empty((count, splits), dtype=torch.int64),
        "total": hidden.new_empty((count, splits), dtype=torch.float32),
        "weighted": hidden.new_empty((count, splits), dtype=torch.float32) if entropy else None,
        "chosen": None,
        "chosen_logit": None,
        "top": hidden.new_empty((count, splits, kept), dtype=torch.int64) if top_k else None,
    }
    if seed is not None:
        parts["chosen"] = torch.empty_like(parts["largest"])
        parts["chosen_logit"] = torch.empty_like(parts["total"])
    on_gpu = hidden.device.type == "cuda"
    with torch.cuda.device_of(hidden) if on_gpu else contextlib.nullcontext():
        _confidence[(row_tiles * splits,)](
            hidden,
            weight,
            bias,
            seed,
            **parts,
            rows=count,
            vocab=vocab,
            width=width,
            hidden_stride=hidden.stride(0),
            weight_stride=weight.stride(0),
            weight_step=weight.stride(1),
            splits=splits,
            split_tiles=split_tiles,
            inverse_temperature=0.0 if seed is None else 1 / temperature,
            HAS_BIAS=bias is not None,
            SAMPLE=seed is not None,
            TOP_K=kept,
            UPCAST=upcast,
            OFFSET=tl.int32 if reach < 1 << 31 else tl.int64,
            EVEN_WIDTH=width % block_k == 0,
            BLOCK_N=block_n,
            BLOCK_V=block_v,
            BLOCK_K=block_k,
            GROUP=config["GROUP"],
            **launch,
        )
        _merge[(count,)](
            **parts,
            **output._asdict(),
            splits=splits,
            count=top_k,
            SAMPLE=seed is not None,
            TOP_K=kept,
            BLOCK_S=_power_of_2(splits),
            BLOCK_KEYS=min(_MERGE_KEYS, _power_of_2(splits * max(kept, 1))),
            num_warps=4 if top_k else 1,
            **LAUNCH,
        )


def _full_bias(bias: Tensor | None, vocab: int, device: torch.device, exclude: Sequence[int]) -> Tensor | None:
    """Return the bias in fp32 with -inf for excluded ids; None if every entry is 0."""
    if not exclude:
        return None if bias is None else bias.float().contiguous()
    if bias is None:
        full = torch.zeros(vocab, device=device)
    else:
        full = bias.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    # An upload from pageable memory would wait for the GPU.
    ids = torch.tensor(exclude, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return full.index_fill_(0, ids, -torch.inf)


# As triton.cdiv and triton.next_power_of_2, whose wrapper takes longer than everything else here but the launches.
def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:  # at least n, which is at least 1
    return 1 << (n - 1).bit_length()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
