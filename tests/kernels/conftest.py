"""Fixtures of the ops' tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dopsd_kernels.common import products


@pytest.fixture
def sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 16-bit operands as on a GPU; a CPU has none of fp32 results."""

    def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        assert a.dtype == b.dtype
        return torch.matmul(a, b, out=out) if a.dtype.itemsize > 2 else torch.matmul(a.float(), b.float(), out=out)

    def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
        assert a.dtype == b.dtype
        total.addmm_(a.to(total.dtype), b.to(total.dtype))

    monkeypatch.setattr(products, "matmul", matmul)
    monkeypatch.setattr(products, "add_matmul", add_matmul)
    monkeypatch.setattr(products, "operand_dtype", lambda hidden, weight: weight.dtype)
