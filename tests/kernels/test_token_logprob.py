"""fused_token_logprob computes what its docstring says, and costs what it promises; its kernels too, interpreted."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from costs import Memory, products
from processes import in_two_processes
from torch import Tensor
from torch.nn import functional as F

from dopsd_kernels import TokenLogprob, fused_token_logprob, reference
from dopsd_kernels.common.head import Head
from dopsd_kernels.common.vocab_group import VocabGroup
from dopsd_kernels.token_logprob import chunked, operators
from dopsd_kernels.token_logprob.contracts import TokenLogprobOptions

# The maximum of a row of NaN, which the interpreter takes with NumPy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

U = 2.0**-24
N, D, VOCAB = 5, 6, 300  # the interpreter's blocks have 128 columns

no_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="Triton's interpreter does not run"
)
BACKENDS = ["torch", pytest.param("triton", marks=no_interpreter)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(vocab: int = VOCAB, dtype: torch.dtype = torch.float32, tokens: int | None = 3) -> dict[str, Any]:
    """Of several tokens a row, the last is the first once more."""
    generator = torch.Generator().manual_seed(5)
    chosen = torch.randint(vocab, (N,) if tokens is None else (N, tokens), generator=generator)
    if tokens is not None and tokens > 1:
        chosen[:, -1] = chosen[:, 0]
    head = {"hidden": (N, D), "weight": (vocab, D), "bias": (vocab,)}
    return {
        "tokens": chosen,
        **{name: randn(*shape, seed=seed, dtype=dtype) for seed, (name, shape) in enumerate(head.items())},
    }


def run(op: Any, tensors: dict[str, Any], **options: Any) -> tuple[TokenLogprob, list[Tensor]]:
    """Return the outputs, and the gradients of the hidden states, weight and bias for random upstream ones."""
    tensors = dict(tensors)
    wanted = [name for name in ("hidden", "weight", "bias") if tensors.get(name) is not None]
    for name in wanted:
        tensors[name] = tensors[name].clone().requires_grad_()
    out = op(**tensors, **options)
    upstream = [randn(*x.shape, seed=7 + i).to(x.dtype) for i, x in enumerate(out)]
    return out, list(torch.autograd.grad(out, [tensors[name] for name in wanted], upstream))


def double(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if x is not None and x.is_floating_point() else x for name, x in tensors.items()}


def check(tensors: dict[str, Any], backend: str, options: dict[str, Any], **how: Any) -> None:
    """Compare with the specification in fp64.

    The error may be twice that of the specification in fp32, which rounds the same logits, and a few roundings of the
    largest entry; gradients in the inputs' dtypes are rounded to them besides.
    """
    ours, plain, exact = (
        (*out, *grads)
        for out, grads in (
            run(fused_token_logprob, tensors, backend=backend, **options, **how),
            run(reference.token_logprob, tensors, **options),
            run(reference.token_logprob, double(tensors), **options),
        )
    )
    # The terms that a gradient is a sum of may cancel: upstream gradients times entries of the weight or hidden states.
    terms = 3 * max(x.abs().max().item() for x in tensors.values() if x is not None and x.is_floating_point())
    for i, (mine, theirs, right) in enumerate(zip(ours, plain, exact, strict=True)):
        assert mine.shape == right.shape
        error, plain_error = ((x - right).abs().sum().item() for x in (mine, theirs))
        largest = right.abs().sum().item() + (terms * right.numel() if i > 1 else 0)
        assert error <= 2 * plain_error + max(8 * U, torch.finfo(mine.dtype).eps) * largest


OPTIONS: list[dict[str, Any]] = [{}, {"temperature": 0.7, "exclude": [0, 1, 299]}]


# ------------------------------------------------------------------------------------------------------------
# What it computes
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_match_the_specification(backend: str, options: dict[str, Any]) -> None:
    for tokens, dtype in ((None, torch.float32), (1, torch.float16), (3, torch.float32), (0, torch.bfloat16)):
        tensors = problem(dtype=dtype, tokens=tokens)
        tensors["tokens"].clamp_(2, 298)
        if tokens is None:
            tensors["bias"] = None
        check(tensors, backend, options)
        floor = 4 * (2 * 304 + 8 * D) + (4 * D if dtype != torch.float32 else 0)
        check(tensors, backend, options, workspace_bytes=floor)  # rows one after the other, the weight in tiles


def test_fp64_is_fp64() -> None:
    for options in OPTIONS:
        tensors = problem(dtype=torch.float64)
        tensors["tokens"].clamp_(2, 298)
        ours, exact = (run(op, tensors, **options) for op in (fused_token_logprob, reference.token_logprob))
        for a, b in zip((*ours[0], *ours[1]), (*exact[0], *exact[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_gradients_match_finite_differences() -> None:
    def outputs(*head: Tensor) -> tuple[Tensor, ...]:
        return fused_token_logprob(head[0], head[1], tokens, bias=head[2], exclude=[4], temperature=0.6)

    tokens = torch.tensor([[0, 3, 0], [2, 2, 2]])
    head = [randn(*shape, dtype=torch.float64, seed=len(shape)) for shape in ((2, 2), (5, 2), (5,))]
    assert torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in head])


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_forms(backend: str) -> None:
    # With the unit matrix for a weight, hidden states are logits and have their gradient.
    z = 3 * randn(2, 7).requires_grad_()
    out = fused_token_logprob(z, torch.eye(7), torch.tensor([2, 6]), backend=backend)
    for row, token in enumerate((2, 6)):
        x = z[row].tolist()
        log_sum = math.log(sum(map(math.exp, x)))
        entropy = sum(math.exp(v - log_sum) * (log_sum - v) for v in x)
        assert out.logprob[row].item() == pytest.approx(x[token] - log_sum, rel=1e-6)
        assert out.entropy[row].item() == pytest.approx(entropy, rel=1e-6)
    p, upstream = z.detach().softmax(-1), torch.tensor([2.0, -3.0])
    (of_entropy,) = torch.autograd.grad(out.entropy.sum(), z, retain_graph=True)
    torch.testing.assert_close(of_entropy, -p * (p.log() + out.entropy[:, None]), rtol=1e-5, atol=1e-6)
    (of_logprob,) = torch.autograd.grad(out.logprob, z, upstream)
    onehot = F.one_hot(torch.tensor([2, 6]), 7)
    torch.testing.assert_close(of_logprob, upstream[:, None] * (onehot - p), rtol=1e-5, atol=1e-6)
    rest = range(30, 50)
    even = fused_token_logprob(torch.zeros(3, 4), torch.ones(50, 4), torch.arange(3), exclude=rest, backend=backend)
    torch.testing.assert_close(even.entropy, torch.full((3,), math.log(30)), rtol=8 * U, atol=0)
    torch.testing.assert_close(even.logprob, -even.entropy, rtol=8 * U, atol=0)


def test_the_same_as_pytorchs_cross_entropy() -> None:
    hidden, weight, tokens = randn(N, D).double(), randn(VOCAB, D, seed=1).double(), torch.tensor([7, 0, 299, 3, 3])
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    ours = -fused_token_logprob(hidden, weight, tokens).logprob
    if hasattr(F, "linear_cross_entropy"):
        theirs = F.linear_cross_entropy(hidden, weight, tokens, reduction="none")
    else:
        theirs = F.cross_entropy(hidden @ weight.T, tokens, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    upstream = randn(N, seed=3).double()
    for a, b in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_1e4(backend: str) -> None:
    # Two columns near the top decide everything; a logsumexp of 1e4 in fp32 has a spacing of 1e-3.
    bias = torch.full((200,), -1e4)
    bias[7], bias[180] = 1e4, 1e4 - 2
    hidden = torch.zeros(1, 4, requires_grad=True)
    weight = torch.zeros(200, 4)
    weight[180, 0] = 1
    out = fused_token_logprob(hidden, weight, torch.tensor([[7, 180, 0]]), bias=bias, backend=backend)
    log_p = torch.tensor([0.0, -2.0]).double().log_softmax(-1)
    torch.testing.assert_close(out.logprob[0, :2].double(), log_p, rtol=8 * U, atol=0)
    assert out.logprob[0, 2].item() == pytest.approx(-2e4 + log_p[0].item(), rel=2 * U)
    entropy = -(log_p.exp() * log_p).sum()
    torch.testing.assert_close(out.entropy[0].double(), entropy, rtol=8 * U, atol=0)
    (grad,) = torch.autograd.grad(out.entropy, hidden)
    expected = -log_p[1].exp() * (log_p[1] + entropy)
    torch.testing.assert_close(grad[0, 0].double(), expected, rtol=32 * U, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_without_probability_is_one_that_is_not_there(backend: str) -> None:
    tensors = problem() | {"tokens": torch.tensor([[5, 200, 5]] * N)}
    without = tensors | {"weight": tensors["weight"][:-3], "bias": tensors["bias"][:-3]}
    impossible = tensors | {"bias": tensors["bias"].index_fill(0, torch.tensor([297, 298, 299]), -torch.inf)}
    expected, grads = run(fused_token_logprob, without, backend=backend)
    for out, others in (
        run(fused_token_logprob, impossible, backend=backend),
        run(fused_token_logprob, tensors, exclude=[298, 297, 299, 299], backend=backend),
    ):
        for a, b in zip((*out, *(x[: VOCAB - 3] for x in others)), (*expected, *grads), strict=True):
            torch.testing.assert_close(a, b, rtol=32 * U, atol=32 * U)
        assert not others[1][-3:].any() and not others[2][-3:].any()
    impossible["tokens"] = torch.full((N,), 298)
    out, grads = run(fused_token_logprob, impossible, backend=backend)
    assert out.logprob.eq(-torch.inf).all() and out.entropy.isfinite().all() and grads[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_row(backend: str) -> None:
    tensors = problem() | {"bias": None}
    tensors["hidden"][1, 2] = torch.nan
    tensors["hidden"][3] = torch.inf  # of both signs, times the weight
    out, grads = run(fused_token_logprob, tensors, backend=backend)
    broken = [False, True, False, True, False]
    assert out.logprob.isnan().all(1).tolist() == out.logprob.isnan().any(1).tolist() == broken
    assert out.entropy.isnan().tolist() == grads[0].isnan().any(1).tolist() == broken
    nothing = fused_token_logprob(randn(2, 4), randn(9, 4), torch.tensor([1, 2]), bias=torch.full((9,), -torch.inf))
    assert nothing.logprob.isnan().all() and nothing.entropy.isnan().all()


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 257])
@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabularies_around_the_blocks(backend: str, vocab: int) -> None:
    tensors = problem(vocab)
    tensors["tokens"][0], tensors["tokens"][1] = 0, vocab - 1
    check(tensors, backend, {"temperature": 1.3})


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_strides(backend: str) -> None:
    tensors = problem(tokens=2)
    whole, grads = run(fused_token_logprob, tensors, backend=backend)
    for leading in ((1, N), (N, 1), (1, N, 1)):
        shaped = tensors | {name: tensors[name].reshape(*leading, -1) for name in ("hidden", "tokens")}
        out, others = run(fused_token_logprob, shaped, backend=backend)
        assert out.logprob.shape == (*leading, 2) and out.entropy.shape == leading
        assert torch.equal(out.logprob.reshape(N, 2), whole.logprob) and torch.equal(others[1], grads[1])
    one = fused_token_logprob(tensors["hidden"][0], tensors["weight"], tensors["tokens"][0, 0], bias=tensors["bias"])
    torch.testing.assert_close(one.logprob, whole.logprob[0, 0])
    assert one.entropy.shape == ()
    strided = {name: torch.stack([x, x], -1)[..., 0] for name, x in tensors.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    for a, b in zip(run(fused_token_logprob, strided, backend=backend)[1], grads, strict=True):
        torch.testing.assert_close(a, b, rtol=64 * U, atol=64 * U)
    empty = tensors | {"hidden": torch.zeros(0, D), "tokens": torch.zeros(0, 2, dtype=torch.int64)}
    out, others = run(fused_token_logprob, empty, backend=backend)
    assert out.logprob.shape == (0, 2) and out.entropy.shape == (0,)
    assert others[0].shape == (0, D) and not others[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_and_autocast_change_nothing(backend: str) -> None:
    tensors = problem()
    tensors["hidden"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = fused_token_logprob(**tensors, backend=backend)
        total = out.logprob.sum() - out.entropy.sum()
        first, second = (torch.autograd.grad(total, tensors["hidden"], retain_graph=True)[0] for _ in range(2))
    plain = fused_token_logprob(**tensors, backend=backend)
    assert torch.equal(plain.logprob, out.logprob) and torch.equal(plain.entropy, out.entropy)
    (outside,) = torch.autograd.grad(plain.logprob.sum() - plain.entropy.sum(), tensors["hidden"])
    assert torch.equal(first, second) and torch.equal(first, outside)


def test_bad_tokens_where_nothing_waits_for_them() -> None:
    # As on a GPU: NaN, not another token's log-probability, and no access out of bounds.
    tokens = torch.tensor([[3, -1], [VOCAB, 3], [1 << 40, 7]])
    head = Head(randn(3, D), randn(VOCAB, D, seed=1), None)
    group = VocabGroup.of(None, VOCAB, tokens.device)
    logprob, *_ = chunked.token_logprob(head, tokens, TokenLogprobOptions([7], 1.0), 1 << 20, group, "torch")
    assert logprob.isnan().tolist() == [[False, True], [True, False], [True, False]] and logprob[2, 1] == -torch.inf


# ------------------------------------------------------------------------------------------------------------
# 16-bit operands: on a CPU they are emulated, so that the gradient lies over the logits as it does on a GPU
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "dtype"), [*[(b, torch.float16) for b in ("torch", "triton")], ("torch", torch.bfloat16)]
)
def test_the_gradient_takes_the_place_of_the_logits(sixteen_bits: None, backend: str, dtype: torch.dtype) -> None:
    # Every 16-bit number of the products' operands but the gradient is exact in fp64: its rounding is the error.
    if backend == "triton":
        pytest.importorskip("triton")
    tensors = problem(dtype=dtype)
    _, exact = run(reference.token_logprob, double(tensors))
    for workspace in (1 << 13, 1 << 26):
        _, grads = run(fused_token_logprob, tensors, backend=backend, workspace_bytes=workspace)
        # A row's sum of |dz| is at most twice that of its upstream gradients, and each entry has one rounding.
        others = (tensors["weight"], tensors["hidden"], torch.ones(1))
        for ours, right, other in zip(grads, exact, others, strict=True):
            atol = torch.finfo(dtype).eps * (right.abs().max().item() + 2 * 3 * 4 * other.abs().max().item())
            torch.testing.assert_close(ours.double(), right, rtol=0, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_keeps_small_gradients_and_factors(
    sixteen_bits: None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One token is nearly sure: of the others' gradient, 1e-7 each, fp16 has two steps, and of 1e-9 times it none.
    tensors = problem(dtype=torch.float16, tokens=1)
    tensors["tokens"][:], tensors["bias"] = 3, torch.zeros(VOCAB).index_fill(0, torch.tensor([3]), 16.0)
    tensors["weight"] *= 0.1
    kept: list[Tensor] = []
    compute = operators._token_logprob_backward

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        kept.extend(compute(*arguments))  # autograd rounds them
        return tuple(kept)

    monkeypatch.setattr(operators, "_token_logprob_backward", backward)
    scale = torch.tensor([1.0, 2.0, 0.0, 3.0, 1e-3])[:, None] * 1e-9
    inputs = [tensors[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    fused_token_logprob(**tensors, backend=backend).logprob.backward(scale)
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = reference.token_logprob(inputs[0], inputs[1], tensors["tokens"], bias=inputs[2]).logprob
    for ours, right in zip(kept, torch.autograd.grad(exact, inputs, scale.double()), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=0, atol=0.01 * right.abs().max().item())


# ------------------------------------------------------------------------------------------------------------
# What it costs
# ------------------------------------------------------------------------------------------------------------


def test_number_of_products() -> None:
    tensors = problem(tokens=5) | {"bias": None}
    hidden, weight, tokens = (tensors[name] for name in ("hidden", "weight", "tokens"))
    row = 2 * D * VOCAB
    assert products(lambda: fused_token_logprob(hidden, weight, tokens)) == N * row
    hidden.requires_grad_()
    with torch.no_grad():
        assert products(lambda: fused_token_logprob(hidden, weight, tokens)) == N * row
    out = fused_token_logprob(hidden, weight, tokens)
    backward: dict[str, Any] = {"inputs": [hidden], "retain_graph": True}
    assert products(lambda: out.logprob.sum().backward(**backward)) == 2 * N * row
    assert products(lambda: out.entropy[1:].sum().backward(**backward)) == 2 * (N - 1) * row
    assert products(lambda: (out.logprob[0, 3] + out.entropy[2]).backward(**backward)) == 2 * 2 * row
    assert products(lambda: (0 * out.logprob).sum().backward(**backward)) == 0
    weight.requires_grad_()
    out = fused_token_logprob(hidden, weight, tokens)
    assert products(lambda: out.logprob[:3].sum().backward()) == 3 * 3 * row


def test_rows_without_an_upstream_gradient_may_hold_anything() -> None:
    tensors = problem()
    tensors["hidden"][2] = torch.nan
    tensors["hidden"].requires_grad_()
    out = fused_token_logprob(**tensors)
    kept = [0, 1, 3, 4]
    (out.logprob[kept].sum() + out.entropy[kept].sum()).backward()
    assert tensors["hidden"].grad[kept].isfinite().all() and not tensors["hidden"].grad[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("trained_head", [False, True])
def test_the_workspace_is_kept(trained_head: bool, dtype: torch.dtype) -> None:
    rows, width, vocab, m = 48, 8, 1000, 2
    item = 8 if dtype == torch.float64 else 4
    workspace = item * 12_500
    hidden, weight = randn(rows, width, dtype=dtype).requires_grad_(), randn(vocab, width, seed=1, dtype=dtype)
    weight.requires_grad_(trained_head)
    tokens = torch.randint(vocab, (rows, m), generator=torch.Generator().manual_seed(0))
    assert rows * vocab * item > 3 * workspace  # a tensor of all logits would show
    with Memory(hidden, weight, tokens) as mode:
        out = fused_token_logprob(hidden, weight, tokens, exclude=[], temperature=0.7, workspace_bytes=workspace)
        (out.logprob.sum() + out.entropy.sum()).backward()
    assert workspace / 2 < mode.largest <= workspace
    # Beside it: the gradients and their rounding; vectors of the rows and their tokens.
    gradients = rows * width + (vocab * width if trained_head else 0)
    assert mode.most <= workspace + item * (2 * gradients + (20 + 20 * m) * rows)


@no_interpreter
def test_each_pass_is_one_launch_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from dopsd_kernels.token_logprob import kernels

    launched = []
    for name in ("_statistics", "_logit_gradient"):
        kernel = getattr(kernels, name)

        class Counted:
            def __getitem__(self, grid: Any, kernel: Any = kernel, name: str = name) -> Any:
                launched.append((name, *grid))
                return kernel[grid]

        monkeypatch.setattr(kernels, name, Counted())
    tensors = problem() | {"bias": None}
    run(fused_token_logprob, tensors, backend="triton", workspace_bytes=3 * 4 * (304 + 8 * D))
    assert launched == [("_statistics", 3), ("_statistics", 2), ("_logit_gradient", 3), ("_logit_gradient", 2)]


# ------------------------------------------------------------------------------------------------------------
# A sharded vocabulary, and torch.compile
# ------------------------------------------------------------------------------------------------------------

SHARDS = (slice(0, 200), slice(200, VOCAB))


def _sharded(rank: int) -> None:
    shard = SHARDS[rank]
    for backend in ("torch", "triton"):
        if backend == "triton" and (torch.cuda.is_available() or not importlib.util.find_spec("triton")):
            continue
        dtype = torch.float64 if backend == "torch" else torch.float32
        rtol = 1e-11 if backend == "torch" else 1e-5
        tensors = problem(dtype=dtype) | {"tokens": torch.tensor([[3, 250, 3], [199, 200, 0], *[[299, 1, 7]] * 3])}
        for options in ({}, {"exclude": [2, 298], "temperature": 0.7}):
            whole, grads = run(fused_token_logprob, tensors, backend=backend, **options)
            part = tensors | {"weight": tensors["weight"][shard], "bias": tensors["bias"][shard]}
            part |= {"vocab_group": dist.group.WORLD, "workspace_bytes": 3 * 8 * (400 + 8 * D)}  # several chunks
            out, parts = run(fused_token_logprob, part, backend=backend, **options)
            for a, b in zip((*out, *parts), (*whole, grads[0], grads[1][shard], grads[2][shard]), strict=True):
                torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
        # No finite logit on one process, a NaN on one: known to both.
        bias = torch.zeros(VOCAB, dtype=dtype)
        bias[:200] = -torch.inf
        part = tensors | {"weight": tensors["weight"][shard], "vocab_group": dist.group.WORLD, "backend": backend}
        out = fused_token_logprob(**part | {"bias": bias[shard]})
        whole = fused_token_logprob(**tensors | {"bias": bias})
        torch.testing.assert_close(out.logprob, whole.logprob, rtol=rtol, atol=rtol)
        torch.testing.assert_close(out.entropy, whole.entropy, rtol=rtol, atol=rtol)
        bias[250] = torch.nan
        assert fused_token_logprob(**part | {"bias": bias[shard]}).logprob.isnan().all()
        part["bias"] = None
        for bad in ({"exclude": [VOCAB]}, {"exclude": range(VOCAB)}, {"tokens": tensors["tokens"] + 1}):
            with pytest.raises(ValueError, match=next(iter(bad))):
                fused_token_logprob(**part | bad)


def test_a_sharded_vocabulary_gives_the_whole_ones_outputs_and_gradients(tmp_path: Path) -> None:
    in_two_processes(_sharded, tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_sees_one_graph(backend: str) -> None:
    tokens = torch.tensor([3, 250, 3, 1, 0])

    def total(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
        out = fused_token_logprob(2 * hidden, weight, tokens, exclude=[7], temperature=temperature, backend=backend)
        return out.logprob.exp().sum() + out.entropy.sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    weight = randn(VOCAB, D, seed=2)
    for temperature in (1.0, 0.7, 1.3):
        results = []
        for function in (total, compiled):
            hidden = randn(N, D).requires_grad_()
            value = function(hidden, weight, temperature)
            results.append((value, *torch.autograd.grad(value, hidden)))
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=8 * U, atol=8 * U)


def test_opcheck() -> None:
    tensors = problem()
    head = (tensors["hidden"], tensors["weight"], tensors["bias"], tensors["tokens"])
    settings = ([7], 0.7, 1 << 20, None, True, "torch")
    torch.library.opcheck(torch.ops.dopsd.token_logprob.default, (*head, *settings))
    _, entropy, normalizers = torch.ops.dopsd.token_logprob(*head, *settings)
    for of_logprob, of_entropy, needs in (
        (randn(N, 3, seed=7), randn(N, seed=8), [True, True, True]),
        (None, randn(N, seed=8), [True, False, False]),
    ):
        arguments = (*head, entropy, normalizers, of_logprob, of_entropy, needs, *settings)
        torch.library.opcheck(torch.ops.dopsd.token_logprob_backward.default, arguments)
