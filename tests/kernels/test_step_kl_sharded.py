"""fused_step_kl over a sharded vocabulary, with FSDP2's sharded weight and under DDP: two processes, one answer."""

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import in_two_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dopsd_kernels import StepKLOutput, fused_step_kl, step_kl_from_logits
from dopsd_kernels.step_kl.divergences import DIVERGENCES

N, D, VOCAB = 5, 4, 23
SHARDS = (slice(0, 16), slice(16, VOCAB))  # of different widths
SUPPORTS = ((None, "renormalize"), (9, "renormalize"), (3, "bucket"), (VOCAB, "bucket"))


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_rows_equal(ours: StepKLOutput, whole: StepKLOutput) -> None:
    for a, b in zip(ours, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def _vocabulary(rank: int) -> None:
    shard = SHARDS[rank]
    teacher, weight, bias = randn(N, D, seed=1), randn(VOCAB, D, seed=2), randn(VOCAB, seed=3)
    weight[20] = weight[3]  # the teacher's entries tie across the processes
    bias[20] = bias[3]
    row_weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0]).double()
    cases = itertools.product(DIVERGENCES, ("plain", "nonnegative"), (None, 0.05), SUPPORTS, ("mean", "none"))
    for divergence, form, clip, (top_k, tail), reduction in cases:
        options = {
            "divergence": divergence,
            "clip": clip,
            "clip_form": form,
            "top_k": top_k,
            "tail": tail,
            "temperature": 0.7,
            "reduction": reduction,
            "row_weight": row_weight,
        }

        def run(
            columns: slice, group: dist.ProcessGroup | None, options: dict[str, Any] = options
        ) -> tuple[StepKLOutput, tuple[Tensor, ...]]:
            inputs = [x.clone().requires_grad_() for x in (randn(N, D, seed=0), weight[columns], bias[columns])]
            out = fused_step_kl(
                inputs[0],
                teacher,
                inputs[1],
                bias=inputs[2],
                vocab_group=group,
                workspace_bytes=8 * 500,  # several chunks and blocks
                **options,
            )
            return out, torch.autograd.grad(out.loss.sum() * 1.7, inputs)

        whole, grads = run(slice(None), None)
        ours, parts = run(shard, dist.group.WORLD)
        assert_rows_equal(ours, whole)
        for a, b in zip(parts, (grads[0], grads[1][shard], grads[2][shard]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

        z_s, z_t = (randn(N, VOCAB, seed=seed) for seed in (4, 5))
        z_s.requires_grad_()
        whole = step_kl_from_logits(z_s, z_t, **options)
        (grad,) = torch.autograd.grad(whole.loss.sum(), z_s)
        part = z_s.detach()[:, shard].clone().requires_grad_()
        ours = step_kl_from_logits(part, z_t[:, shard], vocab_group=dist.group.WORLD, **options)
        assert_rows_equal(ours, whole)
        (ours_grad,) = torch.autograd.grad(ours.loss.sum(), part)
        torch.testing.assert_close(ours_grad, grad[:, shard], rtol=1e-10, atol=1e-12)


def test_a_sharded_vocabulary_gives_the_whole_ones_loss_and_gradients(tmp_path: Path) -> None:
    in_two_processes(_vocabulary, tmp_path)


def _broken_rows(rank: int) -> None:
    # A NaN, or no finite logit at all, on one process: the row is NaN on both, the others are untouched.
    z_s, z_t = randn(4, VOCAB, seed=0), randn(4, VOCAB, seed=1)
    z_s[1, 2] = torch.nan
    z_t[2, :16] = -torch.inf
    out = step_kl_from_logits(z_s[:, SHARDS[rank]], z_t[:, SHARDS[rank]], vocab_group=dist.group.WORLD, clip=0.1)
    assert_rows_equal(
        StepKLOutput(*(x.nan_to_num(7) for x in out)),
        StepKLOutput(*(x.nan_to_num(7) for x in step_kl_from_logits(z_s, z_t, clip=0.1))),
    )
    assert out.row_kl.isnan().tolist() == [False, True, False, False]


def test_broken_rows_of_one_process_are_known_to_both(tmp_path: Path) -> None:
    in_two_processes(_broken_rows, tmp_path)


# Rank 1 has no column in the second split of 512, and part of a block of 256 in its first.
TRITON_SHARDS = (slice(0, 520), slice(520, 700))


def _triton(rank: int) -> None:
    vocab, shard, u = TRITON_SHARDS[-1].stop, TRITON_SHARDS[rank], 2.0**-24

    def quarters(*shape: int, seed: int) -> Tensor:
        """Small numbers of which all products and sums are exact in fp32: many logits tie, on both sides."""
        return (4 * randn(*shape, seed=seed)).round() / 4

    hidden, teacher, weight, bias = (
        quarters(*shape, seed=seed) for seed, shape in enumerate(((N, D), (N, D), (vocab, D), (vocab,)))
    )
    teacher[1], bias[:] = 0, bias.round()  # a row of few different logits
    weight[600:], bias[600:] = weight[:100], bias[:100]
    logits = [2 * (x @ weight.T + bias) for x in (hidden, teacher)]
    columns = logits[1].sort(dim=-1, descending=True, stable=True).indices
    assert (columns[:, 8] < 520).logical_xor(columns[:, 9] < 520).any()  # equal logits of both processes
    # Logits up to z are exact. What is made of them, log s - log t, has a few roundings of 2 z and of sums of exps,
    # whose own errors are a few u; the rows' sums weight these errors with probabilities.
    z = max(x.abs().max().item() for x in logits)
    largest = max(weight.abs().max().item(), hidden.abs().max().item())
    for divergence, clip, support, reduction in (
        ("reverse_kl", None, {}, "mean"),
        ("forward_kl", 0.05, {"clip_form": "nonnegative"}, "sum"),
        ("jsd", 0.02, {}, "none"),
        ("reverse_kl", 0.05, {"top_k": 9, "tail": "bucket"}, "mean"),
        ("reverse_kl", None, {"top_k": 9}, "mean"),
        ("jsd", None, {"top_k": vocab, "tail": "bucket"}, "sum"),
    ):
        options = {"divergence": divergence, "clip": clip, "temperature": 0.5, "reduction": reduction, **support}

        def run(
            columns: slice, dtype: torch.dtype, options: dict[str, Any] = options, **how: Any
        ) -> tuple[StepKLOutput, tuple[Tensor, ...]]:
            inputs = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight[columns], bias[columns])]
            out = fused_step_kl(inputs[0], teacher.to(dtype), inputs[1], bias=inputs[2], **how, **options)
            return out, torch.autograd.grad(out.loss.sum(), inputs)

        whole, grads = run(slice(None), torch.float64)
        ours, parts = run(shard, torch.float32, backend="triton", vocab_group=dist.group.WORLD)
        error = (4 * z + 64) * u * (1 + whole.row_kl.max().item())
        for name, ours_is, exact in zip(ours._fields, ours, whole, strict=True):
            atol = 1.5 / vocab if name == "row_clip_fraction" and not support else error
            torch.testing.assert_close(ours_is.double(), exact, rtol=0, atol=atol * (N if name == "loss" else 1))
        # Divided by the temperature; the last product sums V terms.
        error = (error + vocab * u * (1 + whole.row_kl.max().item())) * largest * N / 0.5
        for a, b in zip(parts, (grads[0], grads[1][shard], grads[2][shard]), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=error)

        broken = logits[1].float()
        broken[3, 550] = torch.nan
        out = step_kl_from_logits(
            logits[0][:, shard].float(),
            broken[:, shard],
            backend="triton",
            vocab_group=dist.group.WORLD,
            **{**options, "temperature": 1.0},
        )
        assert out.row_kl.isnan().tolist() == [False, False, False, True, False]
        torch.testing.assert_close(out.row_kl[:3].double(), whole.row_kl[:3], rtol=0, atol=error)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, Triton's interpreter does not run")
def test_the_kernels_over_a_sharded_vocabulary(tmp_path: Path) -> None:
    in_two_processes(_triton, tmp_path)


def _fsdp(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    head = nn.Linear(D, VOCAB, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(randn(VOCAB, D, seed=2))
        head.bias.copy_(randn(VOCAB, seed=3))
    reference = nn.Linear(D, VOCAB, dtype=torch.float64)
    reference.load_state_dict(head.state_dict())
    fully_shard(head, mesh=mesh)
    assert head.weight.to_local().shape[0] < VOCAB

    def loss(layer: nn.Linear, of_rank: int) -> Tensor:
        hidden = randn(N, D, seed=10 + of_rank)
        return fused_step_kl(hidden, randn(N, D, seed=1), layer.weight, bias=layer.bias, clip=0.05).loss

    loss(head, rank).backward()
    # What data parallelism computes: the mean over the processes.
    (0.5 * (loss(reference, 0) + loss(reference, 1))).backward()
    for ours, theirs in zip(head.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-10, atol=1e-12)


def test_a_weight_that_fsdp_sharded_is_gathered_and_gets_its_gradient(tmp_path: Path) -> None:
    in_two_processes(_fsdp, tmp_path)


class _Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(D, D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def _ddp(rank: int) -> None:
    weight, teacher = randn(VOCAB, D, seed=2), randn(N, D, seed=1)
    student, reference = nn.parallel.DistributedDataParallel(_Student()), _Student()

    def loss(model: nn.Module, of_rank: int) -> Tensor:
        # One process has no row that counts: it must take part in the reduction all the same.
        row_weight = torch.full((N,), float(of_rank))
        return fused_step_kl(model(randn(N, D, seed=10 + of_rank)), teacher, weight, row_weight=row_weight).loss

    loss(student, rank).backward()
    (0.5 * loss(reference, 1)).backward()
    for ours, theirs in zip(student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_ddp_with_no_rows_on_one_process(tmp_path: Path) -> None:
    in_two_processes(_ddp, tmp_path)


def test_a_group_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="vocab_group"):
        fused_step_kl(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4, 3), vocab_group="tp")
