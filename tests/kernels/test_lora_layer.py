"""lora_linears and lora_swiglu compute what their docstrings say, forward and backward, and keep what they promise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dopsd_kernels import LoraLinear, lora_linears, lora_swiglu, reference
from dopsd_kernels.lora_layer import elementwise

D, HIDDEN = 12, 10
NORM = (torch.linspace(0.5, 1.5, D, dtype=torch.float64), 1e-5)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear(
    wide: int, width: int, rank: int, *, dropout: float = 0.0, bias: bool = False, seed: int = 0, dtype: Any = None
) -> LoraLinear:
    """A layer of that many outputs; of rank 0, without an adapter."""
    dtype = dtype or torch.float64
    weight = randn(wide, width, seed=seed + 1, dtype=dtype) * width**-0.5
    added = randn(wide, seed=seed + 2, dtype=dtype) if bias else None
    if not rank:
        return LoraLinear(weight, added)
    a, b = randn(rank, width, seed=seed + 3, dtype=dtype) * width**-0.5, randn(wide, rank, seed=seed + 4, dtype=dtype)
    return LoraLinear(weight, added, a.requires_grad_(), b.requires_grad_(), 0.5, dropout, seed=2**61 + 12345 * seed)


def adapters(linears: Sequence[LoraLinear]) -> list[Tensor]:
    return [x for one in linears for x in (one.lora_a, one.lora_b) if x is not None]


def compare(outputs: Sequence[Tensor], expected: Sequence[Tensor], inputs: Sequence[Tensor], bound: float) -> None:
    """Values and gradients of a random sum of the outputs, relative to the largest of each tensor."""
    for got, wanted in zip(outputs, expected, strict=True):
        assert got.shape == wanted.shape
        assert float((got - wanted).detach().abs().max()) <= bound * float(wanted.detach().abs().max())
    weights = [randn(*one.shape, seed=20 + number) for number, one in enumerate(expected)]
    found, wanted = (
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(some, weights, strict=True)), inputs)
        for some in (outputs, expected)
    )
    for got, want in zip(found, wanted, strict=True):
        assert float((got - want).abs().max()) <= bound * float(want.abs().max())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [(3, 2, 4), (0, 2, 0), (0, 0, 0), (1, 0, 2)], ids=str)
@pytest.mark.parametrize(("norm", "rest"), [(True, False), (False, True), (True, True)])
def test_linears_are_the_references(ranks: tuple[int, ...], dropout: float, norm: bool, rest: bool) -> None:
    """Of one input, with and without adapters, biases, a norm and a residual; the input need not be contiguous."""
    x = randn(D, 3, 5).permute(1, 2, 0).requires_grad_()
    residual = randn(3, 5, 7, seed=9).requires_grad_() if rest else None
    linears = [
        linear(out, D, rank, dropout=dropout * (number != 1), bias=number == 1, seed=10 * number)
        for number, (out, rank) in enumerate(zip((8, 6, 7), ranks, strict=True))
    ]
    options: dict[str, Any] = {"norm": NORM if norm else None, "residual": residual}
    inputs = [x, *adapters(linears), *([] if residual is None else [residual])]
    compare(lora_linears(x, linears, **options), reference.lora_linears(x, linears, **options), inputs, 1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [(3, 2, 4), (0, 2, 0), (2, 0, 0), (0, 0, 1), (0, 0, 0)], ids=str)
def test_swiglu_is_the_references(ranks: tuple[int, ...], dropout: float) -> None:
    x, bias = randn(2, 5, D).requires_grad_(), sum(ranks) == 9
    gate, up = (linear(HIDDEN, D, ranks[n], dropout=dropout, bias=bias, seed=10 * n) for n in range(2))
    down = linear(D, HIDDEN, ranks[2], dropout=dropout, bias=bias, seed=30)
    for norm in (NORM, None):
        got, expected = (f(x, gate, up, down, norm=norm) for f in (lora_swiglu, reference.lora_swiglu))
        compare([got], [expected], [x, *adapters([gate, up, down])], 1e-12)


def test_gradients_are_those_of_differences() -> None:
    """Without the reference: of both ops, with dropout, whose masks stay what they are."""
    x, linears = randn(2, 3, D).requires_grad_(), [linear(5, D, 2, dropout=0.4, seed=s) for s in (0, 10)]
    torch.autograd.gradcheck(lambda x, *_: lora_linears(x, linears, norm=NORM), (x, *adapters(linears)))
    parts = (linear(HIDDEN, D, 2, dropout=0.4), linear(HIDDEN, D, 1, seed=5), linear(D, HIDDEN, 3, dropout=0.4, seed=7))
    torch.autograd.gradcheck(lambda x, *_: lora_swiglu(x, *parts, norm=NORM), (x, *adapters(parts)))


@pytest.mark.parametrize("shape", [(0, D), (D,), (1, 1, D)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    x, parts = randn(*shape).requires_grad_(), (linear(HIDDEN, D, 2), linear(HIDDEN, D, 1), linear(D, HIDDEN, 3))
    out = lora_swiglu(x, *parts, norm=NORM)
    (first,) = lora_linears(out, [parts[0]])
    assert out.shape == shape and first.shape == (*shape[:-1], HIDDEN)
    first.sum().backward()
    assert x.grad is not None and x.grad.shape == shape and parts[2].lora_b is not None
    assert parts[2].lora_b.grad is not None and parts[2].lora_b.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e4])
def test_inputs_of_any_size(scale: float) -> None:
    """The norm of nothing but noise below eps, and activations that are far out: finite, and as in fp64."""
    x = (randn(4, D) * scale).requires_grad_()
    parts = (linear(HIDDEN, D, 2), linear(HIDDEN, D, 1), linear(D, HIDDEN, 3))
    got, expected = (f(x, *parts, norm=NORM) for f in (lora_swiglu, reference.lora_swiglu))
    compare([got], [expected], [x, *adapters(parts)], 1e-10)


# ---- what is kept ----


def kept_bytes(outputs_of: Any, held: Sequence[Tensor]) -> int:
    """Of the storages that a backward pass keeps, besides those in ``held``."""
    known, found = {x.untyped_storage().data_ptr() for x in held}, {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = outputs_of()
    del outputs
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_narrow_products_and_the_nonlinearitys_inputs_are_kept(dropout: float) -> None:
    """Nothing besides what the caller holds: three ranks of numbers a row, and for SwiGLU gate and up."""
    rows, ranks = 7, (3, 2, 4)
    x = randn(rows, D, dtype=torch.bfloat16).requires_grad_()
    bf16 = {"dropout": dropout, "dtype": torch.bfloat16}
    norm = (NORM[0].bfloat16(), 1e-5)
    linears = [linear(8, D, rank, seed=rank, **bf16) for rank in ranks]
    held = [x, norm[0], *adapters(linears), *(one.weight for one in linears if isinstance(one.weight, Tensor))]
    assert kept_bytes(lambda: lora_linears(x, linears, norm=norm), held) == 2 * rows * sum(ranks)
    parts = [linear(HIDDEN, D, 3, **bf16), linear(HIDDEN, D, 2, **bf16), linear(D, HIDDEN, 4, **bf16)]
    held = [x, norm[0], *adapters(parts), *(one.weight for one in parts if isinstance(one.weight, Tensor))]
    assert kept_bytes(lambda: lora_swiglu(x, *parts, norm=norm), held) == 2 * rows * (sum(ranks) + 2 * HIDDEN)


# ---- precision ----


@pytest.mark.parametrize(
    ("x_dtype", "dtype"), [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float32")]
)
def test_16_bit_products_are_as_exact_as_modules(x_dtype: str, dtype: str) -> None:
    """Against fp64: at most twice the error of the same formulas, operation by operation in those dtypes."""
    kinds = getattr(torch, x_dtype), getattr(torch, dtype)
    sizes = ((48, 32), (48, 32), (32, 48))
    errors = []
    for seed in range(4):
        wide = [linear(*size, 4, seed=100 * seed + 10 * n) for n, size in enumerate(sizes)]
        x = randn(64, 32, seed=seed)
        norm = (torch.ones(32, dtype=torch.float64), 1e-5)
        parts = [
            LoraLinear(
                *(t if t is None else t.detach().to(kinds[1]).requires_grad_(n > 1) for n, t in enumerate(one[:4])),
                *one[4:],
            )
            for one in wide
        ]
        exact = [
            LoraLinear(
                *(t if t is None else t.detach().double().requires_grad_(n > 1) for n, t in enumerate(one[:4])),
                *one[4:],
            )
            for one in parts
        ]
        low = x.to(kinds[0])

        def gradients(op: Any, given: Tensor, some: Any, **options: Any) -> list[Tensor]:
            given = given.clone().requires_grad_()
            out = op(given, *some, **options)
            out.backward(torch.ones_like(out) * torch.linspace(-1, 1, out.shape[-1]).to(out.dtype))
            return [out.detach().double(), *(t.grad.double() for t in (given, *adapters(some)))]

        def modules(given: Tensor, *some: LoraLinear, norm: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=kinds[0] != kinds[1]):
                return reference.lora_swiglu(given, *some, norm=norm)

        truth = gradients(reference.lora_swiglu, low.double(), exact, norm=norm)
        narrow = (norm[0].to(kinds[0]), norm[1])
        ours = gradients(lora_swiglu, low, parts, norm=narrow, dtype=kinds[1])
        if kinds[0] != kinds[1]:
            parts = [one._replace(weight=one.weight.float()) for one in parts]  # type: ignore[union-attr]
        theirs = gradients(modules, low, parts, norm=narrow)
        errors.append(
            [[float((a - t).norm() / t.norm()) for a, t in zip(some, truth, strict=True)] for some in (ours, theirs)]
        )
    mean = torch.tensor(errors).square().mean(0).sqrt()
    assert (mean[0] < 2 * mean[1]).all(), mean


# ---- dropout ----


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.97])
@pytest.mark.parametrize("together", [1 << 20, 7])
def test_dropout_masks_are_the_references(rate: float, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many words are computed at a time."""
    monkeypatch.setattr(elementwise, "_COUNTERS", together)
    x = torch.rand(37, 11, dtype=torch.float64) + 1
    for seed in (0, 1, 2**62 - 1):
        kept = reference.dropout_mask(x.shape, rate, seed)
        assert torch.equal(elementwise.drop(x, rate, seed), torch.where(kept, x * (1 / (1 - rate)), 0))


def test_dropout_is_fair() -> None:
    """The share that falls out, of neighbours too and of the same entry with other seeds, within five deviations."""
    rate, count = 0.1, 200_000
    masks = [~reference.dropout_mask((count,), rate, seed) for seed in (3, 4)]
    shares = [
        masks[0].double().mean(),
        (masks[0] & masks[1]).double().mean(),
        (masks[0][1:] & masks[0][:-1]).double().mean(),
    ]
    for share, expected in zip(shares, (rate, rate**2, rate**2), strict=True):
        assert abs(float(share) - expected) < 5 * math.sqrt(expected / count)


# ---- arguments ----


def test_a_weight_that_is_stored_otherwise_is_asked_for_once_a_pass() -> None:
    calls = itertools.count()
    plain = linear(6, D, 2)

    def unpack() -> Tensor:
        next(calls)
        assert isinstance(plain.weight, Tensor)
        return plain.weight

    x = randn(3, D).requires_grad_()
    (got,) = lora_linears(x, [plain._replace(weight=unpack)])
    (expected,) = reference.lora_linears(x, [plain])
    assert torch.equal(got, expected) and next(calls) == 1
    got.sum().backward()
    assert next(calls) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight": torch.ones(6, 5)}, r"linears\[0\]\.weight has shape \(6, 5\), but must have \(out, 12\)"),
        ({"weight": torch.ones(6, D, requires_grad=True)}, "requires a gradient, but only adapters"),
        ({"bias": torch.ones(6, requires_grad=True)}, "bias requires a gradient"),
        ({"lora_a": None}, "has one of lora_a and lora_b"),
        ({"lora_a": torch.ones(3, D)}, r"lora_a has shape \(3, 12\), but must have \(2, 12\)"),
        ({"lora_b": torch.ones(5, 2)}, r"lora_b has shape \(5, 2\), but must have \(6, 2\)"),
        ({"lora_b": torch.ones(6)}, "must have two dimensions"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"weight": torch.ones(6, D, dtype=torch.int64)}, "must be float16, bfloat16, float32 or float64"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_bad_layers_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        lora_linears(randn(3, D), [linear(6, D, 2)._replace(**changes)])


def test_bad_inputs_are_named() -> None:
    x, layer = randn(3, D), linear(6, D, 2)
    for arguments, said in (
        ((x.long(), [layer]), "x must be float16"),
        ((x, []), "linears is empty"),
        ((torch.tensor(1.0), [layer]), "x is a scalar"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            lora_linears(*arguments)
    with pytest.raises(ValueError, match="residual has shape"):
        lora_linears(x, [layer], residual=randn(4, 6))
    with pytest.raises(ValueError, match=r"norm\[0\] has shape"):
        lora_linears(x, [layer], norm=(torch.ones(5), 1e-5))
    with pytest.raises(ValueError, match=r"norm\[1\] is -1"):
        lora_linears(x, [layer], norm=(torch.ones(D), -1))
