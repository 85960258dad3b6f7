"""The k largest entries in their defined order, whatever is equal, missing or broken among them."""

import math

import pytest
import torch
from torch import Tensor

from dopsd_kernels.common.topk import ordered_keys, row_bytes, stable_topk

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from dopsd_kernels.common.topk_kernels import ordered_key  # noqa: E402


@triton.jit
def _keys(x, out, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    tl.store(out + columns, ordered_key(tl.load(x + columns), columns))


def values(vocab: int, case: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    x = 3 * torch.randn(6, vocab, generator=generator)
    if case == "ties":
        x = x.round() * 0.0 if vocab < 100 else x.round()
        x[:, ::2] *= -1.0  # some zeros are negative
    elif case == "few":
        x = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.95, -math.inf)
        x[0] = -math.inf
        x[1, vocab // 2] = math.inf
    elif case == "broken":
        x = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.02, math.nan)
        x[0, -1], x[1], x[2, 0] = math.nan, math.nan, -torch.tensor(math.nan)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["different", "ties", "few", "broken"])
def test_it_is_the_beginning_of_a_stable_sort(case: str, dtype: torch.dtype) -> None:
    # 127 and 1 are ordered at once, 128 and 1 by blocks; 2570 and 20 leave 10 columns outside whole blocks.
    for vocab, k in ((1, 1), (127, 1), (128, 1), (129, 1), (300, 300), (2570, 20), (4099, 32), (640, 5)):
        x = values(vocab, case, dtype)
        for strided in (x, x.T.contiguous().T):
            expected, order = x.sort(dim=-1, descending=True, stable=True)
            top, columns = stable_topk(strided, k)
            assert torch.equal(columns, order[:, :k])
            torch.testing.assert_close(top.to(dtype), expected[:, :k], rtol=0, atol=0, equal_nan=True)
            # What the factor makes equal is equal: a tie.
            expected, order = (strided.float() * 1e-44).sort(dim=-1, descending=True, stable=True)
            if dtype != torch.float64:
                assert torch.equal(stable_topk(strided, k, 1e-44)[1], order[:, :k])
    assert stable_topk(x[:0], 3)[1].shape == (0, 3)


def test_what_it_needs_does_not_grow_with_the_vocabulary_alone() -> None:
    assert row_bytes(126464, 20) < 4 * 126464 / 4  # a quarter of a row of logits


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, Triton's interpreter does not run")
def test_keys_are_those_of_the_kernels() -> None:
    x = torch.cat([values(240, case, torch.float32)[:3].flatten() for case in ("ties", "few", "broken")])[:2048]
    x[:4] = torch.tensor([0.0, -0.0, 1e-45, -1e-45])
    out = torch.empty(2048, dtype=torch.int64)
    _keys[(1,)](x, out, SIZE=2048)
    assert torch.equal(ordered_keys(x, torch.arange(2048)), out)
