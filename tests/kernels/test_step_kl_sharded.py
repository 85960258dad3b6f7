"""fused_step_kl over a sharded vocabulary, with FSDP2's sharded weight and under DDP: two processes, one answer."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dopsd_kernels import StepKLOutput, fused_step_kl, step_kl_from_logits

N, D, VOCAB = 5, 4, 23
SHARDS = (slice(0, 16), slice(16, VOCAB))  # of different widths
SUPPORTS = ((None, "renormalize"), (3, "renormalize"), (9, "bucket"), (VOCAB, "bucket"))


def _worker(rank: int, case: Callable[[int], None], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    case(rank)
    dist.barrier()
    dist.destroy_process_group()


def in_two_processes(case: Callable[[int], None], folder: Path) -> None:
    mp.spawn(_worker, (case, str(folder)), nprocs=2)


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
    cases = itertools.product(
        ("reverse_kl", "forward_kl", "jsd"), ("plain", "nonnegative"), (None, 0.05), SUPPORTS, ("mean", "none")
    )
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
