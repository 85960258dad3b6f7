"""fused_step_kl costs what its docstring promises: products and memory."""

import pytest
import torch
from costs import Memory, products
from torch import Tensor

from dopsd_kernels import fused_step_kl

N, D, VOCAB = 48, 8, 1000
UNIT = 2 * N * D * VOCAB  # one product of all rows with the head


def problem(dtype: torch.dtype = torch.float32, trained_head: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hs, ht, weight = (torch.randn(*s, generator=generator).to(dtype) for s in ((N, D), (N, D), (VOCAB, D)))
    return hs.requires_grad_(), ht, weight.requires_grad_(trained_head)


@pytest.mark.parametrize(
    ("reduction", "trained_head", "units"),
    [("mean", False, 3), ("sum", True, 4), ("none", False, 5), ("none", True, 6)],
)
def test_number_of_products(reduction, trained_head, units):
    hs, ht, weight = problem(trained_head=trained_head)
    assert products(lambda: fused_step_kl(hs, ht, weight, reduction=reduction).loss.sum().backward()) == units * UNIT


@pytest.mark.parametrize("trained_head", [False, True])
def test_a_renormalized_top_k_needs_one_product_over_the_vocabulary(trained_head):
    hs, ht, weight = problem(trained_head=trained_head)
    k = 20
    gathered = 2 * N * k * D  # each row with its own k rows of the weight; a trained head's gradient is k rows of sums

    def run(**options):
        return fused_step_kl(hs, ht, weight, top_k=k, clip=0.05, **options).loss.sum()

    assert products(lambda: run().backward()) == UNIT + 2 * gathered
    assert products(lambda: run(reduction="none").backward()) == 2 * UNIT + 3 * gathered
    with torch.no_grad():
        assert products(run) == UNIT + gathered
    assert products(lambda: run(tail="bucket").backward()) == (4 if trained_head else 3) * UNIT


def test_nothing_is_differentiated_without_need():
    hs, ht, weight = problem()
    assert products(lambda: fused_step_kl(hs.detach(), ht, weight)) == 2 * UNIT
    with torch.no_grad():
        assert products(lambda: fused_step_kl(hs, ht, weight)) == 2 * UNIT


def test_rows_of_weight_zero_enter_no_product():
    hs, ht, weight = problem()
    row_weight = torch.zeros(N)
    row_weight[[3, 17, 40]] = 0.5
    assert products(lambda: fused_step_kl(hs, ht, weight, row_weight=row_weight).loss.backward()) == 3 * UNIT * 3 // N
    # "none": neither do, in the backward, rows without an upstream gradient.
    loss = fused_step_kl(hs, ht, weight, reduction="none").loss
    assert products(lambda: loss[:6].sum().backward()) == 3 * UNIT * 6 // N


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": 0.05},
        {"clip": 0.05, "clip_form": "nonnegative", "divergence": "forward_kl"},
        {"clip": 0.05, "divergence": "jsd"},
        {"top_k": 20, "clip": 0.05},
        {"top_k": 6, "tail": "bucket"},
        {"top_k": VOCAB, "tail": "bucket", "clip": 0.05, "clip_form": "nonnegative"},
    ],
)
def test_the_workspace_is_kept(options, reduction, trained_head, dtype):
    item = 8 if dtype == torch.float64 else 4
    workspace = item * (25_000 if options.get("top_k") == VOCAB else 12_500)
    hs, ht, weight = problem(dtype, trained_head)
    assert N * VOCAB * item > 1.9 * workspace  # a tensor of all logits would show
    with Memory(hs, ht, weight) as mode:
        out = fused_step_kl(hs, ht, weight, reduction=reduction, workspace_bytes=workspace, **options)
        out.loss.sum().backward()
    assert 0 < mode.largest <= workspace
    # Beside it: the stored gradients, their product with the upstream gradient, its rounding; vectors of N.
    gradients = N * D + (VOCAB * D if trained_head else 0)
    assert mode.most <= workspace + item * (3 * gradients + 20 * N)


def test_the_workspace_is_kept_when_blocks_have_several_rows():
    n, d, vocab, workspace = 60, 2, 200, 80_000
    generator = torch.Generator().manual_seed(0)
    hs, ht, weight = (torch.randn(rows, d, generator=generator) for rows in (n, n, vocab))
    with Memory(hs, ht, weight) as mode:
        fused_step_kl(hs.requires_grad_(), ht, weight, clip=0.05, workspace_bytes=workspace).loss.backward()
    assert workspace / 2 < mode.most <= workspace + 4 * (3 * n * d + 20 * n)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}])
def test_the_weight_is_converted_in_tiles(options):
    generator = torch.Generator().manual_seed(0)
    vocab, d = 64, 512
    hs, ht = (torch.randn(4, d, generator=generator).bfloat16() for _ in range(2))
    weight = torch.randn(vocab, d, generator=generator).bfloat16().detach()
    hs.requires_grad_()
    workspace = vocab * d * 4 // 2
    assert weight.untyped_storage().nbytes() <= workspace
    with Memory(hs, ht, weight) as mode:
        fused_step_kl(hs, ht, weight, workspace_bytes=workspace, **options).loss.backward()
    assert mode.largest <= workspace


@pytest.mark.parametrize("options", [{}, {"top_k": 20}])
def test_the_chunk_size_changes_nothing_beyond_rounding(options):
    results = []
    for workspace in (50_000, 100_000, 1 << 26):
        hs, ht, weight = problem(trained_head=True)
        out = fused_step_kl(hs, ht, weight, clip=0.01, workspace_bytes=workspace, **options)
        out.loss.backward()
        results.append((*out, hs.grad, weight.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
