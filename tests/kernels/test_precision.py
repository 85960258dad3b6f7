"""fp32 products are fp32, whatever a user has allowed elsewhere, and the user's settings are left alone."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dopsd_kernels import fused_confidence, fused_step_kl, fused_token_logprob, prefix_attention
from dopsd_kernels.common import products

PRODUCTS = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.addmm_,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
}
SETTINGS = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("cuda", "matmul"), ("mkldnn", "matmul")]


def read() -> list[str]:
    return [torch._C._get_fp32_precision_getter(*setting) for setting in SETTINGS]


def write(values: tuple[str, ...]) -> None:
    for setting, value in zip(SETTINGS, values, strict=True):
        torch._C._set_fp32_precision_setter(*setting, value)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    write(("none",) * len(SETTINGS))


class Precision(TorchDispatchMode):
    """Records at which precision each product runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.seen += read()[3:]
        return func(*args, **(kwargs or {}))


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_kl(**options: Any) -> list[Tensor]:
    hidden, weight = randn(64, 256, seed=0).requires_grad_(), randn(300, 256, seed=1).requires_grad_()
    loss = fused_step_kl(hidden, randn(64, 256, seed=2), weight, **options).loss.sum()
    return [loss, *torch.autograd.grad(loss, (hidden, weight))]


def confidence() -> list[Tensor]:
    return list(fused_confidence(randn(64, 256, seed=0), randn(300, 256, seed=1)))


def token_logprob() -> list[Tensor]:
    hidden, weight = randn(64, 256, seed=0).requires_grad_(), randn(300, 256, seed=1).requires_grad_()
    out = fused_token_logprob(hidden, weight, torch.arange(64))
    return [*out, *torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), (hidden, weight))]


def attention() -> list[Tensor]:
    own = [randn(1, 8, 2, 16, 64, seed=i).requires_grad_() for i in range(3)]
    prefix = [randn(1, 2, 64, 64, seed=i + 3).requires_grad_() for i in range(2)]
    out = prefix_attention(*own, *prefix, backend="torch")
    return [out, *torch.autograd.grad(out.sum(), [*own, *prefix])]


OPS: dict[str, Callable[[], list[Tensor]]] = {
    "step_kl": step_kl,
    "recomputed": lambda: step_kl(reduction="none"),
    "confidence": confidence,
    "token_logprob": token_logprob,
    "attention": attention,
}


@pytest.mark.parametrize("op", OPS)
def test_a_lower_precision_that_is_allowed_has_no_effect(op: str, recwarn: pytest.WarningsRecorder) -> None:
    expected = OPS[op]()
    torch.set_float32_matmul_precision("medium")  # TF32 on a GPU, bf16 on a CPU that has it
    before = read()
    assert before[3:] == ["tf32", "bf16"]
    with Precision() as precision:
        results = OPS[op]()
    assert precision.seen and set(precision.seen) == {"ieee"}
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert read() == before and torch.get_float32_matmul_precision() == "medium"
    assert not recwarn.list


def test_compiled_code_neither() -> None:
    hidden, teacher, weight = randn(64, 256, seed=0), randn(64, 256, seed=1), randn(300, 256, seed=2)

    def loss(hidden: Tensor) -> Tensor:
        return fused_step_kl(2 * hidden, teacher, weight).loss

    expected = torch.autograd.grad(loss(hidden.requires_grad_()), hidden)[0]
    torch._C._set_fp32_precision_setter("generic", "all", "bf16")
    before = read()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(hidden), hidden)[0], expected)
    assert read() == before


def test_every_setting_is_put_back_where_it_was_made() -> None:
    # What a setting of its own is, and what follows the one above it, shows when that one is changed.
    def made() -> list[list[str]]:
        states = [read()]
        for backend, value in itertools.product(("generic", "cuda", "mkldnn"), ("ieee", "tf32")):
            torch._C._set_fp32_precision_setter(backend, "all", value)
            states.append(read())
        return states

    for values in itertools.product(
        ("none", "bf16"), ("none", "tf32"), ("none", "bf16"), *[("none", "ieee", "tf32")] * 2
    ):
        write(values)
        expected = made()
        write(values)
        with pytest.raises(ZeroDivisionError), products.full_precision():
            assert all(value in ("ieee", "none") for value in read()[3:])
            raise ZeroDivisionError
        assert made() == expected
