"""The k largest entries of each row with a defined order, and those of a vocabulary that is sharded."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .vocab_group import VocabGroup

# Columns of a block. At k = 20 and V = 126464 the maxima of 1976 blocks and the 1280 entries of 20 of them are ordered,
# after one reading of the row (4 V bytes in fp32), whatever k is; ordering all entries would write keys of 8 V bytes.
_BLOCK = 64


def stable_topk(values: Tensor, k: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:  # (R, V) -> twice (R, k)
    """Return the k largest values of each row and their columns (int64), largest first, ties to the lowest column.

    Values are multiplied by `factor` first; they are returned in fp32, or fp64. NaN is larger than all else. Nothing
    waits for a GPU.
    """
    vocab = values.shape[1]
    if not _has_blocks(vocab, k):
        return _topk(values, k, factor)
    # An entry in another block than the k of largest maxima, ties to the lowest, has k entries before it. In these
    # blocks, in order of their columns, a tie goes to the lowest column again.
    whole = vocab // _BLOCK * _BLOCK
    blocks = _topk(values[:, :whole].unflatten(1, (-1, _BLOCK)).amax(-1), k, factor)[1].sort(dim=-1).values
    columns = (blocks[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=values.device)).flatten(1)
    rest = torch.arange(whole, vocab, device=values.device).expand(len(columns), -1)
    columns = torch.cat([columns, rest], dim=1)
    top, places = _topk(values.gather(1, columns), k, factor)
    return top, columns.gather(1, places)


def row_bytes(vocab: int, k: int) -> int:
    """Return the memory that `stable_topk` needs per row."""
    return 32 * (k * _BLOCK + vocab // _BLOCK + _BLOCK if _has_blocks(vocab, k) else vocab)


def _has_blocks(vocab: int, k: int) -> bool:
    return 2 * k * _BLOCK <= vocab


def _topk(values: Tensor, k: int, factor: float) -> tuple[Tensor, Tensor]:
    values = values if values.dtype == torch.float64 else values.float()
    if factor != 1:
        values = values * factor
    if values.dtype == torch.float64:  # which leaves no room for a column
        top, places = values.sort(dim=-1, descending=True, stable=True)
        return top[:, :k], places[:, :k]
    columns = torch.arange(values.shape[1], device=values.device)
    places = 0x7FFFFFFF - ordered_keys(values, columns).topk(k, dim=-1).values.bitwise_and_(0x7FFFFFFF)
    return values.gather(-1, places), places


def ordered_keys(values: Tensor, columns: Tensor) -> Tensor:  # fp32, int64 that broadcasts -> int64
    """Return keys that are larger for larger values, and for equal values in lower columns: those of triton/topk.py."""
    bits = values + 0.0  # one zero
    bits = bits.masked_fill_(bits.isnan(), math.nan).view(torch.int32)  # and one NaN
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    return bits.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(0x7FFFFFFF - columns)


class TopK(NamedTuple):
    """The k largest entries of each row, of all processes of a group."""

    values: Tensor  # (R, k), largest first, ties to the lowest id
    ids: Tensor  # (R, k) int64, in the whole vocabulary
    columns: Tensor  # (R, k) int64, of this process; any where another one holds the entry
    here: Tensor | None  # (R, k) bool, whether this process holds the entry; None: all

    def local(self, entries: Tensor, elsewhere: float = 0.0) -> Tensor:  # (R, k) -> (R, k)
        """Return the entries that this process holds, and another number for the others."""
        return entries if self.here is None else entries.masked_fill(~self.here, elsewhere)


def group_topk(values: Tensor, k: int, group: VocabGroup, factor: float = 1.0) -> TopK:  # (R, V)
    """Return the k largest entries of each row over all processes, as `stable_topk`."""
    vocab = values.shape[1]
    top, columns = stable_topk(values, min(k, vocab), factor)
    if group.group is None:
        return TopK(top, columns, columns, None)
    # Candidates of all processes, in the order of their columns where values are equal; a short shard has fewer.
    missing = k - columns.shape[1]
    ids = torch.nn.functional.pad(columns + group.first_column, (0, missing), value=-1)
    top = torch.nn.functional.pad(top, (0, missing), value=-math.inf)
    top, ids = (group.gather(x.T).T for x in (top, ids))
    order = (ids < 0).to(torch.uint8).argsort(dim=-1, stable=True)  # what was padded loses every tie
    order = order.gather(-1, top.gather(-1, order).argsort(dim=-1, descending=True, stable=True)[:, :k])
    top, ids = (x.gather(-1, order) for x in (top, ids))
    columns = ids - group.first_column
    here = (columns >= 0) & (columns < vocab)
    return TopK(top, ids, columns.clamp(0, vocab - 1), here)
