"""What a layer computes between its products, by both backends: against formulas in fp64, and by facts of the mask.

Tolerances are rounding bounds, u = 2^-24: a sum of d numbers is off by at most d u times the sum of their absolute
values, and what is derived from it by a few more; a result of 16 bits by one unit in its last place besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dopsd_kernels import reference
from dopsd_kernels.common import backends
from dopsd_kernels.lora_layer import LoraLinear, elementwise, lora_linears, lora_swiglu, rotary

kernels: Any = pytest.importorskip("dopsd_kernels.lora_layer.kernels", exc_type=ImportError)

U = 2.0**-24
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes it the one that is chosen."""

    def choose(asked: str, tensors: list[Tensor | None], also: str | None = None) -> str:
        return backends.choose_backend(request.param, tensors, also)

    monkeypatch.setattr(elementwise, "choose_backend", choose)
    return request.param


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(DEVICE, dtype)


def close(found: Tensor, exact: Tensor, bound: Tensor) -> None:
    """`bound` is of what was computed; the result's own rounding comes on top, and its smallest number."""
    one = torch.finfo(found.dtype)
    limit = bound + one.eps * (exact.abs() + bound) + one.smallest_normal * one.eps
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= limit).all()


# Interpreted, a rounding to bf16 cuts off: what is in bf16 here gives fp32, or is exact.
NORMS = [  # N, d, dtype of x, of the result
    (5, 40, FP32, FP32),
    (3, 129, FP16, FP16),
    (4, 64, BF16, FP32),
    (1, 1, FP32, FP16),
    (2, 16384, FP16, FP32),
]


@pytest.mark.parametrize(("n", "width", "dtype", "out"), NORMS)
def test_norm_and_its_gradient(backend: str, n: int, width: int, dtype: torch.dtype, out: torch.dtype) -> None:
    x = randn(n, 2 * width, dtype=dtype)[:, :width] if n > 1 else randn(n, width, dtype=dtype)  # with gaps
    weight, gradient = randn(width, seed=1), randn(n, width, seed=2, dtype=out)
    exact_x = x.double().requires_grad_()
    exact = F.rms_norm(exact_x, (width,), weight.double(), 1e-5)
    close(elementwise.rms_norm(x, weight, 1e-5, out), exact.detach(), (width / 2 + 8) * U * exact.detach().abs())

    (of_x,) = torch.autograd.grad(exact, exact_x, gradient.double())
    h, scaled = x.double(), gradient.double() * weight.double()
    inverse = (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    terms = inverse * (scaled.abs() + h.abs() * (scaled * h).abs().mean(-1, keepdim=True) * inverse.square())
    if dtype == BF16:
        return
    for more in (None, randn(n, width, seed=3), randn(n, 1, seed=3, dtype=dtype).expand(-1, width)):
        found = elementwise.rms_norm_backward(gradient, x, more, weight, 1e-5)
        rest = 0 if more is None else more.double()
        assert found.dtype == dtype
        close(found, of_x + rest, (2 * width + 20) * U * (terms + abs(rest)))


@pytest.mark.parametrize(("shape", "dtype"), [((5, 937), FP32), ((3, 43), FP16), ((1, 1), FP32)])
def test_swiglu_and_its_gradient(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up, gradient = (scale * randn(*shape, seed=i, dtype=dtype) for i, scale in enumerate((4, 1, 1)))
    if shape[0] > 1:
        gate.view(-1)[:2] = torch.tensor([-30.0, 30.0])  # beyond them fp16 has no sigmoid
        up = up.T.contiguous().T
    g, u = (x.double().requires_grad_() for x in (gate, up))
    exact = F.silu(g) * u
    grads = torch.autograd.grad(exact, (g, u), gradient.double())
    g, u, d = gate.double(), up.double(), gradient.double()
    size, s = g.abs(), g.sigmoid()
    slope = 1 + g * (1 - s)
    # PyTorch's own rounds to 16 bits after every operation: as often as those of the exact formula.
    steps = 3 * torch.finfo(dtype).eps if backend == "torch" and dtype == FP16 else 0
    out_bound = ((size + 8) * U + steps) * exact.detach().abs()
    of_gate_bound = (d * u * s).abs() * (U * (4 * size + 12 + (size + 8) * slope.abs()) + steps * (1 + size))
    of_up_bound = ((size + 8) * U + steps) * (d * g * s).abs()
    if steps:  # a rounding to a subnormal number
        out_bound, of_gate_bound, of_up_bound = (x + 2.0**-22 for x in (out_bound, of_gate_bound, of_up_bound))
    forward = elementwise.swiglu(gate, up)
    close(forward, exact.detach(), out_bound)
    of_gate, of_up, again = elementwise.swiglu_backward(gradient.clone(), gate, up)
    close(of_gate, grads[0], of_gate_bound)
    close(of_up, grads[1], of_up_bound)
    assert torch.equal(again, forward)


def test_infinities_and_nan_are_those_of_pytorch(backend: str) -> None:
    gate = torch.tensor([[math.nan, math.inf, -math.inf, 200.0, -200.0, 0.0, 1.0]], device=DEVICE)
    ones = torch.ones_like(gate)
    g = gate.clone().requires_grad_()
    want = F.silu(g)
    (of_gate,) = torch.autograd.grad(want.sum(), g)
    for found, right in zip(elementwise.swiglu_backward(ones.clone(), gate, ones), (of_gate, want, want), strict=True):
        torch.testing.assert_close(found, right.detach(), equal_nan=True, rtol=16 * U, atol=2.0**-126)
    x = ones.repeat(3, 1)
    x[1, 4] = math.nan
    x[2, 0] = math.inf
    norm = elementwise.rms_norm(x, ones[0], 0.0, FP32)
    assert norm.isnan().sum(1).tolist() == [0, 7, 1] and norm[2, 1:].eq(0).all()
    assert elementwise.drop(x, 0.5, 3).isnan()[1].nonzero().tolist() == [[4]]  # dropped or not


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_rotary(backend: str, inverse: bool, dtype: torch.dtype) -> None:
    for shape, tables in (((2, 3, 5, 6), 2), ((3, 2, 4, 16), 1), ((1, 19, 1, 2), 1)):
        batch, heads, length, width = shape
        x = randn(batch, length, heads, width, dtype=dtype).transpose(1, 2)
        # Any tables: a transpose that takes both halves for one is wrong.
        cos, sin = (randn(tables, 1, length, width, seed=i) for i in (1, 2))
        matrix = torch.diag_embed(cos.double())  # (.., D, D): what a token's x is multiplied by
        half = width // 2
        for i in range(half):
            matrix[..., i, i + half] = -sin[..., i]
            matrix[..., i + half, i] = sin[..., i + half]
        matrix = matrix.mT if inverse else matrix
        exact, terms = (
            torch.einsum("...ij,...j->...i", m, y) for m, y in ((matrix, x.double()), (matrix.abs(), x.double().abs()))
        )
        found = elementwise.rotary(x, cos, sin, inverse)
        assert found.stride() == x.stride() or shape[0] == 1
        close(found, exact, 3 * U * terms)
        assert torch.equal(elementwise.rotary(x.mT.contiguous().mT, cos, sin, inverse), found)
    x = randn(1, 2, 3, 4).requires_grad_()
    cos, sin = (randn(1, 1, 3, 4, seed=i) for i in (1, 2))
    turned = rotary(x, cos, sin)
    upstream = randn(1, 2, 3, 4, seed=3)
    (of_x,) = torch.autograd.grad(turned, x, upstream)
    # <g, R x> = <R' g, x>: sums of 24 and of 2 products.
    left, right = (upstream * turned).double(), (of_x * x).double()
    assert (left.sum() - right.sum()).abs() <= 6 * U * (left.abs().sum() + right.abs().sum() + 24)


def test_rotary_of_normed_heads(backend: str) -> None:
    """As the two after one another in fp64; x as linear layers write it, with the heads of a token side by side."""
    x = randn(2, 3, 5, 6).transpose(1, 2).requires_grad_()
    cos, sin, weight = randn(1, 1, 3, 6, seed=1), randn(1, 1, 3, 6, seed=2), randn(6, seed=3)
    upstream = randn(2, 5, 3, 6, seed=4)
    turned = rotary(x, cos, sin, norm=(weight, 1e-5))
    (of_x,) = torch.autograd.grad(turned, x, upstream)
    wide = x.detach().double().requires_grad_()
    inner = F.rms_norm(wide, (6,), weight.double(), 1e-5)
    exact = inner * cos + torch.cat((-inner[..., 3:], inner[..., :3]), -1) * sin
    (of_wide,) = torch.autograd.grad(exact, wide, upstream.double())
    # Sums of six products of numbers of order one, and two more; a norm or a transpose left out is wrong by order one.
    close(turned, exact, 32 * U * (1 + exact.abs()))
    close(of_x, of_wide, 128 * U * (1 + of_wide.abs().amax()))
    with pytest.raises(ValueError, match="norm"):
        rotary(x, cos, sin, norm=(weight[:5], 1e-5))


# ------------------------------------------------------------------------------------------------------------
# Dropout
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 12345])
def test_the_mask_is_the_one_that_is_specified(backend: str, seed: int) -> None:
    for shape, probability in (((5, 967), 0.25), ((1, 3), 0.5), ((2, 64), 0.999)):
        place = torch.arange(shape[0] * shape[1])
        zero = torch.zeros_like(place)
        key = (zero + (seed & 0xFFFFFFFF), zero + (seed >> 32 & 0xFFFFFFFF))
        words = torch.stack(reference.philox4x32((place // 4, zero, zero, zero), key), -1)
        kept = words.gather(-1, place[:, None] % 4).view(shape).to(DEVICE) >= probability * 2**32
        for dtype in (FP32, FP16):
            x = randn(*shape, dtype=dtype)
            expected = (x * kept).mul_(1 / (1 - probability))
            assert torch.equal(elementwise.drop(x, probability, seed), expected)
            total = randn(*shape, seed=1, dtype=dtype)
            added = elementwise.drop(x.T.contiguous().T, probability, seed, total.clone())
            # What is added may have been rounded by itself.
            close(added, total.double() + expected.double(), torch.finfo(dtype).eps * expected.double().abs())
    exact = elementwise.drop(randn(3, 5, dtype=BF16), 0.5, seed)
    assert torch.equal(exact, elementwise.drop(randn(3, 5, dtype=BF16).float(), 0.5, seed).to(BF16))


def test_the_mask_is_random() -> None:
    """Shares that are sums of independent draws lie within five of their standard deviations."""
    count, p = 1 << 18, 0.1
    ones = torch.ones(64, count // 64, device=DEVICE)
    first, second, third = (elementwise.drop(ones, p, seed).flatten().eq(0).double() for seed in (1, 2, 1 + 2**32))
    for share, expected in (
        (first.mean(), p),
        *(((first * first.roll(step)).mean(), p * p) for step in (1, 2, 3, 4, 64, count // 64)),
        *(((first * other).mean(), p * p) for other in (second, third)),
    ):
        assert abs(share - expected) <= 5 * math.sqrt(expected / count)  # neighbours' products depend a little


# ------------------------------------------------------------------------------------------------------------
# Sizes, and who computes
# ------------------------------------------------------------------------------------------------------------


def test_nothing_of_nothing(backend: str) -> None:
    x, weight = randn(0, 8), randn(8)
    for found in (
        elementwise.rms_norm(x, weight, 1e-5, FP16),
        elementwise.rms_norm_backward(x, x, x, weight, 1e-5),
        elementwise.swiglu(x, x),
        *elementwise.swiglu_backward(x, x, x),
        elementwise.drop(x, 0.5, 0),
    ):
        assert found.shape == x.shape
    assert elementwise.rotary(randn(0, 2, 3, 4), randn(1, 1, 3, 4), randn(1, 1, 3, 4)).shape == (0, 2, 3, 4)


def test_offsets_beyond_32_bits() -> None:
    space = torch.empty((1 << 31) + 64, dtype=FP16, device=DEVICE)  # 4 GiB, of which a few pages are used
    far = space.as_strided((3, 24), (1 << 30, 1))
    far.copy_(randn(3, 24, dtype=FP16))
    near, weight = far.clone(), randn(24, seed=1)
    assert torch.equal(kernels.rms_norm(far, weight, 1e-5, FP16), kernels.rms_norm(near, weight, 1e-5, FP16))
    backward = [kernels.rms_norm_backward(x, x, x, weight, 1e-5) for x in (far, near)]
    assert torch.equal(*backward)
    cos, sin = (randn(1, 1, 1, 8, seed=i) for i in (1, 2))
    for split in ((3, 3, 1, 8), (3, 1, 3, 8)):  # far apart: batches; and, of their transposes, heads and tokens
        tables = [table.expand(1, 1, split[2], 8) for table in (cos, sin)]
        rotated = [kernels.rotary(x.view(split), *tables) for x in (far, near)]
        assert torch.equal(*rotated)
    by_head = [kernels.rotary(x.view(3, 3, 1, 8).transpose(0, 1), cos, sin) for x in (far, near)]
    assert torch.equal(*by_head)
    by_token = [kernels.rotary(x.view(1, 3, 3, 8).transpose(1, 2), *tables) for x in (far, near)]
    assert torch.equal(*by_token)


def test_what_the_kernels_do_not_take_is_pytorch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "choose_backend", lambda _, *rest: backends.choose_backend("triton", *rest))
    x = randn(2, 8)
    for call, reason in (
        (lambda: elementwise.drop(x.double(), 0.5, 0), "float64"),
        (lambda: elementwise.swiglu(x, x.double()), "float64"),
        (lambda: elementwise.rotary(x.view(1, 1, 2, 8).double(), *[x.view(1, 1, 2, 8)] * 2), "float64"),
        (lambda: elementwise.rms_norm(randn(1, 16385), randn(16385), 1e-5, FP32), "up to 16384 columns, but not 16385"),
        (lambda: elementwise.rms_norm_backward(*[randn(1, 16385)] * 2, None, randn(16385), 1e-5), "16384 columns"),
    ):
        with pytest.raises(ValueError, match=reason):
            call()
    monkeypatch.undo()
    assert elementwise.drop(x.double(), 0.5, 0).dtype == FP64


def layer(dtype: torch.dtype, dropout: float) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A layer without its attention, and what has a gradient."""
    width, hidden, rank = 24, 20, 4
    count = iter(range(100))

    def draw(*shape: int) -> Tensor:
        return randn(*shape, seed=next(count), dtype=FP32).to(dtype) / shape[-1] ** 0.5

    def linear(rows: int, columns: int) -> LoraLinear:
        a, b = (draw(*shape).requires_grad_() for shape in ((rank, columns), (rows, rank)))
        return LoraLinear(draw(rows, columns), None, a, b, 2.0, dropout, next(count))

    x = draw(2, 3, width).requires_grad_()
    linears = [linear(width, width) for _ in range(4)] + [linear(*s) for s in [(hidden, width)] * 2 + [(width, hidden)]]
    norm, tables = (1 + draw(width), 1e-5), [draw(1, 1, 3, 6), draw(1, 1, 3, 6)]

    def forward() -> Tensor:
        parts = lora_linears(x, linears[:3], norm=norm)
        q, k, v = (part.unflatten(-1, (4, 6)).transpose(1, 2) for part in parts)
        mixed = rotary(q, *tables).sigmoid() * rotary(k, *tables) + v
        (y,) = lora_linears(mixed.transpose(1, 2).flatten(2), linears[3:4], residual=x)
        return lora_swiglu(y, *linears[4:], norm=norm)

    return forward, [x, *(part for one in linears for part in (one.lora_a, one.lora_b))]  # type: ignore[list-item]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_layer_of_the_kernels(backend: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same in fp64, which finite differences check."""
    found = []
    for dtype in (FP32, FP64):
        if dtype == FP64:
            monkeypatch.undo()
        forward, inputs = layer(dtype, dropout)
        out = forward()
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, exact in zip(*found, strict=True):
        # Seven products of up to 24 terms, one after the other, forward and backward: 14 * 24 roundings, in the norm of
        # the whole, where those of independent signs add up to far less than this.
        assert (ours - exact).norm() <= 14 * 24 * U * exact.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_layers_gradients_are_finite_differences(dropout: float) -> None:
    forward, inputs = layer(FP64, dropout)
    assert torch.autograd.gradcheck(lambda *_: forward(), inputs, fast_mode=True)  # changes the inputs in place


def test_compiled_it_is_the_same_and_nothing_warns(recwarn: pytest.WarningsRecorder) -> None:
    forward, inputs = layer(FP32, 0.3)
    plain = forward()
    compiled = torch.compile(forward, backend="eager")()
    assert torch.equal(compiled, plain)
    both = [torch.autograd.grad(out.sum(), inputs) for out in (plain, compiled)]
    assert all(map(torch.equal, *both))
    assert not [warning for warning in recwarn if "Dynamo" in str(warning.message)]  # what it met and cannot trace
