"""prefix_attention is attention over concatenated keys: values, gradients, masks, edge cases."""

import importlib
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dopsd_kernels import prefix_attention, reference
from dopsd_kernels.prefix_attention import cascade

NAMES = ("q", "k", "v", "k_prefix", "v_prefix")


def tensors(
    groups: int = 2, sequences: int = 3, heads: int = 4, key_heads: int = 2, length: int = 5, prefix: int = 7,
    width: int = 8, dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "q": (groups, sequences, heads, length, width),
        "k": (groups, sequences, key_heads, length, width),
        "v": (groups, sequences, key_heads, length, width),
        "k_prefix": (groups, key_heads, prefix, width),
        "v_prefix": (groups, key_heads, prefix, width),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def run(op: Any, inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The output and the five gradients."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = op(**leaves, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return [out, *torch.autograd.grad(out, list(leaves.values()), upstream)]


def concatenated(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, **options: Any) -> Tensor:
    """PyTorch's attention, one sequence and one query head after the other."""
    prefix_mask, own_mask = options.get("prefix_mask"), options.get("own_mask")
    repeats = q.shape[2] // k.shape[2]
    out = []
    for g, s, h in itertools.product(*map(range, q.shape[:3])):
        keys = torch.cat([k_prefix[g, h // repeats], k[g, s, h // repeats]])
        values = torch.cat([v_prefix[g, h // repeats], v[g, s, h // repeats]])
        seen = torch.ones(len(keys), dtype=torch.bool)
        if prefix_mask is not None:
            seen[: k_prefix.shape[2]] = prefix_mask[g]
        if options.get("prefix_length") is not None:
            seen[int(options["prefix_length"][g, s]) : k_prefix.shape[2]] = False
        if own_mask is not None:
            seen[k_prefix.shape[2] :] = own_mask[g, s]
        out.append(F.scaled_dot_product_attention(q[g, s, h], keys[seen], values[seen], scale=options.get("scale")))
    return torch.stack(out).view(q.shape)


@pytest.fixture(params=["fused", "explicit"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's fused attention, and explicit products as on other devices."""
    monkeypatch.setattr(cascade, "is_fused", lambda q: request.param == "fused")


MASKS = {
    "none": {},
    "prefix": {"prefix_mask": torch.tensor([[False, False, True, True, True, True, True], [True] * 7])},
    "own": {"own_mask": torch.arange(5) < torch.tensor([[5, 1, 3], [2, 5, 4]])[..., None]},
}
MASKS["both"] = MASKS["prefix"] | MASKS["own"]
MASKS["length"] = {"prefix_length": torch.tensor([[0, 3, 7], [6, 1, 20]])}
MASKS["all"] = MASKS["both"] | MASKS["length"]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
def test_it_is_attention_over_concatenated_keys(
    heads: tuple[int, int], masks: str, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tensors(heads=heads[0], key_heads=heads[1])
    options = {**MASKS[masks], "scale": scale}
    expected = run(concatenated, inputs, **options)
    for op, workspace in ((reference.prefix_attention, 0), (prefix_attention, 1 << 26), (prefix_attention, 1)):
        monkeypatch.setattr(cascade, "_WORKSPACE_BYTES", workspace)  # one chunk, or one a sequence
        for ours, theirs in zip(run(op, inputs, **options), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("both_ways")
def test_gradients_match_finite_differences() -> None:
    inputs = tensors(1, 2, 2, 1, 2, 3, 2)
    leaves = [x.requires_grad_() for x in inputs.values()]
    masks = {
        "prefix_mask": torch.tensor([[True, False, True]]),
        "own_mask": torch.tensor([[[True, False], [True, True]]]),
    }
    assert torch.autograd.gradcheck(lambda *x: prefix_attention(*x, **masks), leaves)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_the_plain_computation(dtype: torch.dtype) -> None:
    inputs = tensors(length=9, prefix=33, width=16, dtype=dtype)
    exact = run(reference.prefix_attention, {name: x.double() for name, x in inputs.items()})
    plain = run(concatenated, inputs)
    for ours, theirs, truth in zip(run(prefix_attention, inputs), plain, exact, strict=True):
        error, allowed = ((x.double() - truth).abs().max().item() for x in (ours, theirs))
        assert ours.dtype == dtype and error <= 2 * allowed + torch.finfo(dtype).eps * truth.abs().max().item()


def test_autocast_has_no_effect() -> None:
    inputs = tensors(dtype=torch.float32)
    outside = run(prefix_attention, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(prefix_attention, inputs)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


@pytest.mark.usefixtures("both_ways")
def test_large_scores() -> None:
    inputs = tensors(dtype=torch.float32)
    inputs["q"] *= 1e3
    exact = run(reference.prefix_attention, {name: x.double() for name, x in inputs.items()})
    assert exact[0].isfinite().all()
    for ours, theirs in zip(run(prefix_attention, inputs)[:1], exact[:1], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-2)  # scores of 1e4 in fp32: 1e-3 each
    assert all(x.isfinite().all() for x in run(prefix_attention, inputs))


@pytest.mark.usefixtures("both_ways")
def test_a_query_that_sees_nothing_gets_zero() -> None:
    inputs = tensors()
    masks = {
        "prefix_mask": torch.tensor([[False] * 7, [True] * 7]),
        "own_mask": torch.ones(2, 3, 5, dtype=torch.bool),
    }
    masks["own_mask"][0, 1] = False
    for op in (prefix_attention, reference.prefix_attention):
        out, *grads = run(op, inputs, **masks)
        assert not out[0, 1].any() and out[0, 0].any()
        assert all(x.isfinite().all() for x in grads)
        assert not grads[0][0, 1].any() and not grads[3][0].any() and grads[3][1].any()


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("shape", [{"prefix": 0}, {"sequences": 0}, {"groups": 0}, {"length": 1, "prefix": 1}])
def test_empty_and_smallest(shape: dict[str, int]) -> None:
    inputs = tensors(**shape)
    ours = run(prefix_attention, inputs)
    if inputs["q"].numel():
        for a, b in zip(ours, run(concatenated, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    else:
        assert [x.shape for x in ours] == [inputs["q"].shape, *(x.shape for x in inputs.values())]
        assert not any(x.any() for x in ours)


@pytest.mark.usefixtures("both_ways")
def test_strided_inputs_and_a_second_backward() -> None:
    inputs = tensors()
    strided = {name: x.transpose(-1, -2).contiguous().transpose(-1, -2) for name, x in inputs.items()}
    for a, b in zip(run(prefix_attention, strided), run(prefix_attention, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    leaves = {name: x.requires_grad_() for name, x in tensors().items()}
    out = prefix_attention(**leaves).sum()
    first, second = (torch.autograd.grad(out, list(leaves.values()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_torch_compile_and_opcheck() -> None:
    inputs = tensors(dtype=torch.float32)
    masks = MASKS["all"]
    compiled = torch.compile(lambda **x: prefix_attention(**x, **masks), backend="aot_eager", fullgraph=True)
    for a, b in zip(run(compiled, inputs), run(prefix_attention, inputs, **masks), strict=True):
        torch.testing.assert_close(a, b)
    arguments = (*inputs.values(), masks["prefix_mask"], None, masks["prefix_length"])
    torch.library.opcheck(torch.ops.dopsd.prefix_attention.default, (*arguments, 0.3, "torch"))
    out, lse = torch.ops.dopsd.prefix_attention(*arguments, 0.3, "torch")
    backward = torch.ops.dopsd.prefix_attention_backward.default
    torch.library.opcheck(backward, (out.clone(), *arguments, out, lse, 0.3, "torch"))


# ------------------------------------------------------------------------------------------------------------
# The kernels, in Triton's interpreter
# ------------------------------------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU, `pytest -m gpu` runs the compiled kernels"
)
SHAPES = {
    "one tile": {"sequences": 2, "length": 4},
    "several sequences in a tile": {"sequences": 7, "length": 5, "prefix": 33, "heads": 2, "key_heads": 1},
    "several tiles in a sequence": {"groups": 1, "sequences": 2, "length": 35, "prefix": 16, "heads": 2},
    "a tile for each sequence": {"groups": 1, "sequences": 3, "length": 16, "prefix": 1, "heads": 1, "key_heads": 1},
    "a ragged head": {"groups": 1, "width": 24, "heads": 1, "key_heads": 1},
    "single tokens": {"sequences": 18, "length": 1, "prefix": 3, "heads": 2},
    "no prefix": {"prefix": 0},
}


def check_kernels(inputs: dict[str, Tensor], **masks: Tensor) -> None:
    dtype = inputs["q"].dtype
    exact = run(prefix_attention, {name: x.double() for name, x in inputs.items()}, backend="torch", **masks)
    plain = run(reference.prefix_attention if masks else concatenated, inputs, **masks)
    for ours, theirs, truth in zip(run(prefix_attention, inputs, backend="triton", **masks), plain, exact, strict=True):
        assert ours.dtype == dtype
        if truth.numel():
            error, allowed = ((x.double() - truth).abs().max().item() for x in (ours, theirs))
            # Probabilities and d scores are rounded to the operands' dtype for the products they enter.
            assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * truth.abs().max().item()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels(shape: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    check_kernels(tensors(**SHAPES[shape], dtype=dtype))


@interpreted
@pytest.mark.parametrize(
    "shape", ["several sequences in a tile", "several tiles in a sequence", "single tokens", "no prefix"]
)
def test_the_kernels_where_sequences_see_parts_of_the_prefix(shape: str) -> None:
    pytest.importorskip("triton")
    inputs = tensors(**SHAPES[shape], dtype=torch.float32)
    groups, sequences, prefix = *inputs["q"].shape[:2], inputs["k_prefix"].shape[2]
    lengths = torch.randint(prefix + 1, (groups, sequences), generator=torch.Generator().manual_seed(3))
    check_kernels(inputs, prefix_length=lengths)


@interpreted
def test_the_kernels_where_nothing_is_seen() -> None:
    pytest.importorskip("triton")
    inputs = tensors(dtype=torch.float32)
    masks = {
        "prefix_mask": torch.tensor([[False] * 7, [True] * 7]),
        "own_mask": torch.ones(2, 3, 5, dtype=torch.bool),
    }
    masks["own_mask"][0, 1] = False
    ours = run(prefix_attention, inputs, backend="triton", **masks)
    assert not ours[0][0, 1].any()
    for a, b in zip(ours, run(prefix_attention, inputs, backend="torch", **masks), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@interpreted
def test_the_kernels_read_strided_inputs_and_masks_and_refuse_wide_heads() -> None:
    pytest.importorskip("triton")
    inputs = tensors(dtype=torch.float32)
    # As projections leave them: (G, S, T, H, D) in memory.
    strided = {name: x.transpose(-2, -3).contiguous().transpose(-2, -3) for name, x in inputs.items()}
    masks = {name: x.mT.contiguous().mT for name, x in MASKS["all"].items()}
    assert not any(x.is_contiguous() for x in (strided["q"], *masks.values()))
    check_kernels(strided, **masks)
    with pytest.raises(ValueError, match="at most 128, but D is 130"):
        prefix_attention(**tensors(width=130, dtype=torch.float32), backend="triton")


class Launches:
    """Takes a kernel's place and keeps the grids it is called with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *_, **__: None


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    kernels = pytest.importorskip("dopsd_kernels.prefix_attention.kernels")
    launches = Launches()
    for name in ("_forward", "_backward_queries", "_backward_keys"):
        monkeypatch.setattr(kernels, name, launches)
    return launches


@interpreted
def test_many_groups_and_heads_are_on_the_axis_that_holds_them(launches: Launches) -> None:
    # 66000 heads of two tiles of rows, 33000 of own keys in two tiles and of the prefix in one.
    run(prefix_attention, tensors(33000, 1, 2, 1, 17, 1, 1, torch.float16), backend="triton")
    assert launches.grids == [(132000,), (132000,), (66000,), (33000,)]


@interpreted
@pytest.mark.parametrize(("groups", "multiprocessors", "splits"), [(1, 132, 5), (2, 1, 2), (5, 1, 1)])
def test_sums_split_where_multiprocessors_would_be_idle(
    groups: int, multiprocessors: int, splits: int, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = importlib.import_module("dopsd_kernels.prefix_attention.kernels")
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: multiprocessors)
    # 160 rows of each group are 10 blocks: eight splits would have two each, so there are five.
    run(prefix_attention, tensors(groups, 10, 1, 1, 16, 1, 1, torch.float16), backend="triton")
    assert launches.grids[-1] == (groups * splits,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES.values(),
        dict(sequences=64, length=32, prefix=456, width=128, heads=8),  # the prefix' sums in several splits
        dict(groups=33000, sequences=1, heads=2, key_heads=1, length=17, prefix=1, width=16),  # and in one
    ],
)
def test_the_compiled_kernels(shape: dict[str, int], dtype: torch.dtype) -> None:
    inputs = {name: x.cuda() for name, x in tensors(**shape, dtype=dtype).items()}
    exact = run(reference.prefix_attention, {name: x.double() for name, x in inputs.items()})
    plain = run(_eager, inputs)
    for ours, theirs, truth in zip(run(prefix_attention, inputs, backend="triton"), plain, exact, strict=True):
        if truth.numel():
            error, allowed = ((x.double() - truth).abs().max().item() for x in (ours, theirs))
            assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * truth.abs().max().item()


def _eager(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor) -> Tensor:
    """Attention over concatenated keys in the inputs' own dtype."""
    repeats = q.shape[2] // k.shape[2]
    keys, values = (
        torch.cat([prefix[:, None].expand(-1, q.shape[1], -1, -1, -1), own], 3).repeat_interleave(repeats, 2)
        for prefix, own in ((k_prefix, k), (v_prefix, v))
    )
    return (q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1) @ values


BAD: dict[str, list[Any]] = {
    "q": [None, torch.zeros(2, 3, 4, 5, 8).long(), torch.zeros(3, 4, 5, 8), torch.zeros(2, 3, 4, 0, 8)],
    "k": [torch.zeros(2, 3, 3, 5, 8), torch.zeros(2, 3, 2, 6, 8), torch.zeros(2, 3, 2, 5, 8).half()],
    "v": [torch.zeros(2, 3, 4, 5, 8), torch.zeros(2, 3, 2, 5, 8, device="meta")],
    "k_prefix": [torch.zeros(2, 4, 7, 8), torch.zeros(2, 2, 7), torch.zeros(3, 2, 7, 8)],
    "v_prefix": [torch.zeros(2, 2, 6, 8)],
    "prefix_mask": [torch.ones(2, 7), torch.ones(2, 6).bool(), [True]],
    "own_mask": [torch.ones(2, 3, 5), torch.ones(2, 5).bool()],
    "prefix_length": [torch.ones(2, 3), torch.ones(2, 1).long(), [[1]]],
    "scale": [0.0, -1.0, math.nan, "1"],
    "backend": ["flash", None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_arguments_are_named(name: str, value: Any) -> None:
    good: dict[str, Any] = tensors(dtype=torch.float32)
    prefix_attention(**good)
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b.*\.$"):
        prefix_attention(**good | {name: value})
