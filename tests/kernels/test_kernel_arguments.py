"""Every bad argument is refused with one sentence that names it."""

import re

import pytest
import torch

import dopsd_kernels
from dopsd_kernels import fused_confidence, fused_step_kl, step_mean_weights

H, W = torch.zeros(2, 3, 4), torch.zeros(8, 4)
ROWS = torch.ones(6)


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
    "grad_threshold": [-1e-9, float("nan"), None],
    "workspace_bytes": [0, 63, 1e6, None],
    "backend": ["cuda", "triton", None],
}  # fmt: skip
CONFIDENCE = {
    "hidden": [None, H.long(), torch.tensor(1.0), torch.zeros(2, 3, 5)],
    "weight": [None, W.int(), torch.zeros(4), torch.zeros(0, 4), meta(8, 4)],
    "bias": [torch.zeros(8).long(), torch.zeros(7), meta(8)],
    "temperature": [-0.1, float("inf"), float("nan"), None],
    "seed": [None, 1.0, True, 1 << 63, torch.zeros(6).long(), torch.zeros(2, 3), meta(2, 3).long()],
    "top_k": [-1, 9, 1.0],
    "exclude": [(8,), (-1,), (1.0,), range(8)],
    "backend": ["cuda", "triton"],
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


def test_both_backends_of_this_version_are_one():
    assert torch.equal(fused_step_kl(H, H, W, backend="torch").loss, fused_step_kl(H, H, W, backend="auto").loss)
    with pytest.raises(NotImplementedError, match='use "auto" or "torch"'):
        fused_step_kl(H, H, W, backend="triton")


def test_the_public_names():
    names = ["ConfidenceOutput", "StepKLOutput", "fused_confidence", "fused_step_kl", "step_mean_weights"]
    assert sorted(dopsd_kernels.__all__) == names
