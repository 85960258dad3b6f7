"""The Triton passes of fused_step_kl, run by Triton's interpreter, against the specification in fp64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dopsd_kernels import StepKLOutput, fused_step_kl, reference, step_kl_from_logits
from dopsd_kernels.common import products
from dopsd_kernels.common.vocab_group import VocabGroup
from dopsd_kernels.step_kl import chunked
from dopsd_kernels.step_kl.contracts import StepKLOptions
from dopsd_kernels.step_kl.divergences import DIVERGENCES

triton = pytest.importorskip("triton")
from dopsd_kernels.common import configs  # noqa: E402
from dopsd_kernels.step_kl import kernels  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, `pytest -m gpu` runs the compiled kernels"),
    # Where a logit is -inf on both sides their difference is NaN, and what is made of it is selected away.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

U = 2.0**-24
N, D, VOCAB = 4, 6, 300  # blocks of 256 columns, in 2 splits


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(vocab: int = VOCAB, teacher_width: int | None = None) -> dict[str, Tensor | None]:
    return {
        "student_hidden": 0.6 * randn(N, D, seed=0),
        "teacher_hidden": 0.6 * randn(N, teacher_width or D, seed=1),
        "weight": randn(vocab, D, seed=2),
        "teacher_weight": randn(vocab, teacher_width, seed=3) if teacher_width else None,
        "bias": randn(vocab, seed=4),
        "teacher_bias": randn(vocab, seed=5) if teacher_width else None,
        "row_weight": torch.tensor([1.0, 0.0, 2.0, 0.5]),
    }


def run(backend: str, tensors: dict[str, Any], **options: Any) -> tuple[StepKLOutput, list[Tensor]]:
    """Return the outputs and the gradients of the student's hidden states, weight and bias."""
    tensors = dict(tensors)
    wanted = [name for name in ("student_hidden", "weight", "bias") if tensors.get(name) is not None]
    for name in wanted:
        tensors[name] = tensors[name].clone().requires_grad_()
    if backend == "reference":
        reduction = options.pop("reduction", "mean")
        out = reference.step_kl(**tensors, reduction=reduction, options=StepKLOptions(**options))
    else:
        out = fused_step_kl(**tensors, backend=backend, **options)
    upstream = randn(*out.loss.shape, seed=9).to(out.loss.dtype)
    return out, list(torch.autograd.grad(out.loss, [tensors[name] for name in wanted], upstream))


def double(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: None if x is None else x.double() for name, x in tensors.items()}


def check(tensors: dict[str, Any], **options: Any) -> tuple[StepKLOutput, list[Tensor]]:
    """Compare the kernels with the specification in fp64; return their results.

    Their error may be twice that of the specification in fp32, which rounds the same logits, and a few roundings of
    the largest terms of a row's sums.
    """
    results = [run(backend, x, **options) for backend, x in (("triton", tensors), ("reference", tensors))]
    exact = run("reference", double(tensors), **options)
    (out, grads), _ = results
    for i, (name, theirs) in enumerate(zip(out._fields, exact[0], strict=True)):
        if name == "row_clip_fraction":  # at most one entry within rounding of the clip
            torch.testing.assert_close(out[i].double(), theirs, rtol=0, atol=1.5 / VOCAB)
        else:
            compare(out[i], results[1][0][i], theirs)
    for ours, plain, theirs in zip(grads, results[1][1], exact[1], strict=True):
        compare(ours, plain, theirs, exact[0].row_kl.max().item())
    return out, grads


def compare(ours: Tensor, plain: Tensor, exact: Tensor, divergence: float = 0.0) -> None:
    """A gradient is s (log(s / t) - divergence), in which the terms of a large divergence cancel."""
    error, plain_error = ((x - exact).abs().max().item() for x in (ours, plain))
    assert error <= 2 * plain_error + 8 * U * max(exact.abs().max().item(), divergence)


SUPPORTS = {
    "all": {},
    "renormalized": {"top_k": 5},
    "bucket": {"top_k": 9, "tail": "bucket"},
}
CLIPS = {
    "unclipped": {},
    "plain": {"clip": 0.02},
    "nonnegative": {"clip": 0.02, "clip_form": "nonnegative"},
}


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_clip_and_support(divergence: str, clip: str, support: str) -> None:
    # What is independent of them takes turns.
    turn = list(SUPPORTS).index(support) + list(CLIPS).index(clip)
    tensors = problem(teacher_width=9 if turn % 2 else None)
    if turn % 3 == 0:
        tensors |= {"bias": None, "teacher_bias": None}
    options = {"temperature": 1.0 if turn % 3 else 0.7, "reduction": ("mean", "sum", "none")[turn % 3], "beta": 0.3}
    out, _ = check(tensors, divergence=divergence, **options, **CLIPS[clip], **SUPPORTS[support])
    assert out.row_loss[1] == out.row_kl[1] == 0  # of weight 0
    assert clip == "unclipped" or out.row_clip_fraction.any()


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 511, 513])
def test_vocabularies_around_the_blocks(vocab: int) -> None:
    for support in ({}, {"top_k": 1}, {"top_k": min(vocab, 9), "tail": "bucket"}):
        tensors = problem(vocab)
        out, grads = run("triton", tensors, clip=0.05, **support)
        exact, exact_grads = run("torch", double(tensors), clip=0.05, **support)
        for ours, theirs in zip((*out, *grads), (*exact, *exact_grads), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_sides_have_no_loss_and_no_gradient(divergence: str) -> None:
    tensors = problem() | {"teacher_hidden": problem()["student_hidden"]}
    out, grads = run("triton", tensors, divergence=divergence, clip=0.05, clip_form="nonnegative")
    # s and t are the same bits, but log m of jsd and the sum of s are rounded.
    assert out.row_loss.abs().max() <= 4 * U and all(g.abs().max() <= 64 * U for g in grads)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nearly_equal_sides_keep_their_gradient(divergence: str) -> None:
    tensors = problem()
    tensors["teacher_hidden"] = tensors["student_hidden"] + 1e-3 * randn(N, D, seed=1)
    _, grads = run("triton", tensors, divergence=divergence)
    _, plain = run("torch", tensors, divergence=divergence)
    _, exact = run("reference", double(tensors), divergence=divergence)
    for ours, eager, theirs in zip(grads, plain, exact, strict=True):
        compare(ours, eager, theirs)


def test_logits_of_1e4() -> None:
    # Two columns near the top decide everything; a logsumexp of 1e4 in fp32 has a spacing of 1e-3.
    z_s, z_t = torch.full((2, VOCAB), -1e4), torch.full((2, VOCAB), -1e4)
    z_s[:, 7], z_s[:, 280] = 1e4, 1e4 - 2
    z_t[:, 7], z_t[:, 280] = 1e4 - 1, 1e4
    z_t[1] += 8192
    z_s.requires_grad_()
    out = step_kl_from_logits(z_s, z_t, backend="triton")
    s = torch.tensor([0.0, -2.0]).double().softmax(-1)
    t = torch.tensor([-1.0, 0.0]).double().softmax(-1)
    expected = (s * (s / t).log()).sum()
    torch.testing.assert_close(out.row_kl.double(), expected.expand(2), rtol=8 * U, atol=0)
    (grad,) = torch.autograd.grad(out.loss, z_s)
    gradient = 0.5 * s * ((s / t).log() - expected)
    torch.testing.assert_close(grad[:, [7, 280]].double(), gradient.expand(2, 2), rtol=32 * U, atol=0)
    assert grad.abs().sum(1).allclose(grad[:, [7, 280]].abs().sum(1))


def test_impossible_entries() -> None:
    tensors = problem()
    for name in ("bias", "teacher_bias"):
        tensors[name] = torch.zeros(VOCAB)
        tensors[name][[0, 17, 299]] = -math.inf
    tensors["teacher_bias"][5] = 0.5
    for divergence in DIVERGENCES:
        check(tensors, divergence=divergence, clip=0.02, top_k=VOCAB - 3)
        check(tensors, divergence=divergence)
    # Possible for the student alone: infinite, and with a clip clipped.
    tensors["teacher_bias"][40] = -math.inf
    assert run("triton", tensors)[0].row_loss[[0, 2, 3]].isposinf().all()
    out, grads = run("triton", tensors, clip=0.02)
    exact, exact_grads = run("reference", double(tensors), clip=0.02)
    torch.testing.assert_close(out.row_loss.double(), exact.row_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0].double(), exact_grads[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("support", [{}, {"top_k": 4}, {"top_k": 4, "tail": "bucket"}])
def test_a_nan_stays_in_its_row(support: dict[str, Any]) -> None:
    tensors = problem() | {"row_weight": None}
    tensors["student_hidden"][2] = math.nan
    out, grads = run("triton", tensors, clip=0.05, reduction="none", **support)
    assert out.row_loss.isnan().tolist() == out.row_kl.isnan().tolist() == [False, False, True, False]
    assert grads[0].isnan().any(1).tolist() == [False, False, True, False]
    tensors["teacher_hidden"][0] = math.nan
    assert run("triton", tensors)[0].row_loss.isnan().tolist() == [True, False, True, False]


@pytest.mark.parametrize(("vocab", "top_k"), [(VOCAB, 100), (1100, 1025), (1100, 8)])
def test_any_number_of_entries_beside_the_bucket(vocab: int, top_k: int) -> None:
    check(problem(vocab), top_k=top_k, tail="bucket", clip=0.02, temperature=0.7)


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_ties_of_the_teacher_go_to_the_lowest_ids(tail: str) -> None:
    tensors = problem() | {"bias": None}
    tensors["teacher_hidden"] = torch.zeros(N, D)  # every logit is 0, some -0
    out, grads = run("triton", tensors, top_k=3, tail=tail)
    exact, exact_grads = run("reference", double(tensors), top_k=3, tail=tail)
    torch.testing.assert_close(out.row_kl.double(), exact.row_kl, rtol=1e-5, atol=16 * U)
    torch.testing.assert_close(grads[1].double(), exact_grads[1], rtol=1e-4, atol=1e-6)


def test_chunks_blocks_and_order_change_nothing_beyond_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = problem()
    whole, grads = run("triton", tensors, clip=0.02)
    floor = 4 * (2 * VOCAB + 5 * D) + 4 * VOCAB
    for workspace in (floor, 3 * floor):
        parts, part_grads = run("triton", tensors, clip=0.02, workspace_bytes=workspace)
        for a, b in zip((*whole, *grads), (*parts, *part_grads), strict=True):
            torch.testing.assert_close(a, b, rtol=8 * U, atol=8 * U)
    order = torch.tensor([2, 0, 3, 1])
    for name in ("student_hidden", "teacher_hidden", "row_weight"):
        tensors[name] = tensors[name][order]
    permuted, _ = run("triton", tensors, clip=0.02)
    assert torch.equal(permuted.row_loss, whole.row_loss[order])
    chosen = kernels.choose
    monkeypatch.setattr(kernels, "choose", lambda *a: chosen(*a) | {"BLOCK": 64, "SPLITS": 4})
    for a, b in zip(permuted, run("triton", tensors, clip=0.02)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=8 * U, atol=8 * U)


def test_no_rows_and_strided_inputs() -> None:
    tensors = problem() | {"row_weight": None}
    empty = tensors | {"student_hidden": torch.zeros(0, D), "teacher_hidden": torch.zeros(0, D)}
    out, grads = run("triton", empty)
    assert out.loss == 0 and grads[0].shape == (0, D) and not grads[1].any()
    strided = {name: x.T.contiguous().T if x is not None and x.dim() == 2 else x for name, x in tensors.items()}
    assert not strided["weight"].is_contiguous()
    for a, b in zip(run("triton", strided)[0], run("triton", tensors)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=64 * U, atol=64 * U)


def test_a_second_backward_finds_everything_as_it_was() -> None:
    for reduction in ("mean", "none"):
        hidden, weight = randn(N, D).requires_grad_(), randn(VOCAB, D, seed=2)
        loss = fused_step_kl(hidden, randn(N, D, seed=1), weight, backend="triton", reduction=reduction).loss.sum()
        first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("support", [{}, {"top_k": 4}, {"top_k": 4, "tail": "bucket"}])
def test_from_logits(dtype: torch.dtype, support: dict[str, Any]) -> None:
    z_s, z_t = (3 * randn(2, 3, VOCAB, seed=seed).to(dtype) for seed in (0, 1))
    row_weight = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 1.0]])
    for reduction in ("mean", "sum", "none"):
        results = []
        for backend, a, b in (("triton", z_s, z_t), ("torch", z_s.double(), z_t.double())):
            a = a.clone().requires_grad_()
            out = step_kl_from_logits(
                a, b, row_weight=row_weight, clip=0.02, temperature=0.7, reduction=reduction, backend=backend, **support
            )
            results.append((*out, torch.autograd.grad(out.loss.sum() * 1.7, a)[0]))
        for ours, exact in zip(*results, strict=True):
            rounding = torch.finfo(ours.dtype).eps
            torch.testing.assert_close(ours.double(), exact, rtol=8 * rounding + 1e-5, atol=rounding * 1e-2 + 1e-6)


def test_from_logits_reads_columns_that_are_not_contiguous() -> None:
    z_s, z_t = (randn(VOCAB, N, seed=seed).T for seed in (0, 1))
    ours = step_kl_from_logits(z_s, z_t, backend="triton")
    for a, b in zip(ours, step_kl_from_logits(z_s, z_t, backend="torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=64 * U, atol=64 * U)


# ------------------------------------------------------------------------------------------------------------
# 16-bit operands: on a CPU they are emulated, so that the memory of logits is shared as it is on a GPU
# ------------------------------------------------------------------------------------------------------------


def test_products_of_16_bits_are_asked_for_in_fp32() -> None:
    # No CPU has them, but the meta device knows what such a call returns.
    for dtype in (torch.bfloat16, torch.float16):
        a, b = torch.empty(4, 8, dtype=dtype, device="meta"), torch.empty(5, 8, dtype=dtype, device="meta").T
        out = torch.empty(4, 5, device="meta")
        assert products.matmul(a, b, out=out) is out
        assert products.matmul(a, b).dtype == torch.float32
        assert products.matmul(a[None], b[None]).dtype == torch.float32
        products.add_matmul(out, a, b)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", torch.float16), ("torch", torch.float16), ("torch", torch.bfloat16)]
)
@pytest.mark.parametrize("rows", [1, 2, 7, 40])
def test_the_gradient_takes_the_place_of_logits_already_used(sixteen_bits, backend, dtype, rows) -> None:
    # Every 16-bit number of the products' operands but the gradient is exact in fp64: its rounding is the error.
    vocab = 41
    tensors: dict[str, Any] = {
        "student_hidden": randn(rows, D, dtype=dtype),
        "teacher_hidden": randn(rows, D, seed=1, dtype=dtype),
        "weight": randn(vocab, D, seed=2, dtype=dtype),
    }
    for workspace in (1 << 14, 1 << 26):
        out, grads = run(backend, tensors, clip=0.05, workspace_bytes=workspace)
        exact, exact_grads = run("reference", double(tensors), clip=0.05)
        torch.testing.assert_close(out.row_loss.double(), exact.row_loss, rtol=1e-4, atol=1e-5)
        eps = torch.finfo(dtype).eps
        for ours, theirs in zip(grads, exact_grads, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=4 * eps, atol=4 * eps * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_renormalized_top_k_of_16_bits(sixteen_bits, dtype) -> None:
    # Both sides are nearly sure of one entry: all gradients with respect to logits are below fp16's normal numbers.
    bias = torch.zeros(1000)
    bias[3] = 18.0
    tensors: dict[str, Any] = {
        "student_hidden": 0.2 * randn(5, D, dtype=dtype),
        "teacher_hidden": 0.2 * randn(5, D, seed=1),
        "weight": randn(1000, D, seed=2, dtype=dtype),
        "bias": bias,
        "teacher_bias": bias,
        "row_weight": torch.full((5,), 4096.0),  # the factor comes later
    }
    tensors["teacher_weight"] = tensors["weight"].float()
    _, exact = run("reference", double(tensors), reduction="sum", top_k=7)
    _, grads = run("auto", tensors, reduction="sum", top_k=7)
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(grads, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=4 * eps * theirs.abs().max().item())


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_fp16_keeps_gradients_below_its_smallest_number(sixteen_bits, backend) -> None:
    # Student and teacher are so close that nearly all entries of the logits' gradient are below 6e-8.
    hidden, weight = 0.05 * randn(2, D), randn(30000, D, seed=2, dtype=torch.float16)
    tensors: dict[str, Any] = {"student_hidden": hidden.half(), "weight": weight}
    tensors["teacher_hidden"] = (hidden + 1e-4).half()
    _, exact = run("reference", double(tensors), reduction="sum")
    largest = exact[0].abs().max().item()
    assert 1e-6 < largest < 1e-3
    _, grads = run(backend, tensors, reduction="sum")
    torch.testing.assert_close(grads[0].double(), exact[0], rtol=0.02, atol=2.0**-24 + 0.02 * largest)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_tiny_factors_do_not_underflow_in_16_bits(sixteen_bits, backend) -> None:
    # 1e-9 times a hidden state is 0 in fp16; of several chunks, that of one such row counts beside another's.
    hidden, weight = randn(6, D, dtype=torch.float16), randn(40, D, seed=2, dtype=torch.float16)
    student, teacher = (chunked.Head(x, weight, None) for x in (hidden, randn(6, D, seed=1).half()))
    scale = 1e-9 * torch.tensor([1.0, 2.0, 3.0, 1.0, 0.5, 1.0])
    results = []
    for factor, workspace in ((scale, 3000), (scale * 1e9, 1 << 20)):
        results.append(
            chunked.step_kl(
                student, teacher, None, factor, (True, True, True), StepKLOptions(), workspace,
                VocabGroup.of(None, 40, hidden.device), backend,
            )[1]
        )  # fmt: skip
    for small, large in zip(*results, strict=True):
        atol = 4 * torch.finfo(torch.float16).eps * large.abs().max().item()
        torch.testing.assert_close(small * 1e9, large, rtol=0, atol=atol)


@pytest.mark.parametrize("paired", [False, True])
def test_blocks_never_write_over_logits_they_have_not_read(paired: bool) -> None:
    for head_rows in range(1, 9):
        for wanted in range(1, 40):
            blocks = chunked._blocks(100, chunked.Plan(100, wanted, head_rows, 1, paired))
            assert [i for block in blocks for i in range(100)[block]] == list(range(100))
            for block in blocks:  # bytes per column
                assert 2 * block.stop <= 2 * head_rows + (8 if paired else 4) * block.start
            assert max(block.stop - block.start for block in blocks) == wanted or head_rows < wanted


@pytest.mark.parametrize(("rows", "launches"), [(256, 12), (2048, 96)])
def test_launches_of_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch, rows: int, launches: int) -> None:
    # On an H200, of which nothing runs here.
    (config,) = (entry["config"] for entry in configs.read()["step_kl_rows"] if "sm_90" in entry["arch"])
    monkeypatch.setattr(kernels, "choose", lambda *_: config)
    with FakeTensorMode():
        hidden = torch.empty(rows, 4096, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(126464, 4096, dtype=torch.bfloat16, device="cuda")
    head, options = chunked.Head(hidden, weight, None), StepKLOptions()
    plan = chunked.plan_workspace(head, head, (True, False, False), options, 256 << 20, "triton", 126464)
    size = chunked.chunk_rows(rows, plan, hidden)
    assert size == 256  # what the products are best at, and a chunk less is a reading of the weight less
    chunks = products.tiles(rows, size)
    assert 3 * sum(len(chunked._blocks(c.stop - c.start, plan)) for c in chunks) == launches


def test_each_block_is_three_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    for name in ("_normalizers", "_row_sums", "_logit_gradient"):
        kernel = getattr(kernels, name)

        class Counted:
            def __getitem__(self, grid: Any, kernel: Any = kernel, name: str = name) -> Any:
                launched.append((name, grid[0]))
                return kernel[grid]

        monkeypatch.setattr(kernels, name, Counted())
    monkeypatch.setattr(kernels, "block_rows", lambda *_: 3)
    run("triton", problem() | {"row_weight": None})
    assert [rows for name, rows in launched if name == "_logit_gradient"] == [3, 1] and len(launched) == 6


@pytest.mark.parametrize("vocab", [297, 304])
def test_rows_begin_at_multiples_of_16_bytes(sixteen_bits, monkeypatch: pytest.MonkeyPatch, vocab: int) -> None:
    seen, passes = [], kernels.rows

    def rows(z_s: Tensor, z_t: Tensor, *others: Any) -> Tensor:
        seen.extend([z_s, z_t, others[-2]])
        return passes(z_s, z_t, *others)

    monkeypatch.setattr(kernels, "rows", rows)
    for dtype in (torch.float16, torch.float32):
        hidden, weight = randn(9, D, dtype=dtype).requires_grad_(), randn(vocab, D, seed=2, dtype=dtype)
        fused_step_kl(hidden, hidden.detach(), weight, backend="triton").loss.backward()
    assert len(seen) == 6
    for x in seen:
        assert x.shape == (9, vocab) and x.stride(1) == 1
        assert x.stride(0) * x.element_size() % 16 == 0 and x.storage_offset() * x.element_size() % 16 == 0


# ------------------------------------------------------------------------------------------------------------
# The operators
# ------------------------------------------------------------------------------------------------------------


def test_fp64_is_refused() -> None:
    hidden, weight = randn(2, 3).double(), randn(11, 3, seed=1).double()
    with pytest.raises(ValueError, match=r"but not torch\.float64: use"):
        fused_step_kl(hidden, hidden, weight, backend="triton")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_compile_sees_one_graph(backend: str, reduction: str) -> None:
    row_weight, teacher = torch.tensor([1.0, 0.0, 2.0, 0.5]), randn(N, D, seed=1)

    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        out = fused_step_kl(2 * hidden, teacher, weight, row_weight=row_weight, reduction=reduction, backend=backend)
        from_logits = step_kl_from_logits(hidden @ weight.T, weight[:N] @ weight.T.detach(), backend=backend)
        return out.loss.sum() + from_logits.loss, out.row_kl

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        hidden, weight = randn(N, D).requires_grad_(), randn(VOCAB, D, seed=2)
        total, row_kl = function(hidden, weight)
        results.append((total, row_kl, torch.autograd.grad(total, hidden)[0]))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=8 * U, atol=8 * U)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_opcheck(backend: str) -> None:
    hidden, teacher, weight, bias = randn(N, D), randn(N, D, seed=1), randn(VOCAB, D, seed=2), randn(VOCAB, seed=4)
    divergence = ("reverse_kl", 0.5, 0.02, "plain", 4, "bucket", 1.0)
    row_weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    settings = (1 << 20, None, True, backend)
    for row_weights, upstream, needs in (
        (row_weight, None, [True, True, True]),
        (None, randn(N, seed=7), [True, False, False]),
        (None, None, [False, False, False]),
    ):
        arguments = (hidden, weight, bias, teacher, None, bias, row_weights, upstream, needs)
        torch.library.opcheck(torch.ops.dopsd.step_kl.default, (*arguments, *divergence, True, *settings))
        logits = (hidden @ weight.T, teacher @ weight.T, row_weights, upstream, needs[0])
        torch.library.opcheck(torch.ops.dopsd.step_kl_from_logits.default, (*logits, *divergence, True, *settings))
        if backend == "triton":
            break  # the interpreter is slow, and which tensors are there is the same to it
