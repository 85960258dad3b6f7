"""Who computes the ops: the bare products, eager PyTorch, torch.compile, other libraries, and ours.

Other libraries are asked for their reverse KL: a JSD with beta 1 in both Liger and TRL. They run as their own trainers
call them, on logits of the operands' dtype if they round them to it; `errors` tells what that costs.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems import Case, Problem
from dopsd_kernels import fused_confidence, fused_step_kl, reference
from dopsd_kernels.backends import triton_unsupported
from dopsd_kernels.contracts import StepKLOptions

# Of the rows' gradient with respect to their own logits, whose largest entries are about 0.003 in peaked rows. What it
# changes there is as large as what the rounding of the gradient to bfloat16 changes: 0.2 % (see `errors`). Where the
# other tokens' probabilities fall as 1 / id instead of 1 / id^2 it would be tens of percent.
GRAD_THRESHOLD = 1e-4
# Logits of one of the floor's products.
_FLOOR_BYTES = 1 << 30


def _autograd(_problem: Problem, loss: Tensor) -> None:
    loss.backward()


@dataclass(frozen=True)
class Provider:
    """One way to compute an op: a forward, and a backward that takes what the forward returned."""

    name: str
    forward: Callable[[Problem], Any]
    backward: Callable[[Problem, Any], None] = _autograd
    variant: str = ""
    applies: Callable[[Case], bool] = lambda case: True
    missing: Callable[[torch.device], str | None] = lambda device: None  # why it cannot run here
    gradient_in_forward: bool = False  # its backward only multiplies
    computes: bool = True  # False: the work, but not the op

    @property
    def label(self) -> str:
        return f"{self.name} {self.variant}".strip()


def providers(case: Case) -> list[Provider]:
    """Return the providers that compute a case's op with its settings."""
    return [provider for provider in PROVIDERS[case.op] if provider.applies(case)]


def entries(case: Case) -> list[tuple[Provider, str]]:
    """Return who is timed in which phase: "forward" without a gradient, and "both", forward and backward."""
    if case.op == "confidence":
        return [(provider, "forward") for provider in providers(case)]
    # The variants differ in their gradient alone.
    forward = [(provider, "forward") for provider in providers(case) if not provider.variant]
    return forward + [(provider, "both") for provider in providers(case)]


def run(provider: Provider, problem: Problem, phase: str, between: Callable[[], None] = lambda: None) -> None:
    """Run a phase once; `between` is called between forward and backward."""
    if phase == "forward":
        with torch.no_grad():
            provider.forward(problem)
        return
    problem.student.grad = None
    state = provider.forward(problem)
    between()
    provider.backward(problem, state)


def errors(provider: Provider, problem: Problem) -> dict[str, float]:
    """Return the relative errors of a provider's results against the fp64 reference."""
    hidden, weight = problem.student.detach().double(), problem.weight.double()
    if problem.case.op == "confidence":
        exact = reference.confidence(hidden, weight)
        expected = (exact.max_logit - exact.logsumexp).exp()
        return {"probability_error": _relative_error(provider.forward(problem)[0], expected)}
    hidden.requires_grad_()
    options = StepKLOptions(clip=problem.case.clip)
    exact_loss = reference.step_kl(hidden, problem.teacher.double(), weight, options=options).loss
    exact_loss.backward()
    problem.student.grad = None
    loss = provider.forward(problem)
    loss.backward()
    assert problem.student.grad is not None and hidden.grad is not None
    return {
        "loss_error": _relative_error(loss.detach(), exact_loss.detach()),
        "gradient_error": _relative_error(problem.student.grad, hidden.grad),
    }


def _relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


# The bare products, in the operands' dtype and in chunks of rows, so that memory is no limit: two for a loss (student
# and teacher share the weight, and so one product of 2N rows), a third for the gradient of the hidden states. They
# write their logits to memory: an op that keeps tiles in a cache can be faster.


def _products(hidden: Tensor, weight: Tensor) -> Tensor:
    """Multiply all rows; return the buffer of one chunk's logits."""
    chunk_rows = max(1, min(len(hidden), _FLOOR_BYTES // (len(weight) * weight.itemsize)))
    buffer = hidden.new_empty(chunk_rows, len(weight))
    for chunk in hidden.split(chunk_rows):
        torch.mm(chunk, weight.T, out=buffer[: len(chunk)])
    return buffer


def _floor_step_kl(problem: Problem) -> Tensor:
    return _products(torch.cat([problem.student.detach(), problem.teacher]), problem.weight)


def _floor_gradient(problem: Problem, buffer: Tensor) -> None:
    gradient = torch.empty_like(problem.student)
    for chunk in gradient.detach().split(len(buffer)):
        torch.mm(buffer[: len(chunk)], problem.weight, out=chunk)


# Whole logits, with fp32 softmaxes.


def _reverse_kl(student: Tensor, teacher: Tensor, weight: Tensor, clip: float | None) -> Tensor:
    with torch.no_grad():
        log_t = (teacher @ weight.T).float().log_softmax(-1)
    log_s = (student @ weight.T).float().log_softmax(-1)
    contributions = log_s.exp() * (log_s - log_t)
    if clip is not None:
        contributions = contributions.clamp(max=clip)
    return contributions.sum(-1).mean()


def _eager_step_kl(problem: Problem) -> Tensor:
    return _reverse_kl(problem.student, problem.teacher, problem.weight, problem.case.clip)


_compiled_reverse_kl = functools.cache(lambda: torch.compile(_reverse_kl))


def _compiled_step_kl(problem: Problem) -> Tensor:
    for rows in (problem.student, problem.teacher):
        torch._dynamo.maybe_mark_dynamic(rows, 0)  # one compilation for every N
    return _compiled_reverse_kl()(problem.student, problem.teacher, problem.weight, problem.case.clip)


def _eager_confidence(problem: Problem) -> Any:
    return (problem.student @ problem.weight.T).float().softmax(-1).max(-1)


def no_compiler(device: torch.device) -> str | None:
    """Return why torch.compile cannot be used, or None if it can."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler on a CPU, and there is no g++ (or $CXX)"
    return None


# Other libraries.


def _liger(problem: Problem) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    weight = problem.weight
    return LigerFusedLinearJSD(jsd_beta=1.0)(problem.student, weight, problem.teacher, weight, None)


def _liger_chunked(problem: Problem) -> Tensor:
    """Liger's chunked loss, which has no Triton; it always computes the weight's gradient, a fourth product."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    weight, device = problem.weight, problem.weight.device
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=no_compiler(device) is None
    )
    labels = torch.zeros(len(problem.student), dtype=torch.long, device=device)
    return loss(problem.student, weight, problem.teacher, weight, labels)


def _trl(problem: Problem) -> Tensor:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher_logits = problem.teacher @ problem.weight.T
    return GKDTrainer.generalized_jsd_loss(problem.student @ problem.weight.T, teacher_logits, beta=1.0)


def _not_installed(package: str, module: str) -> Callable[[torch.device], str | None]:
    def missing(device: torch.device) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed: pip install {package}"
        return None

    return missing


def _no_liger(device: torch.device) -> str | None:
    if device.type == "cpu":
        return "Liger's fused_linear_jsd is a Triton kernel and needs a GPU"
    return _not_installed("liger-kernel", "liger_kernel")(device)


def _unclipped(case: Case) -> bool:
    return case.clip is None


def _peaked(case: Case) -> bool:
    return case.data == "peaked"


# Ours.


def _our_step_kl(backend: str, **options: Any) -> Callable[[Problem], Tensor]:
    def forward(problem: Problem) -> Tensor:
        student, teacher, weight = problem.student, problem.teacher, problem.weight
        return fused_step_kl(student, teacher, weight, clip=problem.case.clip, backend=backend, **options).loss

    return forward


def _our_confidence(backend: str, **options: Any) -> Callable[[Problem], Any]:
    def forward(problem: Problem) -> Any:
        output = fused_confidence(problem.student, problem.weight, backend=backend, **options)
        return (output.logit - output.logsumexp).exp(), output.token

    return forward


def _ours(backend: str) -> tuple[list[Provider], list[Provider]]:
    name = f"ours {backend}"

    def missing(device: torch.device) -> str | None:
        if backend == "torch":
            return None
        if device.type == "cpu":
            return "Triton kernels need a GPU; their interpreter is for tests"
        return triton_unsupported([torch.empty(0, device=device)])

    plain = Provider(name, _our_step_kl(backend), missing=missing, gradient_in_forward=True)
    thresholded = Provider(
        name,
        _our_step_kl(backend, grad_threshold=GRAD_THRESHOLD),
        variant=f"grad_threshold={GRAD_THRESHOLD:g}",
        applies=_peaked,
        missing=missing,
        gradient_in_forward=True,
    )
    confidence = [
        Provider(
            name,
            _our_confidence(backend, **options),
            variant=variant,
            missing=missing,
            computes="temperature" not in options,  # a sample's probability is another one
        )
        for variant, options in (
            ("", {}),
            ("top_k=20", {"top_k": 20}),
            ("temperature=1", {"temperature": 1.0, "seed": 0}),
        )
    ]
    return [plain, thresholded], confidence


_torch_step_kl, _torch_confidence = _ours("torch")
_triton_step_kl, _triton_confidence = _ours("triton")
_no_chunked_liger = _not_installed("liger-kernel", "liger_kernel")

PROVIDERS = {
    "step_kl": [
        Provider("floor", _floor_step_kl, _floor_gradient, computes=False),
        Provider("eager", _eager_step_kl),
        Provider("compile", _compiled_step_kl, missing=no_compiler),
        Provider("liger", _liger, applies=_unclipped, missing=_no_liger, gradient_in_forward=True),
        Provider(
            "liger chunked", _liger_chunked, applies=_unclipped, missing=_no_chunked_liger, gradient_in_forward=True
        ),
        Provider("trl", _trl, applies=_unclipped, missing=_not_installed("trl", "trl")),
        *_torch_step_kl,
        *_triton_step_kl,
    ],
    "confidence": [
        Provider("floor", lambda problem: _products(problem.student, problem.weight), computes=False),
        # What limits a few rows is not arithmetic but one reading of the weight.
        Provider("read weight", lambda problem: problem.weight.sum(), computes=False),
        Provider("eager", _eager_confidence),
        *_torch_confidence,
        *_triton_confidence,
    ],
}
