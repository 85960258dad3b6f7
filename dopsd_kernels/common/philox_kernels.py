"""Words of `philox.py` in kernels: four columns share a counter."""

import triton
import triton.language as tl


@triton.jit
def philox_words(
    seed,  # (R,) int64
    begin,  # first column, a multiple of 4
    COLUMNS: tl.constexpr,
):
    """Return for each column word column % 4 of counter column // 4, (R, COLUMNS) uint32."""
    counter = (begin // 4 + tl.arange(0, COLUMNS // 4))[None, :].to(tl.uint32)
    zero = counter * 0
    word_0, word_1, word_2, word_3 = tl.philox(seed[:, None], counter, zero, zero, zero)
    # Joining puts the last operand's index last: the words of a counter lie in the order 0, 1, 2, 3.
    word = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
    return tl.reshape(word, (seed.shape[0], COLUMNS))
