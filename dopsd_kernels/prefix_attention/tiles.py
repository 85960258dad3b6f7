"""Tiles of rows and of keys in the kernels: where they lie, and which rows see which keys."""

import triton
import triton.language as tl


@triton.jit
def place(program, tiles, heads):
    """Return a program's tile, group and head. The tiles of a head are neighbours: they read the same tensors.

    Everything is on the grid's first axis, since the others end at 65535.
    """
    index = program // tiles
    return program % tiles, (index // heads).to(tl.int64), (index % heads).to(tl.int64)


@triton.jit
def load_tile(
    x,
    offset,  # (R,) int64: where rows begin
    inside,  # (R,)
    width,
    UPCAST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Load (R, BLOCK_D) elements; 0 outside."""
    d = tl.arange(0, BLOCK_D)
    tile = tl.load(x + offset[:, None] + d[None, :], mask=inside[:, None] & (d < width)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_reach(
    prefix_length,  # (G, S) int32
    row,  # (R,)
    inside,  # (R,)
    group,
    rows,
    length,
):
    """Load (R,): of how many of the prefix' keys, from the first, rows see any."""
    return tl.load(prefix_length + group * (rows // length) + row // length, mask=inside, other=0)


@triton.jit
def load_lse(
    lse,
    at,  # (R,)
    inside,  # (R,)
):
    """Load (R,) logsumexps; +inf, which makes probabilities 0, outside and for rows that see nothing."""
    value = tl.load(lse + at, mask=inside, other=float("inf"))
    return tl.where(value == -float("inf"), float("inf"), value)


@triton.jit
def row_offset(row, length, stride_s, stride_t):
    """Where row `row` of a group and head begins: query row % T of sequence row // T."""
    return (row // length).to(tl.int64) * stride_s + (row % length).to(tl.int64) * stride_t


@triton.jit
def row_index(row, group, head, rows, heads, length):
    """Which row of a contiguous (G, S, H, T) this is."""
    return ((group * (rows // length) + row // length) * heads + head) * length + row % length


@triton.jit
def load_keys(
    x,  # keys or values
    key,  # (C,)
    end,
    length,
    stride_s,
    stride_t,
    width,
    OWN: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Load (C, BLOCK_D) keys or values before `end`: own ones, or the prefix', which has no sequences to step over."""
    offset = row_offset(key, length, stride_s, stride_t) if OWN else key.to(tl.int64) * stride_t
    return load_tile(x, offset, key < end, width, UPCAST, BLOCK_D)


@triton.jit
def seen(
    row,  # (R,)
    key,  # (C,)
    end,
    mask,  # of this group's keys, or None
    reach,  # (R,): of how many of the prefix' keys, from the first, a row sees any; None: all
    length,
    OWN: tl.constexpr,
):
    """Return (R, C): which rows see which of the keys before `end`."""
    real = key < end
    if mask is not None:
        real = real & (tl.load(mask + key, mask=real, other=0) != 0)
    if OWN:
        return real[None, :] & ((row // length)[:, None] == (key // length)[None, :])
    if reach is not None:
        return real[None, :] & (key[None, :] < reach[:, None])
    return real[None, :] & (row >= 0)[:, None]


@triton.jit
def masked_scores(
    q,  # (R, D)
    k,  # (C, D)
    row,  # (R,)
    key,  # (C,)
    end,
    mask,
    reach,
    length,
    scale,
    OWN: tl.constexpr,
):
    """Return (R, C) scores; -inf where a row does not see a key."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where(seen(row, key, end, mask, reach, length, OWN), scores, -float("inf"))
