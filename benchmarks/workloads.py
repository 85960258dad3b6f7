"""What the CPU benchmarks run: our ops, what a user would otherwise write, and the bare products.

`python -m benchmarks.workloads step_kl ours clipped` prints the peak memory of one call, in bytes beyond the
inputs, measured in that fresh process.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dopsd_kernels import fused_confidence, fused_step_kl

ROWS, WIDTH, VOCAB = 1024, 256, 32768
CLIPS = {"clipped": 0.05, "unclipped": None}


def step_kl(case: str, *, rows: int = ROWS, vocab: int = VOCAB) -> dict[str, Callable[[], object]]:
    """Return the variants of a training step's loss, forward and backward, with a frozen LM head."""
    clip = CLIPS[case]
    torch.manual_seed(0)
    weight = torch.randn(vocab, WIDTH) / WIDTH**0.5 * 3
    teacher = torch.randn(rows, WIDTH)
    student = (teacher + 0.3 * torch.randn(rows, WIDTH)).requires_grad_()

    def ours() -> None:
        student.grad = None
        fused_step_kl(student, teacher, weight, clip=clip).loss.backward()

    def eager() -> None:
        student.grad = None
        with torch.no_grad():
            log_t = (teacher @ weight.T).log_softmax(-1)
        log_s = (student @ weight.T).log_softmax(-1)
        contributions = log_s.exp() * (log_s - log_t)
        if clip is not None:
            contributions = contributions.clamp(max=clip)
        contributions.sum(-1).mean().backward()

    def floor() -> Tensor:
        with torch.no_grad():
            student @ weight.T
            logits = teacher @ weight.T
            return logits @ weight

    return {"ours": ours, "eager": eager, "floor": floor}


def confidence(case: str, *, vocab: int = VOCAB) -> dict[str, Callable[[], object]]:
    """Return the variants of a decoder's question: which token for each of `case` rows, and how probable."""
    torch.manual_seed(0)
    weight = torch.randn(vocab, WIDTH) / WIDTH**0.5 * 3
    hidden = torch.randn(int(case), WIDTH)

    def ours() -> object:
        return fused_confidence(hidden, weight)

    def eager() -> object:
        return (hidden @ weight.T).softmax(-1).max(-1)

    def floor() -> object:
        return hidden @ weight.T

    return {"ours": ours, "eager": eager, "floor": floor}


OPS = {"step_kl": step_kl, "confidence": confidence}


def _status(field: str) -> int:
    kib = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert kib is not None
    return int(kib[1]) * 1024


def peak_memory(run: Callable[[], object]) -> int:
    """Return how far the resident memory rises above its present level during a call (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


if __name__ == "__main__":
    op, variant, case = sys.argv[1:]
    # One-time costs of libraries and threads are not the call's.
    OPS[op](case, vocab=64)[variant]()
    print(peak_memory(OPS[op](case)[variant]))
