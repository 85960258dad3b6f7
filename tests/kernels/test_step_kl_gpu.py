"""fused_step_kl and fused_confidence on a GPU: what the interpreter of test_triton_*.py cannot show.

Rounding of the tensor cores' operands, offsets beyond 32 bits, memory, waiting for the GPU, accesses out of bounds.
"""

import itertools
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dopsd.sampler import Decoding, decode
from dopsd_kernels import StepKLOutput, fused_confidence, fused_step_kl, reference, step_kl_from_logits
from dopsd_kernels.step_kl.contracts import StepKLOptions
from dopsd_kernels.step_kl.divergences import DIVERGENCES

pytest.importorskip("triton")
from dopsd_kernels.step_kl import kernels

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU"),
]

U = 2.0**-24
N, D, VOCABS = 300, 512, (32000, 32003)  # the second is no multiple of anything
LARGE_VOCAB, MANY_ROWS, NARROW = 126464, 17100, 64  # rows of logits with more than 2^31 entries
GIB = 1 << 30
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype)


def problem(
    dtype: torch.dtype, vocab: int = VOCABS[0], rows: int = N, width: int = D, size: float = 3.0
) -> dict[str, Any]:
    """Logits of standard deviation `size`; the teacher's are near the student's."""
    student = size * randn(rows, width)
    return {
        "student_hidden": student.to(dtype),
        "teacher_hidden": (student + 0.3 * size * randn(rows, width, seed=1)).to(dtype),
        "weight": (randn(vocab, width, seed=2) / math.sqrt(width)).to(dtype),
    }


def double(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if isinstance(x, Tensor) else x for name, x in tensors.items()}


def differentiate(
    op: Callable[..., StepKLOutput], tensors: dict[str, Any], trained: tuple[str, ...] = ("student_hidden",)
) -> tuple[StepKLOutput, list[Tensor]]:
    """Return an op's outputs and the gradients of `trained`; for reduction "none" of a weighted sum of the losses."""
    tensors = {**tensors, **{name: tensors[name].detach().clone().requires_grad_() for name in trained}}
    out = op(**tensors)
    upstream = randn(*out.loss.shape, seed=9).to(out.loss.dtype) if out.loss.dim() else None
    return out, list(torch.autograd.grad(out.loss, [tensors[name] for name in trained], upstream))


def specified(**arguments: Any) -> StepKLOutput:
    names = ("divergence", "beta", "clip", "clip_form", "top_k", "tail", "temperature")
    options = StepKLOptions(**{name: arguments.pop(name) for name in names if name in arguments})
    arguments.pop("workspace_bytes", None)
    return reference.step_kl(**arguments, options=options)


def plain(**arguments: Any) -> StepKLOutput:
    """Compute the loss as one would write it: logits in their operands' dtype, and all else in fp32."""

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, _dtype: torch.dtype) -> Tensor:
        z = (hidden @ weight.T).float()
        return z if bias is None else z + bias.float()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_logits", logits)
        return specified(**arguments)


def check(tensors: dict[str, Any], trained: tuple[str, ...] = ("student_hidden",), **options: Any) -> None:
    """Require errors of at most twice the plain computation's, and the rounding of what is returned.

    The latter is, of sums over a row, some ten roundings of their terms: of exp(x) for x down to -20, of logarithms,
    and of the sums. The terms are probabilities times log s - log t, of size 1.
    """
    arguments = {**tensors, **options}
    ours, our_grads = differentiate(fused_step_kl, {**arguments, "backend": "triton"}, trained)
    eager, eager_grads = differentiate(plain, arguments, trained)
    exact, exact_grads = differentiate(specified, double(arguments), trained)
    largest = 1 + exact.row_kl.max().item()
    row_errors = {}
    for name in ("row_loss", "row_kl"):
        mine, theirs = ((getattr(x, name) - getattr(exact, name)).abs().max().item() for x in (ours, eager))
        row_errors[name] = 2 * theirs + 64 * U * largest
        assert mine <= row_errors[name], (name, mine, theirs)
    scale = 1.0 if tensors.get("row_weight") is None else tensors["row_weight"].max().item()
    terms = exact.row_loss.numel() if options.get("reduction") == "sum" else 1
    assert (ours.loss - exact.loss).abs().max() <= row_errors["row_loss"] * scale * terms
    fraction = (ours.row_clip_fraction - exact.row_clip_fraction).abs().max().item()
    assert fraction <= 1.5 / (options.get("top_k") or tensors["weight"].shape[0])  # one entry within rounding of it
    for name, mine, theirs, right in zip(trained, our_grads, eager_grads, exact_grads, strict=True):
        assert mine.dtype == tensors[name].dtype
        error, eager_error = ((x.double() - right).abs().max().item() for x in (mine, theirs))
        rounding = max(torch.finfo(mine.dtype).eps, 64 * U * largest) * right.abs().max().item()
        assert error <= 2 * eager_error + rounding, (name, error, eager_error)


# ------------------------------------------------------------------------------------------------------------
# Rounding
# ------------------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"clip": 0.01},
    {"clip": 0.01, "clip_form": "nonnegative", "temperature": 0.7},
    {"top_k": 20, "temperature": 1.3},
    {"top_k": 20, "tail": "bucket", "clip": 0.01},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_it_is_as_exact_as_the_plain_computation(divergence: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    vocab = VOCABS[(OPTIONS.index(options) + DTYPES.index(dtype)) % 2]
    check(problem(dtype, vocab), divergence=divergence, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_trained_head_a_bias_and_row_weights(reduction: str, dtype: torch.dtype) -> None:
    tensors = problem(dtype, VOCABS[1])
    tensors["bias"] = randn(VOCABS[1], seed=4, dtype=dtype)
    tensors["row_weight"] = randn(N, seed=5).relu()
    check(tensors, ("student_hidden", "weight", "bias"), clip=0.01, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_trained_over_many_chunks_is_rounded_once(dtype: torch.dtype) -> None:
    check(problem(dtype), ("student_hidden", "weight"), workspace_bytes=16 * 8 * VOCABS[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_heads_of_different_widths(dtype: torch.dtype) -> None:
    tensors = problem(dtype, VOCABS[1])
    other = problem(dtype, VOCABS[1], width=D + 64)
    tensors |= {"teacher_hidden": other["teacher_hidden"], "teacher_weight": other["weight"]}
    tensors |= {"bias": randn(VOCABS[1], seed=4, dtype=dtype), "teacher_bias": randn(VOCABS[1], seed=5, dtype=dtype)}
    check(tensors, divergence="jsd", clip=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nearly_equal_sides_keep_their_gradient(divergence: str, dtype: torch.dtype) -> None:
    """Logits rounded to bf16 would give gradients off by tens of percent; entries of 1e-8 are too small for fp16."""
    tensors = problem(dtype)
    tensors["teacher_hidden"] = (tensors["student_hidden"].float() + 1e-3 * randn(N, D, seed=1)).to(dtype)
    _, (ours,) = differentiate(fused_step_kl, {**tensors, "divergence": divergence})
    _, (exact,) = differentiate(specified, {**double(tensors), "divergence": divergence})
    assert (ours - exact).norm() <= 0.01 * exact.norm()


def test_logits_of_1e4() -> None:
    # Two columns near the top decide everything; a logsumexp of 1e4 in fp32 has a spacing of 1e-3.
    z_s, z_t = torch.full((2, VOCABS[1]), -1e4, device=DEVICE), torch.full((2, VOCABS[1]), -1e4, device=DEVICE)
    z_s[:, 7], z_s[:, 28000] = 1e4, 1e4 - 2
    z_t[:, 7], z_t[:, 28000] = 1e4 - 1, 1e4
    z_t[1] += 8192
    z_s.requires_grad_()
    out = step_kl_from_logits(z_s, z_t, backend="triton")
    s = torch.tensor([0.0, -2.0]).double().softmax(-1).to(DEVICE)
    t = torch.tensor([-1.0, 0.0]).double().softmax(-1).to(DEVICE)
    expected = (s * (s / t).log()).sum()
    torch.testing.assert_close(out.row_kl.double(), expected.expand(2), rtol=64 * U, atol=0)
    (grad,) = torch.autograd.grad(out.loss, z_s)
    gradient = 0.5 * s * ((s / t).log() - expected)
    torch.testing.assert_close(grad[:, [7, 28000]].double(), gradient.expand(2, 2), rtol=64 * U, atol=0)
    assert grad.count_nonzero() == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_logits_rows_do_not_depend_on_their_place(dtype: torch.dtype) -> None:
    z_s, z_t = (3 * randn(N, VOCABS[0], seed=seed, dtype=dtype) for seed in (0, 1))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for options in ({}, {"divergence": "jsd", "clip": 0.01, "top_k": 20, "tail": "bucket"}):
        results = []
        for a, b in ((z_s, z_t), (z_s[order], z_t[order])):
            a = a.clone().requires_grad_()
            out = step_kl_from_logits(a, b, reduction="sum", **options)
            results.append((out.row_loss, out.row_kl, *torch.autograd.grad(out.loss, a)))
        for whole, permuted in zip(*results, strict=True):
            assert torch.equal(whole[order], permuted)
        # And they are right.
        exact = step_kl_from_logits(z_s.double(), z_t.double(), reduction="sum", backend="torch", **options)
        torch.testing.assert_close(results[0][0].double(), exact.row_loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_order_and_chunks_change_nothing_beyond_rounding(dtype: torch.dtype) -> None:
    """Not bit for bit: library products may sum in an order that depends on a row's place and on their number."""
    tensors = problem(dtype)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    out, (grad,) = differentiate(fused_step_kl, tensors)
    for changes in (
        {"student_hidden": tensors["student_hidden"][order], "teacher_hidden": tensors["teacher_hidden"][order]},
        {"workspace_bytes": 16 * 8 * VOCABS[0]},
        {"workspace_bytes": 128 * 8 * VOCABS[0]},
    ):
        other, (other_grad,) = differentiate(fused_step_kl, {**tensors, **changes})
        rows = order if "student_hidden" in changes else slice(None)
        torch.testing.assert_close(other.row_loss, out.row_loss[rows], rtol=1e-5, atol=1e-5)
        # A difference in the 16-bit gradient's last digit, here and there, and its rounding at the end.
        error = (other_grad.double() - grad[rows].double()).abs().max()
        assert error <= (2 * torch.finfo(dtype).eps + 1e-4) * grad.abs().max()


# ------------------------------------------------------------------------------------------------------------
# Sizes
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def large() -> Iterator[None]:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 24 * GIB:
        pytest.skip("needs 24 GiB of free GPU memory")
    yield
    torch.cuda.empty_cache()


def test_logits_beyond_32_bit_offsets(large: None) -> None:
    """All logits, 17 GB, lie in one chunk: its last rows are as they are without the others."""
    tensors = problem(torch.bfloat16, LARGE_VOCAB, MANY_ROWS, NARROW)
    tensors |= {"reduction": "sum", "clip": 0.01}
    few = {**tensors, **{name: tensors[name][-40:] for name in ("student_hidden", "teacher_hidden")}}
    out, (grad,) = differentiate(fused_step_kl, {**tensors, "workspace_bytes": 20 * GIB})
    expected, (expected_grad,) = differentiate(fused_step_kl, few)
    torch.testing.assert_close(out.row_loss[-40:], expected.row_loss, rtol=1e-5, atol=1e-5)
    error, largest = (grad[-40:].double() - expected_grad.double()).abs().max(), expected_grad.abs().max()
    assert largest > 0 and error <= 0.02 * largest


def test_given_logits_beyond_32_bit_offsets(large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    z_s, z_t = (randn(MANY_ROWS, LARGE_VOCAB, seed=seed, dtype=torch.bfloat16).mul_(3) for seed in (0, 1))
    assert z_s.numel() > 1 << 31
    options = {"reduction": "sum", "top_k": 20, "tail": "bucket", "clip": 0.01, "workspace_bytes": 64 * GIB}
    few = z_s[-5:].clone().requires_grad_()
    expected = step_kl_from_logits(few, z_t[-5:], **options)
    expected.loss.backward()
    # One launch for all rows.
    chosen = kernels.choose
    monkeypatch.setattr(kernels, "choose", lambda *a: {**chosen(*a), "CACHE_MIB": 64 << 10})
    out = step_kl_from_logits(z_s.requires_grad_(), z_t, **options)
    (grad,) = torch.autograd.grad(out.loss, z_s)
    assert torch.equal(out.row_loss[-5:], expected.row_loss) and torch.equal(grad[-5:], few.grad)


@pytest.mark.parametrize("options", [{}, {"clip": 0.05}, {"top_k": 20}, {"top_k": 1024, "tail": "bucket"}])
def test_memory(options: dict[str, Any]) -> None:
    tensors = problem(torch.bfloat16, LARGE_VOCAB, 2048, 1024)
    hidden = tensors.pop("student_hidden").requires_grad_()

    def run() -> None:
        (grad,) = torch.autograd.grad(fused_step_kl(hidden, **tensors, **options).loss, hidden)
        del grad

    run()  # the products' libraries keep memory of their own
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    gradients = 2 * hidden.numel() * hidden.itemsize  # the stored one, and its product with the upstream gradient
    assert torch.cuda.max_memory_allocated() - before <= (256 << 20) + (16 << 20) + gradients


# ------------------------------------------------------------------------------------------------------------
# Waiting for the GPU
# ------------------------------------------------------------------------------------------------------------


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_show() -> None:
    with sync_debug_mode("error"), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=DEVICE).item()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": 0.01, "divergence": "jsd", "temperature": 0.7},
        {"top_k": 20, "temperature": 0.7},
        {"top_k": 20, "tail": "bucket"},
    ],
)
def test_the_loss_does_not_wait(options: dict[str, Any], reduction: str) -> None:
    tensors = problem(torch.bfloat16)
    hidden = tensors.pop("student_hidden").requires_grad_()
    bias = torch.zeros(VOCABS[0], device=DEVICE, requires_grad=True)
    for mode in ("default", "error"):  # the first time, kernels are compiled
        with sync_debug_mode(mode):
            fused_step_kl(hidden, **tensors, bias=bias, reduction=reduction, **options).loss.backward()


@pytest.mark.parametrize(
    "options",
    [{}, {"exclude": (3, 7)}, {"top_k": 20}, {"temperature": 1.0, "seed": 5, "exclude": (3,), "top_k": 2}],
)
def test_confidence_does_not_wait(options: dict[str, Any]) -> None:
    tensors = problem(torch.bfloat16)
    for mode in ("default", "error"):
        with sync_debug_mode(mode):
            fused_confidence(tensors["student_hidden"], tensors["weight"], **options)


def test_decoding_waits_once_a_block(shipped: Any) -> None:
    model = shipped.model.to(DEVICE)
    prompts = [torch.arange(2, 2 + size, device=DEVICE) for size in (9, 12)]  # of the vocabulary's first ids
    seeds = torch.arange(2, device=DEVICE)

    def waits(blocks: int, steps: int) -> int:
        decoding = Decoding(8 * blocks, 8, steps=blocks * steps, temperature=0.5, stop_at_eos=False)
        for mode in ("default", "warn"):
            with sync_debug_mode(mode), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                decode(model, prompts, decoding, mask_id=shipped.mask_id, eos_id=shipped.eos_id, seeds=seeds)
        return sum("synchroniz" in str(warning.message) for warning in caught)

    few = waits(2, 2)
    assert few > 0
    assert waits(2, 8) <= few  # however many steps a block has
    assert waits(5, 2) <= few + 3


# ------------------------------------------------------------------------------------------------------------
# Tools
# ------------------------------------------------------------------------------------------------------------

SANITIZED = """
import torch
from dopsd_kernels import fused_confidence, fused_step_kl, step_kl_from_logits

for dtype in (torch.bfloat16, torch.float32):
    hidden, teacher = (torch.randn(67, 72, device="cuda").to(dtype) for _ in range(2))
    weight = torch.randn(1003, 72, device="cuda").to(dtype)
    for options in ({}, dict(clip=0.01, divergence="jsd", top_k=20, tail="bucket")):
        for workspace in (1 << 19, 1 << 28):
            tensors = [x.clone().requires_grad_() for x in (hidden, weight)]
            loss = fused_step_kl(tensors[0], teacher, tensors[1], workspace_bytes=workspace, **options).loss
            loss.backward()
    logits = (hidden @ weight.T).requires_grad_()
    step_kl_from_logits(logits, teacher @ weight.T, clip=0.01, top_k=20).loss.backward()
    fused_confidence(hidden, weight)
    fused_confidence(hidden, weight, temperature=1.0, seed=1, top_k=20, exclude=(5,))
torch.cuda.synchronize()
"""


def test_no_access_is_out_of_bounds() -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        pytest.skip("compute-sanitizer, a tool of the CUDA toolkit, is not installed")
    # Every tensor is an allocation of its own: the next one does not hide an access beyond the end.
    done = subprocess.run(
        [
            tool,
            "--tool",
            "memcheck",
            "--report-api-errors",
            "no",
            "--error-exitcode",
            "1",
            sys.executable,
            "-c",
            SANITIZED,
        ],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_compiled_functions_give_the_same() -> None:
    tensors = problem(torch.bfloat16)
    hidden, teacher, weight = tensors.values()

    def together(hidden: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        out = fused_step_kl(2 * hidden, teacher, weight, clip=0.01, **options)
        sure = fused_confidence(hidden, weight, top_k=2)
        return out.loss.sum(), out.row_kl, sure.top_values

    torch._dynamo.reset()
    compiled = torch.compile(together, fullgraph=True)
    for reduction, row_weight in itertools.product(("mean", "none"), (None, randn(N, seed=5).relu())):
        results = []
        for function in (together, compiled):
            x = hidden.clone().requires_grad_()
            outputs = function(x, {"reduction": reduction, "row_weight": row_weight})
            results.append((*outputs, *torch.autograd.grad(outputs[0], x)))
        for eager, ours in zip(*results, strict=True):
            rounding = torch.finfo(eager.dtype).eps * eager.abs().max().item()
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=4 * rounding)
