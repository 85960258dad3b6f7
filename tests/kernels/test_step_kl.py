"""fused_step_kl computes what its docstring says: definition, finite differences, edge cases."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd_kernels import fused_step_kl, reference, step_mean_weights
from dopsd_kernels.step_kl.contracts import StepKLOptions
from dopsd_kernels.step_kl.divergences import DIVERGENCES

FORMS = ("plain", "nonnegative")
SUPPORTS = ((None, "renormalize"), (3, "renormalize"), (3, "bucket"))
CLIP = 0.1


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_contributions(
    z_s: Tensor, z_t: Tensor, divergence: str, beta: float, form: str, top_k: int | None, tail: str
) -> tuple[Tensor, Tensor]:
    """One row's contributions, in `form` and plain, from probabilities (no log-softmax, no sorting op)."""
    s, t = z_s.exp() / z_s.exp().sum(), z_t.exp() / z_t.exp().sum()
    if top_k is not None:
        order = sorted(range(len(t)), key=lambda v: (-t[v].item(), v))
        kept, rest = order[:top_k], order[top_k:]
        if tail == "renormalize":
            s, t = s[kept] / s[kept].sum(), t[kept] / t[kept].sum()
        else:
            s, t = (torch.cat([p[kept], p[rest].sum()[None]]) for p in (s, t))
    m = (1 - beta) * s + beta * t
    terms, correction = {
        "reverse_kl": (s * (s / t).log(), t - s),
        "forward_kl": (t * (t / s).log(), s - t),
        "jsd": ((1 - beta) * s * (s / m).log() + beta * t * (t / m).log(), 0),
        "skew_reverse_kl": (s * (s / m).log(), m - s),
        "skew_forward_kl": (t * (t / m).log(), m - t),
    }[divergence]
    return terms + correction if form == "nonnegative" else terms, terms


def naive_loss(hs, ht, w_s, w_t, b_s, b_t, row_weight, divergence, form, top_k, tail, clip, temperature, reduction):
    loss, row_loss, row_kl, row_fraction = [], [], [], []
    for i in range(hs.shape[0]):
        z_s, z_t = (w_s @ hs[i] + b_s) / temperature, (w_t @ ht[i] + b_t) / temperature
        clipped, plain = naive_contributions(z_s, z_t.detach(), divergence, 0.3, form, top_k, tail)
        row_kl.append(plain.sum())
        row_loss.append(row_kl[-1] if clip is None else torch.where(clipped > clip, clip, clipped).sum())
        row_fraction.append(torch.zeros(()) if clip is None else (clipped > clip).double().mean())
        if row_weight[i] == 0:
            row_kl[-1] = row_loss[-1] = row_fraction[-1] = torch.zeros((), dtype=hs.dtype)
        loss.append(row_weight[i] * row_loss[-1])
    total = torch.stack(loss)
    if reduction != "none":
        total = total.sum() / (sum(w != 0 for w in row_weight) if reduction == "mean" else 1)
    return (total, *(torch.stack([x.double() for x in xs]) for xs in (row_loss, row_kl, row_fraction)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_forward_and_gradients_match_the_definition(divergence, form, top_k, tail, reduction):
    n, d, vocab = 4, 3, 7
    clipped_with_gradient = 0
    for clip, temperature, biased, d_t, weighted in itertools.product(
        (None, CLIP), (1.0, 0.6), (False, True), (3, 5), (False, True)
    ):
        inputs = [randn(n, d), randn(vocab, d, seed=2), randn(vocab, seed=3)]
        hs, w_s, b_s = (x.requires_grad_() for x in inputs)
        ht, w_t, b_t = randn(n, d_t, seed=1), randn(vocab, d_t, seed=4), randn(vocab, seed=5)
        row_weight = torch.tensor([0.5, 0.0, 2.0, 1.0]).double() if weighted else torch.ones(n).double()
        out = fused_step_kl(
            hs,
            ht,
            w_s,
            teacher_weight=w_t,
            bias=b_s if biased else None,
            teacher_bias=b_t if biased else None,
            row_weight=row_weight if weighted else None,
            divergence=divergence,
            beta=0.3,
            clip=clip,
            clip_form=form,
            top_k=top_k,
            tail=tail,
            temperature=temperature,
            reduction=reduction,
        )
        zero = torch.zeros(vocab, dtype=torch.float64)
        naive = naive_loss(
            hs, ht, w_s, w_t, b_s if biased else zero, b_t if biased else zero,
            row_weight, divergence, form, top_k, tail, clip, temperature, reduction,
        )  # fmt: skip
        for ours, theirs in zip(out, naive, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)

        wanted = (hs, w_s, b_s) if biased else (hs, w_s)
        upstream = randn(n, seed=6) if reduction == "none" else torch.tensor(1.7).double()
        ours = torch.autograd.grad(out.loss, wanted, upstream)
        theirs = torch.autograd.grad(naive[0], wanted, upstream)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert not any(x.requires_grad for x in out[1:])
        clipped_with_gradient += bool(out.row_clip_fraction.any()) and theirs[0].abs().max().item() > 1e-2
    assert clipped_with_gradient >= 8  # of the 16 cases with a clip


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_match_finite_differences(divergence, form, top_k, tail, reduction):
    n, d, vocab = 2, 2, 5
    hs, ht, weight, bias = randn(n, d), randn(n, d, seed=1), randn(vocab, d, seed=2), randn(vocab, seed=3)
    teacher_weight, teacher_bias = randn(vocab, d, seed=2), randn(vocab, seed=5)
    contributions = torch.cat(
        [
            naive_contributions(
                weight @ hs[i] + bias,
                teacher_weight @ ht[i] + teacher_bias,
                divergence,
                0.3,
                form,
                top_k,
                tail,
            )[0]
            for i in range(n)
        ]
    )
    # The clip lies in the widest gap between contributions, where a small step crosses no kink.
    ordered = contributions.clamp(min=0).sort().values
    gap = ordered.diff().argmax()
    assert ordered[gap + 1] - ordered[gap] > 1e-3
    clip = ordered[gap : gap + 2].mean().item()

    def loss(hs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_step_kl(
            hs, ht, weight, teacher_weight=teacher_weight, bias=bias, teacher_bias=teacher_bias,
            divergence=divergence, beta=0.3, clip=clip, clip_form=form, top_k=top_k, tail=tail,
            reduction=reduction,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in (hs, weight, bias)])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 9), st.integers(1, 5), st.sampled_from([1, 2, 3, 13, 31]), st.sampled_from(list(DIVERGENCES)),
    st.sampled_from(FORMS), st.sampled_from([None, 0.0, 0.03]), st.sampled_from([None, 1, 2, 13]),
    st.sampled_from(["renormalize", "bucket"]), st.sampled_from(["mean", "sum", "none"]), st.integers(1, 6),
    st.booleans(),
)  # fmt: skip
def test_matches_the_reference_whatever_the_chunks(
    n, d, vocab, divergence, form, clip, top_k, tail, reduction, rows, ties
):
    top_k = None if top_k is None else min(top_k, vocab)
    hs, ht, weight = (
        randn(n, d).requires_grad_(),
        randn(n, d + 1, seed=1),
        randn(vocab, d, seed=2).requires_grad_(),
    )
    teacher_weight = randn(vocab, d + 1, seed=4)
    if ties:
        ht, teacher_weight = (
            ht.round(),
            teacher_weight.round(),
        )  # small integers: exact products, equal logits
    row_weight = (randn(n, seed=5) * 2).round().abs()
    options = StepKLOptions(divergence, 0.4, clip, form, top_k, tail, 1.3)
    ours = fused_step_kl(
        hs, ht, weight, teacher_weight=teacher_weight, row_weight=row_weight, divergence=divergence, beta=0.4,
        clip=clip, clip_form=form, top_k=top_k, tail=tail, temperature=1.3, reduction=reduction,
        workspace_bytes=8 * rows * (21 * vocab + 6 * d + 12),
    )  # fmt: skip
    theirs = reference.step_kl(
        hs,
        ht,
        weight,
        teacher_weight=teacher_weight,
        row_weight=row_weight,
        reduction=reduction,
        options=options,
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    for a, b in zip(
        torch.autograd.grad(ours.loss.sum(), (hs, weight)),
        torch.autograd.grad(theirs.loss.sum(), (hs, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    if clip is not None and form == "nonnegative":
        assert (ours.row_loss >= -1e-14).all()
        assert (ours.row_loss <= ours.row_kl + 1e-14).all()


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_distributions_have_no_loss_and_no_gradient(divergence, form, clip):
    hs = randn(6, 8, dtype=torch.float32).requires_grad_()
    out = fused_step_kl(
        hs,
        hs.detach(),
        randn(50, 8, seed=1, dtype=torch.float32),
        divergence=divergence,
        clip=clip,
        clip_form=form,
    )
    out.loss.backward()
    assert out.row_kl.abs().max() < 1e-7
    assert out.loss.abs() < 1e-7
    assert hs.grad.abs().max() < 1e-6


def test_skew_divergences_lie_between_nothing_and_a_kl_and_make_up_the_jsd():
    hs, ht, weight, beta = randn(6, 8), randn(6, 8, seed=1), randn(50, 8, seed=2), 0.3

    def row_kl(divergence: str, beta: float = beta) -> Tensor:
        return fused_step_kl(hs, ht, weight, divergence=divergence, beta=beta).row_kl

    skew_reverse, skew_forward = row_kl("skew_reverse_kl"), row_kl("skew_forward_kl")
    torch.testing.assert_close((1 - beta) * skew_reverse + beta * skew_forward, row_kl("jsd"))
    log_s, log_t = ((x @ weight.T).log_softmax(-1) for x in (hs, ht))
    log_m = ((1 - beta) * log_s.exp() + beta * log_t.exp()).log()
    for ours, log_p in ((skew_reverse, log_s), (skew_forward, log_t)):
        torch.testing.assert_close(ours, F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1))
    # A mixture of almost one side alone.
    torch.testing.assert_close(row_kl("skew_reverse_kl", 1 - 1e-12), row_kl("reverse_kl"), rtol=1e-6, atol=0)
    torch.testing.assert_close(row_kl("skew_forward_kl", 1e-12), row_kl("forward_kl"), rtol=1e-6, atol=0)
    assert row_kl("skew_reverse_kl", 1e-12).max() < 1e-9 and row_kl("skew_forward_kl", 1 - 1e-12).max() < 1e-9


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_huge_logits_stay_exact(divergence):
    # One-hot on both sides, at different entries: the divergence is the difference of two logits of 1e4.
    hs, ht = torch.tensor([[1e4, 0.0]], requires_grad=True), torch.tensor([[0.0, 1e4]])
    out = fused_step_kl(hs, ht, torch.eye(2), divergence=divergence, clip=None)
    out.loss.backward()
    assert out.row_kl.item() == pytest.approx(1e4 if divergence in ("reverse_kl", "forward_kl") else math.log(2))
    assert hs.grad.isfinite().all()
    assert fused_step_kl(hs, ht, torch.eye(2), divergence=divergence, clip=0.05).row_kl.isfinite().all()


@pytest.mark.parametrize(("top_k", "tail"), [*SUPPORTS, (7, "bucket")])
@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_impossible_entries_count_for_nothing(divergence, form, clip, top_k, tail):
    # Removing an id with a bias of -inf on both sides is the same as not having it.
    n, d, vocab = 4, 3, 8
    hs, ht, weight = randn(n, d), randn(n, d, seed=1), randn(vocab, d, seed=2)
    bias = torch.zeros(vocab, dtype=torch.float64)
    bias[2] = -math.inf
    others = [v for v in range(vocab) if v != 2]
    kept = [hs.clone().requires_grad_() for _ in range(2)]
    common = dict(divergence=divergence, clip=clip, clip_form=form, tail=tail, top_k=top_k)
    with_it = fused_step_kl(kept[0], ht, weight, bias=bias, **common)
    without = fused_step_kl(kept[1], ht, weight[others], **common)
    torch.testing.assert_close(with_it.loss, without.loss)
    torch.testing.assert_close(with_it.row_kl, without.row_kl)
    grads = [torch.autograd.grad(out.loss, x)[0] for out, x in zip((with_it, without), kept, strict=True)]
    torch.testing.assert_close(*grads)


def test_student_mass_where_the_teacher_has_none():
    hs, ht, weight = randn(3, 4).requires_grad_(), randn(3, 4, seed=1), randn(6, 4, seed=2)
    teacher_bias = torch.zeros(6, dtype=torch.float64)
    teacher_bias[1] = -math.inf
    common = dict(teacher_weight=weight, teacher_bias=teacher_bias)
    assert fused_step_kl(hs, ht, weight, **common).row_kl.isposinf().all()
    for form in FORMS:
        clipped = fused_step_kl(hs, ht, weight, clip=0.1, clip_form=form, **common)
        clipped.loss.backward()
        assert clipped.row_loss.isfinite().all()
        assert clipped.row_kl.isposinf().all()
        assert (clipped.row_clip_fraction >= 1 / 6).all()
        assert hs.grad.isfinite().all()
        assert hs.grad.abs().max() > 0
    assert fused_step_kl(hs, ht, weight, divergence="forward_kl", **common).row_kl.isfinite().all()


def test_nan_is_never_hidden():
    hs = randn(3, 4)
    hs[1, 2] = math.nan
    hs.requires_grad_()
    out = fused_step_kl(hs, randn(3, 4, seed=1), randn(6, 4, seed=2), clip=0.1, reduction="none")
    out.loss.sum().backward()
    assert out.loss.isnan().tolist() == [False, True, False]
    assert hs.grad.isnan().any(-1).tolist() == [False, True, False]
    skipped = fused_step_kl(
        hs, randn(3, 4, seed=1), randn(6, 4, seed=2), row_weight=torch.tensor([1.0, 0.0, 1.0]), clip=0.1
    )
    assert skipped.loss.isfinite()


def test_a_renormalized_top_k_reads_nothing_else_of_the_student():
    hs, ht, weight, teacher_weight = randn(3, 4), randn(3, 4, seed=1), randn(200, 4, seed=2), randn(200, 4, seed=3)
    support = (ht @ teacher_weight.T).topk(5).indices.unique()
    broken = torch.full_like(weight, math.nan)
    broken[support] = weight[support]
    results = []
    for head in (weight, broken):
        inputs = [x.clone().requires_grad_() for x in (hs, head)]
        loss = fused_step_kl(inputs[0], ht, inputs[1], teacher_weight=teacher_weight, top_k=5).loss
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][2].any(1).nonzero()[:, 0].tolist() == support.tolist()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("n", "row_weight"), [(0, None), (3, torch.zeros(3))])
def test_no_rows_give_zero_connected_to_the_graph(n, row_weight, reduction):
    hs, weight = randn(n, 4).requires_grad_(), randn(6, 4, seed=2).requires_grad_()
    out = fused_step_kl(hs, randn(n, 4), weight, row_weight=row_weight, reduction=reduction)
    assert out.loss.sum() == 0
    out.loss.sum().backward()
    assert hs.grad.shape == hs.shape and not hs.grad.any()
    assert weight.grad.shape == weight.shape and not weight.grad.any()


def test_leading_dimensions_and_strides_do_not_matter():
    hs, ht, weight = randn(2, 3, 4), randn(2, 3, 4, seed=1), randn(6, 4, seed=2)
    row_weight = randn(2, 3, seed=3).abs()
    flat = hs.reshape(6, 4).requires_grad_()
    expected = fused_step_kl(flat, ht.reshape(6, 4), weight, row_weight=row_weight.reshape(6), reduction="none")
    (grad,) = torch.autograd.grad(expected.loss.sum(), flat)
    strided = hs.permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    assert not strided.is_contiguous()
    for weights in (row_weight, row_weight.reshape(6)):
        out = fused_step_kl(
            strided,
            ht.permute(2, 0, 1).contiguous().permute(1, 2, 0),
            weight.T.contiguous().T,
            row_weight=weights,
            reduction="none",
        )
        for a, b in zip(out, expected, strict=True):
            assert a.shape == (2, 3)
            torch.testing.assert_close(a, b.reshape(2, 3))
        torch.testing.assert_close(torch.autograd.grad(out.loss.sum(), strided)[0], grad.reshape(2, 3, 4))
    single = fused_step_kl(hs[0, 0], ht[0, 0], weight, reduction="none")
    assert single.loss.shape == single.row_kl.shape == ()


def test_the_teacher_shares_the_students_head_by_default():
    hs, ht, weight, bias = randn(4, 3), randn(4, 3, seed=1), randn(6, 3, seed=2), randn(6, seed=3)
    shared = fused_step_kl(hs, ht, weight, bias=bias)
    assert torch.equal(
        shared.row_kl,
        fused_step_kl(hs, ht, weight, teacher_weight=weight, bias=bias, teacher_bias=bias).row_kl,
    )
    own_bias = fused_step_kl(hs, ht, weight, bias=bias, teacher_bias=bias * 2).row_kl
    assert torch.equal(
        own_bias,
        fused_step_kl(hs, ht, weight, teacher_weight=weight, bias=bias, teacher_bias=bias * 2).row_kl,
    )
    unbiased = fused_step_kl(hs, ht, weight, teacher_weight=weight, bias=bias).row_kl
    zero = torch.zeros_like(bias)
    assert torch.equal(
        unbiased, fused_step_kl(hs, ht, weight, teacher_weight=weight, bias=bias, teacher_bias=zero).row_kl
    )
    # A trained shared head: the gradient is the student's alone.
    trained = weight.clone().requires_grad_()
    (ours,) = torch.autograd.grad(fused_step_kl(hs, ht, trained, bias=bias).loss, trained)
    (apart,) = torch.autograd.grad(
        fused_step_kl(hs, ht, trained, teacher_weight=weight, bias=bias, teacher_bias=bias).loss, trained
    )
    assert torch.equal(ours, apart)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_can_run_twice(reduction):
    hs, weight = randn(4, 3).requires_grad_(), randn(6, 3, seed=2).requires_grad_()
    loss = fused_step_kl(hs, randn(4, 3, seed=1), weight, reduction=reduction).loss.sum()
    first = torch.autograd.grad(loss, (hs, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hs, weight), retain_graph=True)
    used_twice = torch.autograd.grad(loss * 2 + loss, (hs, weight))
    for a, b, c in zip(first, second, used_twice, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, 3 * a)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_requires_a_gradient_gets_one(reduction):
    hs, ht, weight, bias = randn(4, 3), randn(4, 3, seed=1), randn(6, 3, seed=2), randn(6, seed=3)
    everything = [x.clone().requires_grad_() for x in (hs, weight, bias)]
    loss = fused_step_kl(everything[0], ht, everything[1], bias=everything[2], reduction=reduction).loss.sum()
    expected = torch.autograd.grad(loss, everything)
    for wanted in itertools.product([False, True], repeat=3):
        tensors = [x.clone().requires_grad_(w) for x, w in zip((hs, weight, bias), wanted, strict=True)]
        out = fused_step_kl(tensors[0], ht, tensors[1], bias=tensors[2], reduction=reduction)
        assert out.loss.requires_grad == any(wanted)
        if any(wanted):
            out.loss.sum().backward()
        for x, w, g in zip(tensors, wanted, expected, strict=True):
            assert (x.grad is None) == (not w)
            if w:
                torch.testing.assert_close(x.grad, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_low_precision_is_at_least_as_good_as_the_plain_computation(divergence, dtype):
    n, d, vocab = 16, 64, 301
    hs, weight = randn(n, d, dtype=dtype), (randn(vocab, d, seed=2) / d**0.5 * 2).to(dtype)
    ht = (hs.double() + 0.1 * randn(n, d, seed=1)).to(dtype)  # close to the student, where rounding hurts most

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = hs.detach().clone().to(dtype).requires_grad_()
        z_s, z_t = x @ weight.to(dtype).T, ht.to(dtype) @ weight.to(dtype).T
        accurate = torch.promote_types(dtype, torch.float32)
        s, t = z_s.to(accurate).softmax(-1), z_t.to(accurate).softmax(-1)
        m = (s + t) / 2
        terms = {
            "reverse_kl": s * (s / t).log(),
            "forward_kl": t * (t / s).log(),
            "jsd": (s * (s / m).log() + t * (t / m).log()) / 2,
            "skew_reverse_kl": s * (s / m).log(),
            "skew_forward_kl": t * (t / m).log(),
        }[divergence]
        loss = terms.clamp(max=CLIP).sum(-1).mean()
        loss.backward()
        return loss.detach().double(), x.grad.double()

    exact_loss, exact_grad = plain(torch.float64)
    plain_loss, plain_grad = plain(dtype)
    x = hs.clone().requires_grad_()
    # A small workspace: several chunks, and the weight converted in several tiles.
    out = fused_step_kl(x, ht, weight, divergence=divergence, clip=CLIP, workspace_bytes=50_000)
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and x.grad.dtype == dtype
    rounding = torch.finfo(torch.float32).eps * 8
    assert abs(out.loss - exact_loss) <= 2 * abs(plain_loss - exact_loss) + rounding
    error, plain_error = ((g - exact_grad).abs().max() for g in (x.grad.double(), plain_grad))
    assert error <= 2 * plain_error + rounding * exact_grad.abs().max()
    # Beyond that: everything but the final rounding of the gradient is accurate to fp32.
    torch.testing.assert_close(out.loss.double(), exact_loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        x.grad.double(), exact_grad, rtol=torch.finfo(dtype).eps, atol=1e-4 * exact_grad.abs().max().item()
    )


def test_small_fp16_gradients_survive_until_the_loss_is_scaled():
    n = 4096
    hs, ht = randn(n, 4, dtype=torch.float16) * 0.05, randn(n, 4, seed=1, dtype=torch.float16) * 0.05
    weight = randn(8, 4, seed=2, dtype=torch.float16) * 0.05
    grads = []
    for dtype in (torch.float16, torch.float64):
        x = hs.detach().clone().to(dtype).requires_grad_()
        (fused_step_kl(x, ht.to(dtype), weight.to(dtype)).loss * 2.0**16).backward()
        grads.append(x.grad.double())
    assert grads[1].abs().max() * 2.0**-16 < torch.finfo(torch.float16).smallest_normal
    torch.testing.assert_close(*grads, rtol=2e-3, atol=1e-3 * grads[1].abs().max().item())


def test_autocast_has_no_effect():
    hs, ht, weight = (randn(*shape, dtype=torch.float32) for shape in ((5, 8), (5, 8), (20, 8)))
    ht = ht + 0.1
    grads = []
    for reduction, enabled in itertools.product(("mean", "none"), (False, True)):
        x = hs.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = fused_step_kl(x, ht, weight, reduction=reduction).loss.sum()
            loss.backward()
        grads.append((loss.detach(), x.grad))
    for outside, inside in (grads[:2], grads[2:]):
        assert inside[0].dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


def test_step_mean_weights():
    weights = step_mean_weights(torch.tensor([7, -3, 7, 7, 40]))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([1 / 9, 1 / 3, 1 / 9, 1 / 9, 1 / 3]))
    assert step_mean_weights(torch.zeros(0, dtype=torch.int64)).shape == (0,)
    # Eq. 12: the mean over steps of the mean over a step's rows.
    steps = torch.tensor([0, 0, 1, 2, 2, 2])
    out = fused_step_kl(
        randn(6, 3),
        randn(6, 3, seed=1),
        randn(9, 3, seed=2),
        row_weight=step_mean_weights(steps),
        reduction="sum",
    )
    expected = torch.stack([out.row_loss[steps == s].mean() for s in range(3)]).mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)
