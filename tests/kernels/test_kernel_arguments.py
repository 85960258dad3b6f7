"""Every bad argument is refused with one sentence that names it."""

import importlib.util
import inspect
import math
import re
import types
from typing import get_args

import pytest
import torch

import dopsd_kernels
from dopsd_kernels import (
    StepKLLoss,
    fused_confidence,
    fused_step_kl,
    fused_token_logprob,
    step_kl_from_logits,
    step_mean_weights,
)
from dopsd_kernels.common import backends, configs

H, W, B, Z = torch.zeros(2, 3, 4), torch.zeros(8, 4), torch.zeros(8), torch.zeros(2, 3, 8)
ROWS, IDS = torch.ones(6), torch.arange(6).reshape(2, 3)


def meta(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, device="meta")


STEP_KL = {
    "student_hidden": [[1.0], H.long(), torch.tensor(1.0), torch.zeros(2, 3, 5)],
    "teacher_hidden": [
        None, H.long(), torch.zeros(3, 2, 4), torch.zeros(2, 3, 5), H.clone().requires_grad_(), meta(2, 3, 4)
    ],
    "weight": [None, W.int(), torch.zeros(4), torch.zeros(0, 4), meta(8, 4)],
    "teacher_weight": [W.int(), torch.zeros(7, 4), torch.zeros(4), W.clone().requires_grad_(), meta(8, 4)],
    "bias": [0.0, torch.zeros(8).long(), torch.zeros(7), torch.zeros(8, 1), meta(8)],
    "teacher_bias": [torch.zeros(8).long(), torch.zeros(9), torch.zeros(8).requires_grad_(), meta(8)],
    "row_weight": [
        [1.0] * 6, ROWS.long(), ROWS[:5], torch.ones(3, 2), -ROWS, ROWS * torch.nan, ROWS * torch.inf,
        ROWS.clone().requires_grad_(), meta(6),
    ],
    "divergence": ["kl", None],
    "beta": [0, 0.0, 1.0, -0.1, float("nan"), "0.5", True],
    "clip": [-0.01, float("inf"), float("nan"), "0.05"],
    "clip_form": ["one-sided", None],
    "top_k": [0, 9, -1, 2.0, True],
    "tail": ["drop"],
    "temperature": [0.0, -1.0, float("inf"), float("nan"), None],
    "reduction": ["batchmean", None],
    "workspace_bytes": [0, 63, 1e6, "64 MiB"],
    "vocab_group": ["tp", 0],
    "check_finite": [1, None],
    "backend": ["cuda", None],
}  # fmt: skip
CONFIDENCE = {
    "hidden": [None, H.long(), torch.tensor(1.0), torch.zeros(2, 3, 5)],
    "weight": [None, W.int(), torch.zeros(4), torch.zeros(0, 4), meta(8, 4)],
    "bias": [torch.zeros(8).long(), torch.zeros(7), meta(8)],
    "temperature": [-0.1, float("inf"), float("nan"), None],
    "seed": [None, 1.0, True, 1 << 63, torch.zeros(6).long(), torch.zeros(2, 3), meta(2, 3).long()],
    "top_k": [-1, 9, 1.0],
    "exclude": [(8,), (-1,), (1.0,), range(8)],
    "backend": ["cuda", None],
}  # fmt: skip
TOKEN_LOGPROB = {
    "hidden": [None, H.long(), torch.tensor(1.0), torch.zeros(2, 3, 5)],
    "weight": [None, W.int(), torch.zeros(4), torch.zeros(0, 4), meta(8, 4)],
    "tokens": [
        None, IDS.int(), IDS.float(), IDS.T, IDS[0], IDS[..., None, None], IDS + 3, IDS - 1, meta(2, 3).long(), IDS + 2
    ],
    "bias": [torch.zeros(8).long(), torch.zeros(7), meta(8)],
    "exclude": [(8,), (-1,), (1.0,), range(8)],
    "temperature": [0.0, -0.1, float("inf"), float("nan"), None],
    "workspace_bytes": [0, 63, 1e6],
    "vocab_group": ["tp"],
    "check_finite": [1],
    "backend": ["cuda", None],
}  # fmt: skip


def cases(table):
    return [
        pytest.param(name, value, id=f"{name}-{i}") for name, values in table.items() for i, value in enumerate(values)
    ]


def refused(op, name, arguments):
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
        op(**arguments)
    message = str(caught.value)
    assert re.search(rf"\b{name}\b", message), message
    assert message.endswith(".") and "\n" not in message and not re.search(r"\. [A-Z]", message), message


@pytest.mark.parametrize(("name", "value"), cases(STEP_KL))
def test_fused_step_kl_refuses(name, value):
    good = dict(student_hidden=H, teacher_hidden=H, weight=W)
    fused_step_kl(**good)
    refused(fused_step_kl, name, good | {name: value})


@pytest.mark.parametrize(("name", "value"), cases(CONFIDENCE))
def test_fused_confidence_refuses(name, value):
    good = dict(hidden=H, weight=W, temperature=1.0, seed=1)
    fused_confidence(**good)
    refused(fused_confidence, name, good | {name: value})


@pytest.mark.parametrize(("name", "value"), cases(TOKEN_LOGPROB))
def test_fused_token_logprob_refuses(name, value):
    good = dict(hidden=H, weight=W, tokens=IDS, exclude=(7,))
    fused_token_logprob(**good)
    refused(fused_token_logprob, name, good | {name: value})


def test_bad_tokens_are_named():
    with pytest.raises(ValueError, match=r"tokens holds -1, 7, 9, but must hold ids from 0 to 7 and not in exclude\."):
        fused_token_logprob(H[0], W, torch.tensor([[0, 9], [-1, 3], [7, 7]]), exclude=[7])


def test_numbers_may_change_between_calls_of_a_compiled_function():
    # From the second value on they are symbols.
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))

    def together(hidden, temperature, clip):
        options = dict(temperature=temperature, clip=clip)
        step_kl = fused_step_kl(hidden, -hidden.detach(), weight, **options).loss
        from_logits = step_kl_from_logits(hidden @ weight.T, -hidden.detach() @ weight.T, beta=clip, **options).loss
        sure = fused_confidence(hidden, weight, temperature=temperature, seed=1).logit
        return step_kl + from_logits + sure.sum()

    torch._dynamo.reset()
    compiled = torch.compile(together, backend="aot_eager", fullgraph=True)
    for numbers in ((1.0, 0.05), (0.7, 0.02), (1.3, 0.1)):
        a, b = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        ours, eager = compiled(a, *numbers), together(b, *numbers)
        torch.testing.assert_close(ours, eager)
        torch.testing.assert_close(torch.autograd.grad(ours, a), torch.autograd.grad(eager, b))


def test_top_k_counts_what_can_be_chosen():
    assert fused_confidence(H, W, exclude=(1, 2), top_k=6).top_indices.shape == (2, 3, 6)
    refused(fused_confidence, "top_k", dict(hidden=H, weight=W, exclude=(1, 2), top_k=7))


@pytest.mark.parametrize("step_ids", [[1, 2], torch.zeros(3), torch.zeros(3).bool(), torch.zeros(2, 2).long()])
def test_step_mean_weights_refuses(step_ids):
    refused(step_mean_weights, "step_ids", dict(step_ids=step_ids))


def test_the_smallest_workspace_is_named_and_enough():
    for dtype in (torch.float32, torch.bfloat16):
        arguments = dict(
            student_hidden=H.clone().to(dtype).requires_grad_(),
            teacher_hidden=H.to(dtype),
            weight=W.to(dtype),
        )
        with pytest.raises(ValueError, match=r"workspace_bytes is 100,.* needs at least") as caught:
            fused_step_kl(**arguments, workspace_bytes=100)
        floor = int(re.search(r"at least (\d+)", str(caught.value))[1])
        fused_step_kl(**arguments, workspace_bytes=floor).loss.backward()
        refused(fused_step_kl, "workspace_bytes", arguments | {"workspace_bytes": floor - 1})


FROM_LOGITS = {
    "student_logits": [None, Z.long(), torch.tensor(1.0), torch.zeros(2, 3, 0)],
    "teacher_logits": [None, Z[:1], Z[..., :7], Z.clone().requires_grad_(), meta(2, 3, 8)],
    "row_weight": [ROWS[:5], -ROWS],
    "workspace_bytes": [0, 63],
    **{
        name: STEP_KL[name]
        for name in ("divergence", "beta", "clip", "clip_form", "top_k", "tail", "temperature", "reduction", "backend")
    },
}


@pytest.mark.parametrize(("name", "value"), cases(FROM_LOGITS))
def test_step_kl_from_logits_refuses(name, value):
    good = dict(student_logits=Z, teacher_logits=Z)
    step_kl_from_logits(**good)
    refused(step_kl_from_logits, name, good | {name: value})


@pytest.mark.parametrize("op", [fused_step_kl, fused_token_logprob, step_kl_from_logits])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_check_finite_names_the_tensor(op, value):
    tensors = {
        fused_step_kl: dict(student_hidden=H, teacher_hidden=H, weight=W, teacher_weight=W, bias=B, teacher_bias=B),
        fused_token_logprob: dict(hidden=H, weight=W, bias=B, tokens=IDS),
        step_kl_from_logits: dict(student_logits=Z, teacher_logits=Z),
    }[op]
    op(**tensors, check_finite=True)
    for name, tensor in tensors.items():
        if name == "tokens":
            continue
        broken = tensor.clone()
        broken.view(-1)[-1] = value
        if name.endswith("bias") and value == -math.inf:
            op(**tensors | {name: broken}, check_finite=True)
        else:
            refused(op, name, tensors | {name: broken, "check_finite": True})
        op(**tensors | {name: broken})


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (fused_step_kl, dict(student_hidden=H, teacher_hidden=H, weight=W)),
        (step_kl_from_logits, dict(student_logits=Z, teacher_logits=Z)),
        (fused_confidence, dict(hidden=H, weight=W)),
        (fused_token_logprob, dict(hidden=H, weight=W, tokens=IDS)),
    ],
)
def test_triton_is_refused_where_it_cannot_run(op, arguments, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(op, "backend", arguments | {"backend": "triton"})
    op(**arguments, backend="auto")
    monkeypatch.setattr(backends, "_triton_installed", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refused(op, "triton", arguments | {"backend": "triton"})
    op(**arguments, backend="auto")


def test_an_architecture_without_kernels_is_named(monkeypatch):
    elsewhere = torch.empty(0, device="meta")
    assert re.fullmatch(r"there are kernels for sm_80, .* but not for meta", backends.triton_unsupported([elsewhere]))
    assert backends.choose_backend("auto", [elsewhere]) == "torch"
    for properties, hip, expected in (
        (dict(major=9, minor=0), None, "sm_90"),
        (dict(major=8, minor=9), None, "sm_120"),
        (dict(major=7, minor=5), None, None),
        (dict(gcnArchName="gfx942:sramecc+:xnack-"), "7.0", "gfx942"),
        (dict(gcnArchName="gfx1100"), "7.0", None),
    ):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d, p=properties: types.SimpleNamespace(**p))
        configs.family.cache_clear()
        assert configs.family(torch.device("cuda", 0)) == expected
    configs.family.cache_clear()


def test_the_module_is_the_op():
    options = dict(divergence="jsd", beta=0.3, clip=0.05, top_k=3, tail="bucket", temperature=0.7, reduction="sum")
    module, tensors = StepKLLoss(**options), dict(bias=B, row_weight=ROWS)
    teacher = H + 1
    for ours, theirs in zip(
        module(H, teacher, W, **tensors), fused_step_kl(H, teacher, W, **tensors, **options), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert "clip=0.05" in repr(module) and not list(module.parameters())
    parameters = inspect.signature(fused_step_kl).parameters
    own = inspect.signature(StepKLLoss).parameters | inspect.signature(StepKLLoss.forward).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        name: p.default for name, p in own.items() if name != "self"
    }


# What fits depends on the tensors.
LATER = {("top_k", 9), ("workspace_bytes", 63)}
AT_ONCE = [(name, value) for name in StepKLLoss().options for value in STEP_KL[name] if (name, value) not in LATER]


@pytest.mark.parametrize(("name", "value"), AT_ONCE)
def test_the_module_refuses_options_at_once(name, value):
    refused(StepKLLoss, name, {name: value})


def test_the_public_names():
    assert sorted(dopsd_kernels.__all__) == [
        "ConfidenceOutput",
        "LoraLinear",
        "StepKLLoss",
        "StepKLOutput",
        "TokenLogprob",
        "fused_confidence",
        "fused_step_kl",
        "fused_token_logprob",
        "lora_linears",
        "lora_swiglu",
        "prefix_attention",
        "step_kl_from_logits",
        "step_mean_weights",
    ]


def test_every_table_has_the_same_divergences() -> None:
    from dopsd_kernels.reference import _SLOPE
    from dopsd_kernels.step_kl import Divergence
    from dopsd_kernels.step_kl.divergences import DIVERGENCES

    assert tuple(DIVERGENCES) == get_args(Divergence) == tuple(_SLOPE)
    if importlib.util.find_spec("triton"):
        kernels = importlib.import_module("dopsd_kernels.step_kl.divergence_kernels")
        assert tuple(kernels.DIVERGENCES) == tuple(DIVERGENCES)
    with pytest.raises(ValueError, match=r"divergence is 'kl', but must be one of 'reverse_kl', .*'skew_forward_kl'"):
        fused_step_kl(H, H, W, divergence="kl")
