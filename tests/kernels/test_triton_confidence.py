"""The Triton backend of fused_confidence: in the interpreter against the specification, and on a GPU if there is one.

Tolerances are rounding bounds: a sum of d products and a bias in fp32, in any order, is off by at most (d + 1) u times
the sum of their absolute values, u = 2^-24.
"""

import math

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from dopsd_kernels import fused_confidence, reference  # noqa: E402
from dopsd_kernels.common import configs  # noqa: E402
from dopsd_kernels.common import topk_kernels as topk  # noqa: E402
from dopsd_kernels.confidence import gumbel, kernels  # noqa: E402

U = 2.0**-24
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def run(hidden, weight, **arguments):
    return fused_confidence(hidden, weight, backend="triton", **arguments)


def use(monkeypatch, **changes):
    """Replace entries of the shipped configuration."""
    chosen = kernels.choose
    monkeypatch.setattr(kernels, "choose", lambda *a: {**chosen(*a), **changes})


def check(hidden, weight, *, bias=None, temperature=0.0, seed=None, top_k=0, exclude=()):
    """Compare with the specification in fp64, and samples with the other backend."""
    arguments = dict(bias=bias, temperature=temperature, seed=seed, top_k=top_k, exclude=exclude)
    ours = run(hidden, weight, entropy=True, **arguments)
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    logits[..., list(exclude)] = -math.inf
    expected = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ours.argmax, expected.indices[..., 0])
    assert torch.equal(ours.top_indices, expected.indices[..., :top_k])
    if temperature:
        assert torch.equal(ours.token, fused_confidence(hidden, weight, backend="torch", **arguments).token)
    else:
        assert torch.equal(ours.token, ours.argmax)
    terms = hidden.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs().clamp(max=9))
    logit_error = ((hidden.shape[-1] + 1) * U * terms).amax(-1, keepdim=True)
    lse = logits.logsumexp(-1, keepdim=True)
    # A sum of V terms exp(x), each off by |x| + 2 roundings of which |x| < 60 matter, and the rounding of the result.
    lse_error = logit_error + (weight.shape[0] + 62) * U + 2 * U * lse.abs()
    # With dH/dz = -p (log p + H), an error of all logits counts 2 H times; two such sums, of H and of 1, are divided.
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1, keepdim=True)
    entropy_error = 2 * logit_error * entropy + 2 * (weight.shape[0] + 66) * U * (entropy + 1)
    for ours_is, exact, error in (
        (ours.max_logit[..., None], expected.values[..., :1], logit_error),
        (ours.logit[..., None], logits.gather(-1, ours.token[..., None]), logit_error),
        (ours.top_values, expected.values[..., :top_k], logit_error),
        (ours.logsumexp[..., None], lse, lse_error),
        (ours.entropy[..., None], entropy, entropy_error),
    ):
        assert ours_is.dtype == torch.float32
        assert ((ours_is - exact).abs() <= error).all()


SHAPES = [  # N, V, d around the tiles of 16, 32 and 16 (fp32) or 32 (16-bit)
    (5, 131, 24),
    (17, 32, 16),
    (1, 1, 1),
    (2, 5, 3),
    (16, 300, 40),
]


@pytest.mark.parametrize(("n", "vocab", "width"), SHAPES)
@pytest.mark.parametrize("sample", [False, True])
def test_matches_the_specification(n, vocab, width, sample):
    hidden, weight, bias = randn(n, width), randn(vocab, width, seed=1), randn(vocab, seed=2)
    seed = torch.arange(n, device=DEVICE) * 7 - 3
    options = dict(temperature=0.7, seed=seed) if sample else {}
    check(hidden, weight, bias=bias if n > 1 else None, top_k=min(5, vocab), **options)


@pytest.mark.parametrize(
    ("hidden_type", "weight_type"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_types(hidden_type, weight_type):
    hidden, weight = randn(5, 40, dtype=hidden_type), randn(70, 40, seed=1, dtype=weight_type)
    check(
        hidden, weight, bias=randn(70, seed=2, dtype=hidden_type), temperature=0.5, seed=3 + torch.arange(5).to(DEVICE)
    )


@pytest.mark.parametrize("top_k", [1, 37, 70])
def test_top_k(top_k):
    check(randn(3, 8), randn(70, 8, seed=1), top_k=top_k)


def test_the_largest_top_k():
    hidden, weight = randn(2, 8), randn(150, 8, seed=1)
    check(hidden, weight, top_k=128)
    for arguments, reason in (
        ((hidden, weight, 129), "top_k is above 128"),
        ((hidden.double(), weight.double(), 1), "float64"),
    ):
        with pytest.raises(ValueError, match=f'^backend is "triton", but .*{reason}'):
            run(*arguments[:2], top_k=arguments[2])
        assert fused_confidence(*arguments[:2], top_k=arguments[2]).top_values.shape[1] == arguments[2]


def test_ties_go_to_the_lowest_id_across_tiles_and_splits():
    hidden, weight = randn(3, 4), torch.zeros(131, 4, device=DEVICE)
    out = run(hidden, weight, top_k=40)
    assert not out.argmax.any() and torch.equal(out.top_indices, torch.arange(40, device=DEVICE).expand(3, -1))
    torch.testing.assert_close(out.logsumexp, torch.full_like(out.logsumexp, math.log(131)))
    assert (run(hidden, weight, exclude=range(100)).token == 100).all()
    # 0 and -0 are one value.
    weight[::2] = -0.0
    assert torch.equal(run(hidden.abs(), weight, top_k=40).top_indices, out.top_indices)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # the interpreter's log 0
def test_impossible_ids():
    hidden, weight = randn(3, 8), randn(100, 8, seed=1)
    bias = randn(100, seed=2)
    bias[:40] = -math.inf  # the first tile, and a part of the second
    check(hidden, weight, bias=bias, top_k=3)
    check(
        hidden,
        weight,
        exclude=(0, 99, 40, 40),
        top_k=3,
        temperature=1.0,
        seed=torch.tensor([1, -1, 1 << 40]).to(DEVICE),
    )
    only = run(hidden, weight, exclude=[i for i in range(100) if i != 70], top_k=1, temperature=1.0, seed=0)
    assert (only.token == 70).all() and (only.top_indices == 70).all()
    assert torch.equal(only.logsumexp, only.max_logit) and torch.equal(only.logit, only.max_logit)
    # -inf wins over whatever the product is.
    weight[99] = math.nan
    assert not run(hidden, weight, exclude=(99,)).logsumexp.isnan().any()
    nothing = run(hidden, weight, bias=torch.full_like(bias, -math.inf), top_k=2)
    assert not nothing.token.any() and (nothing.logsumexp == -math.inf).all()
    assert nothing.top_indices.tolist() == [[0, 1]] * 3


def test_extreme_logits():
    bias = torch.zeros(40, device=DEVICE)
    bias[0] = -math.inf
    weight = torch.tensor([9.0, 1, 2, 2, 0] * 8, device=DEVICE)[:, None]
    out = run(torch.tensor([[1e4], [-1e4]], device=DEVICE), weight, bias=bias)
    assert out.token.tolist() == [5, 4]
    torch.testing.assert_close(out.logsumexp.cpu(), torch.tensor([9e4 + math.log(7), math.log(8)]))
    assert torch.equal(out.logit, out.max_logit)


def test_nan_and_infinity_stay_in_their_rows():
    hidden, weight = randn(4, 8), randn(70, 8, seed=1)
    good = run(hidden, weight, top_k=5, temperature=1.0, seed=1)
    hidden[1] = math.nan
    hidden[2, 0] = math.inf
    out = run(hidden, weight, top_k=5, temperature=1.0, seed=1)
    for a, b in zip(good, out, strict=True):
        assert torch.equal(a[[0, 3]], b[[0, 3]])
    assert out.logsumexp[1].isnan() and out.max_logit[1].isnan() and out.argmax[1] == 0
    assert out.top_indices[1].tolist() == [0, 1, 2, 3, 4] and out.top_values[1].isnan().all()
    assert out.max_logit[2] == out.logsumexp[2] == math.inf
    for ids in (out.token, out.argmax, out.top_indices):
        assert ((ids >= 0) & (ids < 70)).all()


def test_strides_leading_dimensions_and_no_rows():
    hidden, weight = randn(2, 3, 24), randn(40, 24, seed=1)
    seed = torch.arange(6, device=DEVICE).reshape(2, 3)
    expected = run(hidden, weight, temperature=1.0, seed=seed, top_k=2)
    wide = torch.zeros(80, 48, device=DEVICE)
    wide[::2, ::2] = weight
    for h, w in (
        (hidden.transpose(0, 2).contiguous().transpose(0, 2), weight.T.contiguous().T),
        (hidden.repeat_interleave(2, -1)[..., ::2], wide[::2, ::2]),
    ):
        assert not h.is_contiguous() and not w.is_contiguous()
        for a, b in zip(expected, run(h, w, temperature=1.0, seed=seed, top_k=2), strict=True):
            assert torch.equal(a, b)
    empty = run(hidden[:0], weight, temperature=1.0, seed=seed[:0], top_k=2)
    assert empty.token.shape == (0, 3) and empty.top_values.shape == (0, 3, 2)
    assert not run(hidden.requires_grad_(), weight).logit.requires_grad


def test_offsets_of_more_than_32_bits():
    space = torch.empty((1 << 31) + 64, dtype=torch.float16, device=DEVICE)  # 4 GiB, of which a few pages are used
    hidden, weight = (space[start:].as_strided((3, 24), (1 << 30, 1)) for start in (0, 32))
    hidden.copy_(randn(3, 24))
    weight.copy_(randn(3, 24, seed=1))
    for a, b in zip(run(hidden, weight, top_k=2), run(hidden.clone(), weight.clone(), top_k=2), strict=True):
        assert torch.equal(a, b)


def test_a_sample_does_not_depend_on_batch_or_tiles(monkeypatch):
    hidden, weight = randn(20, 8), randn(100, 8, seed=1)
    seed = torch.arange(20, device=DEVICE) * 1000 - 5
    arguments = dict(temperature=1.0, top_k=4, exclude=(3,))
    together = run(hidden, weight, seed=seed, **arguments)
    assert together.token.unique().numel() > 5
    assert torch.equal(run(hidden[7:9], weight, seed=seed[7:9], **arguments).token, together.token[7:9])
    for changes in (
        dict(BLOCK_N=32, BLOCK_V=128, SPLITS=1, PROGRAMS=1),
        dict(BLOCK_V=16, SPLITS=7),
        dict(BLOCK_V=16, SPLITS=100, GROUP=1),
    ):
        with monkeypatch.context() as patch:
            use(patch, **changes)
            other = run(hidden, weight, seed=seed, **arguments)
        for name in ("token", "argmax", "top_indices"):
            assert torch.equal(getattr(other, name), getattr(together, name))
        torch.testing.assert_close(other.logsumexp, together.logsumexp, rtol=4 * U, atol=4 * U)


def test_a_column_far_below_wins_by_its_noise(monkeypatch):
    use(monkeypatch, BLOCK_V=512, SPLITS=1, PROGRAMS=1)
    seed, column = torch.tensor([133495], device=DEVICE), 2072  # the noise there is 20.166
    noise = reference.gumbel_noise(seed[:, None], torch.tensor([5, column], device=DEVICE), torch.float32)[0]
    weight = torch.full((2100, 1), -60.0, device=DEVICE)
    weight[5] = 0
    for margin, token in ((0.01, column), (-0.01, 5)):
        weight[column] = noise[0] - noise[1] + margin
        assert run(torch.ones(1, 1, device=DEVICE), weight, temperature=1.0, seed=seed).token.item() == token


@pytest.mark.skipif(DEVICE != "cpu", reason="counts calls in the interpreter")
def test_tiles_that_cannot_win_get_no_noise(monkeypatch):
    use(monkeypatch, BLOCK_V=64, SPLITS=1, PROGRAMS=1)
    tiles, gumbel_noise = [], kernels.gumbel_noise
    monkeypatch.setattr(kernels, "gumbel_noise", lambda *a, **k: (tiles.append(1), gumbel_noise(*a, **k))[1])
    weight = randn(320, 1) - 40
    weight[3] = weight[200] = 0  # the tiles 0 and 3
    hidden, seed = torch.ones(2, 1, device=DEVICE), torch.arange(2, device=DEVICE)
    for temperature, count in ((1.0, 2), (3.0, 5)):
        tiles.clear()
        token = run(hidden, weight, temperature=temperature, seed=seed).token
        assert torch.equal(token, fused_confidence(hidden, weight, temperature=temperature, seed=seed).token)
        assert len(tiles) == count


@triton.jit
def _noise_kernel(seed, out, begin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    noise = kernels.gumbel_noise(tl.load(seed + rows), begin, COLUMNS)
    tl.store(out + rows[:, None] * COLUMNS + columns[None, :], noise)


@triton.jit
def _word_kernel(words, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, kernels.gumbel_of_word(tl.load(words + at).to(tl.uint32)))


def test_noise_is_that_of_the_specification():
    seed = torch.tensor([0, -1, 0x123456789ABCDEF, -(1 << 63)], device=DEVICE)
    out = torch.empty(4, 64, device=DEVICE)
    _noise_kernel[(1,)](seed, out, 1 << 20, 4, 64)
    expected = reference.gumbel_noise(
        seed[:, None], torch.arange(1 << 20, (1 << 20) + 64, device=DEVICE), torch.float64
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-5)
    edges = [0, 1, (1 << 29) - 1, 1 << 29, (1 << 29) + 64, 1 << 31, (1 << 32) - 300, (1 << 32) - 1]
    words = torch.cat(
        [torch.tensor(edges), torch.randint(1 << 32, (4088,), generator=torch.Generator().manual_seed(0))]
    )
    words = words.to(DEVICE)
    out = torch.empty(4096, device=DEVICE)
    _word_kernel[(1,)](words, out, 4096)
    # 2.6e-7 from 1 - u, and a few roundings of logarithms up to 22.2.
    expected = gumbel.gumbel_of_word(words, torch.float32)
    assert ((out - expected).abs() <= 2.6e-7 + 4 * U * (1 + expected.abs())).all()


@triton.jit
def _insert_kernel(top, values, out, keys, K: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr):
    rows, columns, places = tl.arange(0, ROWS)[:, None], tl.arange(0, C)[None, :], tl.arange(0, K)[None, :]
    key = topk.ordered_key(tl.load(values + rows * C + columns), columns)
    tl.store(keys + rows * C + columns, key)
    kept = topk.insert_largest(tl.load(top + rows * K + places), key)
    tl.store(out + rows * K + places, kept)


def test_keys_order_values_then_columns_and_the_largest_are_kept():
    values = randn(4, 32)
    values[1] = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45] * 4)
    values[2] = -math.inf
    values[3] = values[3].round()
    top = torch.full((4, 8), topk.LOWEST_KEY, device=DEVICE)
    out, keys = torch.empty_like(top), torch.empty(4, 32, dtype=torch.int64, device=DEVICE)
    _insert_kernel[(1,)](top, values, out, keys, 8, 32, 4)
    expected = values.sort(dim=-1, descending=True, stable=True)  # NaN first
    assert torch.equal(keys.argsort(dim=-1, descending=True), expected.indices)
    unpacked, columns = topk.unpack_keys(keys)
    torch.testing.assert_close(unpacked, values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(columns, torch.arange(32, device=DEVICE).expand(4, -1)) and (keys > topk.LOWEST_KEY).all()
    assert torch.equal(out.sort(dim=-1, descending=True).values, keys.sort(dim=-1, descending=True).values[:, :8])
    # Inserting the same keys again changes nothing but doubles them; into fewer keys than places, all come.
    _insert_kernel[(1,)](top[:, :8].contiguous(), values[:, :4].contiguous(), out, keys, 8, 4, 4)
    kept = out.sort(dim=-1, descending=True).values
    assert torch.equal(kept[:, :4], keys.flatten()[:16].reshape(4, 4).sort(dim=-1, descending=True).values)
    assert (kept[:, 4:] < topk.LOWEST_KEY + 8).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("sample", [False, True])
def test_the_op_is_registered_properly(backend, sample):
    seed = torch.arange(3, device=DEVICE) if sample else None
    arguments = (randn(3, 8), randn(20, 8, seed=1), randn(20, seed=2), 0.5 * sample, seed, 2, [4], sample, backend)
    torch.library.opcheck(torch.ops.dopsd.confidence.default, arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_compiles_as_one_graph(backend, temperature):
    weight = randn(20, 8, seed=1)

    def sure(hidden):
        options = dict(temperature=temperature, seed=5, top_k=2, exclude=(3,), backend=backend)
        return fused_confidence(2 * hidden, weight, **options)

    torch._dynamo.reset()
    compiled = torch.compile(sure, backend="aot_eager", fullgraph=True)
    for hidden in (randn(2, 3, 8), randn(2, 5, 8)):
        for a, b in zip(sure(hidden), compiled(hidden), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("arch", ["interpret", *configs.SHARED_MEMORY])
@pytest.mark.parametrize("kernel", ["confidence", "confidence_argmax", "confidence_wide"])
def test_every_architecture_has_a_configuration_for_any_size(kernel, arch):
    entries = [entry for entry in configs.read()[kernel] if arch in entry["arch"]]
    assert set(entries[-1]) == {"arch", "config"}
    limits = [entry["rows"] for entry in entries[:-1]]
    assert limits == sorted(limits)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA or ROCm GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [1, 32, 2048])
def test_on_a_gpu_it_is_as_exact_as_the_plain_computation(n, dtype):
    hidden, weight = randn(n, 512, dtype=dtype), randn(32003, 512, seed=1, dtype=dtype) / 8
    seed = torch.arange(n, device=DEVICE)
    exact = (hidden.double() @ weight.double().T).sort(dim=-1, descending=True, stable=True)
    lse = exact.values.logsumexp(-1)
    plain = (hidden @ weight.T).float()
    ours = fused_confidence(hidden, weight, temperature=1.0, seed=seed, top_k=32)
    assert (ours.logsumexp - lse).abs().max() <= 2 * (plain.logsumexp(-1) - lse).abs().max() + 4 * U * lse.max()
    top_error = (plain.topk(32).values - exact.values[:, :32]).abs().max()
    assert (ours.top_values - exact.values[:, :32]).abs().max() <= 2 * top_error
    other = fused_confidence(hidden, weight, temperature=1.0, seed=seed, top_k=32, backend="torch")
    for name in ("token", "argmax"):  # but for near-ties
        assert (getattr(ours, name) == getattr(other, name)).float().mean() >= 1 - 1 / 256
    greedy = fused_confidence(hidden, weight)
    assert torch.equal(greedy.token, greedy.argmax)
    assert (greedy.argmax == other.argmax).float().mean() >= 1 - 1 / 256
