"""prefix_attention: attention of many short sequences over one shared prefix and their own keys.

A group's queries of one head are rows, sequence after sequence: row r is query r % T of sequence r // T. A program has
a tile of rows, which may span several sequences, and meets two runs of keys in one online softmax:

    the prefix:  the same keys for every row, so a tile reads them once for all its sequences,
    own keys:    keys of a group are numbered like rows; a tile's sequences have the keys from the first row of its
                 first sequence to the last of its last, and a row sees those of its own sequence.

With T = 32 and tiles of 128 rows, four sequences share a reading of the prefix, and a quarter of the own scores counts.

The backward pass computes scores again. One kernel has tiles of rows and sums d q over both runs of keys; another has
tiles of keys, own or of the prefix, and sums d k and d v over the rows that see them: for own keys those of their
sequences, for the prefix all rows of the group. Sums over the query heads of a key head are part of both, so that no
two programs add to one place and the order of every sum is fixed. Both need delta, the sum of grad * out of each row:
the first kernel computes it from a tile of grad that it has anyway and one of out, and leaves it for the second, where
each row of each tile of keys then costs the 4 bytes of delta instead of the 2 D bytes of out.

Where prefixes have too few tiles of keys for the GPU, the rows of their sums are split among several programs, and
their fp32 sums are added up after. Elsewhere splits only cost: with 32 groups of 16 sequences of 32 rows, 32 key heads
of 128 and prefixes of 700, d k and d v are 0.37 GB in 16 bits, but eight splits would move 13.6 GB: 5.9 GB of sums
written and read, their totals in fp32 written and read, and the result.
"""

import functools
import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import LAUNCH, choose
from .tiles import load_keys, load_lse, load_reach, load_tile, masked_scores, place, row_index, row_offset, seen

_LOG2_E = tl.constexpr(1.4426950408889634)
# Of the rows of the prefix' gradients.
_MAX_SPLITS = 8


@triton.jit
def _attend(
    q,  # (R, D)
    acc,  # (R, D) fp32
    highest,  # (R,) largest score so far
    total,  # (R,) sum of exp(score - highest)
    row,  # (R,)
    k,
    v,
    mask,
    reach,
    begin,
    end,
    length,
    stride_ks,
    stride_kt,
    stride_vs,
    stride_vt,
    width,
    scale,
    OWN: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the keys from `begin` to `end` to a tile's online softmax."""
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k_tile = load_keys(k, key, end, length, stride_ks, stride_kt, width, OWN, UPCAST, BLOCK_D)
        scores = masked_scores(q, k_tile, row, key, end, mask, reach, length, scale, OWN)
        new = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(new == -float("inf"), 0.0, new)
        weights = tl.exp2((scores - shift[:, None]) * _LOG2_E)
        rescale = tl.exp2((highest - shift) * _LOG2_E)
        total = total * rescale + tl.sum(weights, 1)
        v_tile = load_keys(v, key, end, length, stride_vs, stride_vt, width, OWN, UPCAST, BLOCK_D)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
        highest = new
    return acc, highest, total


@triton.jit(do_not_specialize=["rows", "prefix", "length"])
def _forward(
    q,  # (G, S, H, T, D); the last stride of every tensor is 1
    k,  # (G, S, H_kv, T, D)
    v,  # (G, S, H_kv, T, D)
    k_prefix,  # (G, H_kv, P, D)
    v_prefix,  # (G, H_kv, P, D)
    prefix_mask,  # (G, P) int8, or None
    own_mask,  # (G, S T) int8, or None
    prefix_length,  # (G, S) int32, or None
    out,  # (G, S, H, T, D), contiguous
    lse,  # (G, S, H, T) fp32, contiguous
    stride_qg,
    stride_qs,
    stride_qh,
    stride_qt,
    stride_kg,
    stride_ks,
    stride_kh,
    stride_kt,
    stride_vg,
    stride_vs,
    stride_vh,
    stride_vt,
    stride_pkg,
    stride_pkh,
    stride_pkt,
    stride_pvg,
    stride_pvh,
    stride_pvt,
    rows,  # S T
    prefix,  # P
    length,  # T
    heads,  # H
    repeats,  # H / H_kv
    width,  # D
    scale,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile, group, head = place(tl.program_id(0), tl.cdiv(rows, BLOCK_M), heads)
    first = tile * BLOCK_M
    key_head = head // repeats
    row = first + tl.arange(0, BLOCK_M)
    inside = row < rows
    at_q = group * stride_qg + head * stride_qh + row_offset(row, length, stride_qs, stride_qt)
    q_tile = load_tile(q, at_q, inside, width, UPCAST, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    reach = None if prefix_length is None else load_reach(prefix_length, row, inside, group, rows, length)
    acc, highest, total = _attend(
        q_tile, acc, highest, total, row,
        k_prefix + group * stride_pkg + key_head * stride_pkh,
        v_prefix + group * stride_pvg + key_head * stride_pvh,
        None if prefix_mask is None else prefix_mask + group * prefix, reach,
        0, prefix if reach is None else tl.minimum(prefix, tl.max(reach)), length,
        0, stride_pkt, 0, stride_pvt, width, scale,
        False, UPCAST, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    last = tl.minimum(first + BLOCK_M, rows) - 1
    acc, highest, total = _attend(
        q_tile, acc, highest, total, row,
        k + group * stride_kg + key_head * stride_kh,
        v + group * stride_vg + key_head * stride_vh,
        None if own_mask is None else own_mask + group * rows, None,
        first // length * length, (last // length + 1) * length, length,
        stride_ks, stride_kt, stride_vs, stride_vt, width, scale,
        True, UPCAST, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    # A row that sees nothing gets 0, and its logsumexp -inf.
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    at = row_index(row, group, head, rows, heads, length)
    d = tl.arange(0, BLOCK_D)
    tl.store(
        out + at[:, None] * width + d[None, :],
        acc.to(out.dtype.element_ty),
        mask=inside[:, None] & (d < width)[None, :],
    )
    tl.store(lse + at, highest + tl.log(total), mask=inside)


@triton.jit
def _query_gradient(
    acc,  # (R, D) fp32
    q,  # (R, D)
    grad,  # (R, D)
    lse,  # (R,)
    delta,  # (R,)
    row,
    k,
    v,
    mask,
    reach,
    begin,
    end,
    length,
    stride_ks,
    stride_kt,
    stride_vs,
    stride_vt,
    width,
    scale,
    OWN: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add d score @ k of the keys from `begin` to `end`."""
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k_tile = load_keys(k, key, end, length, stride_ks, stride_kt, width, OWN, UPCAST, BLOCK_D)
        v_tile = load_keys(v, key, end, length, stride_vs, stride_vt, width, OWN, UPCAST, BLOCK_D)
        scores = masked_scores(q, k_tile, row, key, end, mask, reach, length, scale, OWN)
        weights = tl.exp2((scores - lse[:, None]) * _LOG2_E)
        d_scores = weights * (tl.dot(grad, tl.trans(v_tile), input_precision="ieee") - delta[:, None])
        acc = tl.dot(d_scores.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["rows", "prefix", "length"])
def _backward_queries(
    q,  # (G, S, H, T, D)
    k,  # (G, S, H_kv, T, D)
    v,  # (G, S, H_kv, T, D)
    k_prefix,  # (G, H_kv, P, D)
    v_prefix,  # (G, H_kv, P, D)
    prefix_mask,  # (G, P) int8, or None
    own_mask,  # (G, S T) int8, or None
    prefix_length,  # (G, S) int32, or None
    grad,  # (G, S, H, T, D), contiguous, like the following
    out,  # (G, S, H, T, D)
    lse,  # (G, S, H, T) fp32
    delta,  # (G, S, H, T) fp32, written
    d_q,  # (G, S, H, T, D)
    stride_qg,
    stride_qs,
    stride_qh,
    stride_qt,
    stride_kg,
    stride_ks,
    stride_kh,
    stride_kt,
    stride_vg,
    stride_vs,
    stride_vh,
    stride_vt,
    stride_pkg,
    stride_pkh,
    stride_pkt,
    stride_pvg,
    stride_pvh,
    stride_pvt,
    rows,
    prefix,
    length,
    heads,
    repeats,
    width,
    scale,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile, group, head = place(tl.program_id(0), tl.cdiv(rows, BLOCK_M), heads)
    first = tile * BLOCK_M
    key_head = head // repeats
    row = first + tl.arange(0, BLOCK_M)
    inside = row < rows
    at_q = group * stride_qg + head * stride_qh + row_offset(row, length, stride_qs, stride_qt)
    at = row_index(row, group, head, rows, heads, length)
    q_tile = load_tile(q, at_q, inside, width, UPCAST, BLOCK_D)
    grad_tile = load_tile(grad, at * width, inside, width, UPCAST, BLOCK_D)
    out_tile = load_tile(out, at * width, inside, width, UPCAST, BLOCK_D)
    row_delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + at, row_delta, mask=inside)
    row_lse = load_lse(lse, at, inside)
    reach = None if prefix_length is None else load_reach(prefix_length, row, inside, group, rows, length)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc = _query_gradient(
        acc, q_tile, grad_tile, row_lse, row_delta, row,
        k_prefix + group * stride_pkg + key_head * stride_pkh,
        v_prefix + group * stride_pvg + key_head * stride_pvh,
        None if prefix_mask is None else prefix_mask + group * prefix, reach,
        0, prefix if reach is None else tl.minimum(prefix, tl.max(reach)), length,
        0, stride_pkt, 0, stride_pvt, width, scale,
        False, UPCAST, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    last = tl.minimum(first + BLOCK_M, rows) - 1
    acc = _query_gradient(
        acc, q_tile, grad_tile, row_lse, row_delta, row,
        k + group * stride_kg + key_head * stride_kh,
        v + group * stride_vg + key_head * stride_vh,
        None if own_mask is None else own_mask + group * rows, None,
        first // length * length, (last // length + 1) * length, length,
        stride_ks, stride_kt, stride_vs, stride_vt, width, scale,
        True, UPCAST, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    tl.store(
        d_q + at[:, None] * width + d[None, :],
        (acc * scale).to(d_q.dtype.element_ty),
        mask=inside[:, None] & (d < width)[None, :],
    )


@triton.jit(do_not_specialize=["rows", "keys", "length", "split_rows"])
def _backward_keys(
    q,  # (G, S, H, T, D)
    k,  # (G, S, H_kv, T, D), or the prefix' (G, H_kv, P, D)
    v,
    mask,  # of the keys: (G, S T) or (G, P) int8, or None
    prefix_length,  # (G, S) int32, or None
    grad,  # (G, S, H, T, D), contiguous, like the following
    lse,  # (G, S, H, T) fp32
    delta,  # (G, S, H, T) fp32
    d_k,  # (G, S, H_kv, T, D), or the prefix' (G, H_kv, splits, P, D)
    d_v,
    stride_qg,
    stride_qs,
    stride_qh,
    stride_qt,
    stride_kg,
    stride_ks,
    stride_kh,
    stride_kt,
    stride_vg,
    stride_vs,
    stride_vh,
    stride_vt,
    rows,  # S T
    keys,  # S T, or P
    length,  # T
    split_rows,  # rows of a split of the prefix' sums
    heads,  # H
    repeats,  # H / H_kv
    width,  # D
    scale,
    OWN: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A part is one split of one head: the tiles of a part are neighbours.
    tiles = tl.cdiv(keys, BLOCK_N)
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    key_heads = heads // repeats
    split, group, key_head = place(part, tl.cdiv(rows, split_rows), key_heads)
    first = tile * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)
    if OWN:
        last = tl.minimum(first + BLOCK_N, keys) - 1
        begin, end = first // length * length, (last // length + 1) * length
    else:
        begin = split * split_rows
        end = tl.minimum(begin + split_rows, rows)
    k += group * stride_kg + key_head * stride_kh
    v += group * stride_vg + key_head * stride_vh
    k_tile = load_keys(k, key, keys, length, stride_ks, stride_kt, width, OWN, UPCAST, BLOCK_D)
    v_tile = load_keys(v, key, keys, length, stride_vs, stride_vt, width, OWN, UPCAST, BLOCK_D)
    key_mask = None if mask is None else mask + group * keys
    sum_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for head in range(key_head * repeats, (key_head + 1) * repeats):
        for start in range(begin, end, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            inside = row < end
            at_q = group * stride_qg + head * stride_qh + row_offset(row, length, stride_qs, stride_qt)
            at_row = row_index(row, group, head, rows, heads, length)
            q_tile = load_tile(q, at_q, inside, width, UPCAST, BLOCK_D)
            grad_tile = load_tile(grad, at_row * width, inside, width, UPCAST, BLOCK_D)
            row_lse = load_lse(lse, at_row, inside)
            row_delta = tl.load(delta + at_row, mask=inside, other=0.0)
            # Transposed: (keys, rows), so that both sums are plain products.
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale
            weights = tl.exp2((scores - row_lse[None, :]) * _LOG2_E)
            reach = None if prefix_length is None else load_reach(prefix_length, row, inside, group, rows, length)
            weights = tl.where(tl.trans(seen(row, key, keys, key_mask, reach, length, OWN)), weights, 0.0)
            sum_v = tl.dot(weights.to(grad_tile.dtype), grad_tile, sum_v, input_precision="ieee")
            d_scores = weights * (tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee") - row_delta[None, :])
            sum_k = tl.dot(d_scores.to(q_tile.dtype), q_tile, sum_k, input_precision="ieee")
    at = row_index(key, group, key_head, keys, key_heads, length) if OWN else part.to(tl.int64) * keys + key
    d = tl.arange(0, BLOCK_D)
    target = at[:, None] * width + d[None, :]
    stored = (key < keys)[:, None] & (d < width)[None, :]
    tl.store(d_k + target, (sum_k * scale).to(d_k.dtype.element_ty), mask=stored)
    tl.store(d_v + target, sum_v.to(d_v.dtype.element_ty), mask=stored)


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """The interpreter has one, so that small problems have one split or several."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _sizes(q: Tensor, k: Tensor, scale: float) -> dict[str, Any]:
    """Return the arguments that all kernels share."""
    _, sequences, heads, length, width = q.shape
    return {
        "rows": sequences * length,
        "length": length,
        "heads": heads,
        "repeats": heads // k.shape[2],
        "width": width,
        "scale": scale,
    }


def _launch(kernel: str, q: Tensor, prefix: int) -> dict[str, Any]:
    """Return a kernel's blocks and launch options.

    Tiles are chosen by what the compiler makes of them. On sm_90 four warps multiply 64 rows together, on gfx942 each
    32: with tiles of 64 rows (or keys, for the keys' gradients), eight warps there and four here would compute every
    score twice. There are two stages where that spills nothing inside the loop over tiles.
    """
    length, width = q.shape[3:]
    # Without tensor cores a tile's operands wait in registers: smaller ones, and the same for all kernels.
    kernel = "prefix_attention_fp32" if q.dtype == torch.float32 else kernel
    config = choose(kernel, q.device, length, width, prefix)
    return {
        "UPCAST": q.dtype == torch.bfloat16 and q.device.type == "cpu",  # the interpreter takes bf16 for integers
        "BLOCK_M": config["BLOCK_M"],
        "BLOCK_N": config["BLOCK_N"],
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
        **LAUNCH,
    }


def _bytes(mask: Tensor | None) -> Tensor | None:  # (G, ...) bool -> (G, n) int8
    return None if mask is None else mask.flatten(1).contiguous().view(torch.int8)


def _lengths(prefix_length: Tensor | None) -> Tensor | None:  # (G, S) int64 -> int32
    return None if prefix_length is None else prefix_length.to(torch.int32).contiguous()


def forward(
    q: Tensor,  # (G, S, H, T, D)
    k: Tensor,  # (G, S, H_kv, T, D)
    v: Tensor,  # (G, S, H_kv, T, D)
    k_prefix: Tensor,  # (G, H_kv, P, D)
    v_prefix: Tensor,  # (G, H_kv, P, D)
    prefix_mask: Tensor | None,  # (G, P) bool
    own_mask: Tensor | None,  # (G, S, T) bool
    prefix_length: Tensor | None,  # (G, S) int64
    scale: float,
    out: Tensor,  # (G, S, H, T, D), written
    lse: Tensor,  # (G, S, H, T), written
) -> None:
    """Write the output and the scores' logsumexp; -inf where a query sees no key."""
    q, k, v, k_prefix, v_prefix = map(_contiguous_rows, (q, k, v, k_prefix, v_prefix))
    sizes, prefix = _sizes(q, k, scale), k_prefix.shape[2]
    launch = _launch("prefix_attention", q, prefix)
    strides = itertools.chain(*(x.stride()[:-1] for x in (q, k, v, k_prefix, v_prefix)))
    _forward[(triton.cdiv(sizes["rows"], launch["BLOCK_M"]) * q.shape[0] * q.shape[2],)](
        q, k, v, k_prefix, v_prefix, _bytes(prefix_mask), _bytes(own_mask), _lengths(prefix_length),
        out, lse, *strides,
        prefix=prefix, **sizes, **launch,
    )  # fmt: skip


def backward(
    grad: Tensor,  # (G, S, H, T, D)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_mask: Tensor | None,
    own_mask: Tensor | None,
    prefix_length: Tensor | None,
    out: Tensor,  # (G, S, H, T, D)
    lse: Tensor,  # (G, S, H, T)
    scale: float,
    d_q: Tensor,  # this and the following are written
    d_k: Tensor,
    d_v: Tensor,
    d_k_prefix: Tensor,
    d_v_prefix: Tensor,
) -> None:
    """Write the gradients of all five tensors."""
    q, k, v, k_prefix, v_prefix = map(_contiguous_rows, (q, k, v, k_prefix, v_prefix))
    sizes = _sizes(q, k, scale)
    groups, _, heads = q.shape[:3]
    rows, key_heads, prefix = sizes["rows"], k.shape[2], k_prefix.shape[2]
    delta = torch.empty_like(lse)
    masks, reach = (_bytes(prefix_mask), _bytes(own_mask)), _lengths(prefix_length)
    strides = [x.stride()[:-1] for x in (q, k, v, k_prefix, v_prefix)]
    launch = _launch("prefix_attention_query_gradient", q, prefix)
    _backward_queries[(triton.cdiv(rows, launch["BLOCK_M"]) * groups * heads,)](
        q, k, v, k_prefix, v_prefix, *masks, reach, grad, out, lse, delta, d_q, *itertools.chain(*strides),
        prefix=prefix, **sizes, **launch,
    )  # fmt: skip
    launch = _launch("prefix_attention_key_gradient", q, prefix)
    _backward_keys[(triton.cdiv(rows, launch["BLOCK_N"]) * groups * key_heads,)](
        q, k, v, masks[1], None, grad, lse, delta, d_k, d_v, *strides[0], *strides[1], *strides[2],
        keys=rows, split_rows=rows, OWN=True, **sizes, **launch,
    )  # fmt: skip
    if prefix == 0:
        return
    programs = triton.cdiv(prefix, launch["BLOCK_N"]) * groups * key_heads
    splits = min(max(4 * _multiprocessors(q.device) // programs, 1), _MAX_SPLITS)
    split_rows = triton.cdiv(rows, splits * launch["BLOCK_M"]) * launch["BLOCK_M"]
    splits = triton.cdiv(rows, split_rows)
    sums: Any = d_k_prefix, d_v_prefix
    if splits > 1:
        sums = q.new_empty((2, groups, key_heads, splits, *k_prefix.shape[2:]), dtype=torch.float32)
    # A prefix has no sequences to step over.
    strides_k, strides_v = ((group, 0, head, key) for group, head, key in strides[3:])
    _backward_keys[(programs * splits,)](
        q, k_prefix, v_prefix, masks[0], reach, grad, lse, delta, *sums, *strides[0], *strides_k, *strides_v,
        keys=prefix, split_rows=split_rows, OWN=False, **sizes, **launch,
    )  # fmt: skip
    if splits > 1:
        for gradient, total in zip((d_k_prefix, d_v_prefix), sums.sum(3), strict=True):
            gradient.copy_(total)
