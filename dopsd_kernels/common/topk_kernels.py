"""The k largest entries of rows that a kernel sees in tiles, as keys that hold a value and its column.

A key is an int64. Its high half is the value's fp32 bits, changed so that integers order like the floats they stand
for; its low half falls as the column grows. One integer comparison then means "larger, or equal and further left",
keys of different columns are never equal, and maxima over any split of a row merge to the same entry. NaN is one key
above infinity, so that no loop over keys depends on comparisons with NaN, and a NaN is found as PyTorch finds it.

A row's kept keys are an unordered set. Of a tile only the entries larger than a row's smallest kept key enter it, and
after a few tiles that is rare: a tile then costs one maximum and one minimum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# -inf in a column that no row has: below every entry.
LOWEST_KEY = -0x7F800001 << 32
_LOWEST_KEY = tl.constexpr(LOWEST_KEY)


@triton.jit
def _ordered_bits(value):
    value = tl.where(value != value, float("nan"), value + 0.0)  # one NaN, and one zero
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(bits):
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _key(bits, column):
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def ordered_key(
    value,  # fp32
    column,  # int32, broadcasts with value
):
    """Return keys (int64) that are larger for larger values, and for equal values in lower columns."""
    return _key(_ordered_bits(value), column)


@triton.jit
def largest_key(
    values,  # (R, C) fp32
    columns,  # (1, C) int32
):
    """Return each row's largest key (R,), with half the registers that the maximum of `ordered_key` takes."""
    bits = tl.max(_ordered_bits(values), 1)
    # Compared as floats, so that only the values themselves stay in registers. If there is a NaN it is the largest.
    found = (values == _value(bits)[:, None]) | (values != values)
    return _key(bits, tl.min(tl.where(found, columns, 0x7FFFFFFF), 1))


@triton.jit
def key_value(key):
    """Return the values (fp32) of keys."""
    return _value((key >> 32).to(tl.int32))


@triton.jit
def key_column(key):
    """Return the columns (int64) of keys."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:  # int64 -> fp32, int64
    """Return the values and the columns of keys."""
    bits = (keys >> 32).to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32), 0x7FFFFFFF - (keys & 0x7FFFFFFF)


@triton.jit
def insert_largest(
    top,  # (R, K) int64, the kept keys in any order; LOWEST_KEY where there is none yet
    keys,  # (R, C) int64
):
    """Return the K largest keys of each row of `top` and `keys` together, in any order.

    A row's largest key that is left replaces its smallest kept one, in all rows at once, until no row gains. Places
    without a key come back as keys just above LOWEST_KEY, different from each other, and below every entry.
    """
    # Else one new key would replace all the equal lowest ones.
    place = tl.arange(0, top.shape[1])[None, :].to(tl.int64)
    top = tl.where(top == _LOWEST_KEY, place + _LOWEST_KEY, top)
    largest = tl.max(keys, 1)
    smallest = tl.min(top, 1)
    # `largest` falls at every turn, down to LOWEST_KEY, which is larger than nothing: the loop ends.
    while tl.max((largest > smallest).to(tl.int32), 0) > 0:
        replaced = (top == smallest[:, None]) & (largest > smallest)[:, None]
        top = tl.where(replaced, largest[:, None], top)
        largest = tl.max(tl.where(keys < largest[:, None], keys, _LOWEST_KEY), 1)
        smallest = tl.min(top, 1)
    return top
