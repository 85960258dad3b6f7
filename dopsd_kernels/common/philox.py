"""Philox4x32-10 (Salmon et al. 2011): 32-bit words that are a hash of a seed and a place."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox(
    seed: Tensor,  # int64
    counter: Tensor,  # int64, broadcasts with seed
) -> Tensor:  # (..., 4) int32
    """Return the words of Philox4x32-10 with the seed as key and (counter, 0, 0, 0) as counter.

    A word is clean, in an int64 below 2**32, only where it enters a product. Wrapped products hold both of their 32-bit
    halves, and XOR does not mix bits.
    """
    shape = torch.broadcast_shapes(seed.shape, counter.shape)
    # Words 0 and 2; words 1 and 3; and what both will come from.
    even, odd, product = (seed.new_empty((2, *shape)) for _ in range(3))
    key = torch.stack([seed, seed >> 32])
    step = key.new_tensor([_W0, _W1]).view(2, *[1] * seed.dim())
    # Two rounds of mostly zeros: what depends on the row or the column alone is computed once for it.
    low, row_low = counter * _M0, (seed & _MASK) * _M0
    torch.bitwise_xor(low >> 32, key[1] & _MASK, out=odd[0]).mul_(_M1)
    odd[1] = row_low
    key.add_(step)
    torch.bitwise_right_shift(odd[0], 32, out=even[0]).bitwise_xor_(key[0]).bitwise_and_(_MASK)
    torch.bitwise_xor(low & _MASK, ((row_low >> 32) ^ key[1]) & _MASK, out=even[1])
    for _ in range(8):
        torch.mul(even[1], _M1, out=product[0])
        torch.mul(even[0], _M0, out=product[1])
        key.add_(step)
        torch.bitwise_right_shift(product, 32, out=even).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(_MASK)
        odd, product = product, odd
    words = seed.new_empty((*shape, 2))
    odd.bitwise_left_shift_(32)
    for half in range(2):
        torch.bitwise_or(even[half], odd[half], out=words[..., half])
    return words.view(torch.int32)
