"""What this machine can do at most, measured: a large copy, and a large product of random matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import Clock
from benchmarks.problems import DEVICE
from benchmarks.results import CLOCKS, Recorder, Row, dtype_name, figures, query_gpu

ROUNDS = 15


def measure(recorder: Recorder, until: float, rehearsal: bool) -> bool:
    """Write both ceilings, in bytes and flops per second with the clocks they were reached at; True: nothing failed."""
    clock = Clock(DEVICE)
    cuda = DEVICE.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    size, count = (64, 1 << 16) if rehearsal else (8192, 1 << 31)
    generator = torch.Generator(DEVICE).manual_seed(0)
    # Random: a product of zeros draws less power, and runs at higher clocks.
    a, b = (torch.randn(size, size, generator=generator, device=DEVICE).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(count, dtype=dtype, device=DEVICE)
    target = torch.empty_like(source)
    actions: dict[str, tuple[Callable[[], Tensor], Row]] = {
        "copy": (lambda: target.copy_(source), {"bytes": 2 * source.numel() * source.itemsize}),
        "matmul": (lambda: torch.mm(a, b, out=product), {"flops": 2 * size**3}),
    }
    for name, (run, need) in actions.items():
        seconds = [_seconds(clock, run) for _ in range(2 if rehearsal else ROUNDS)]
        row = {"part": "ceilings", "name": name, "dtype": dtype_name(dtype), "status": "ok", **need}
        clocks = {"clocks": query_gpu(*CLOCKS)} if cuda else {}
        recorder.add([{**row, **figures(seconds[1:], None), **clocks}])  # the first warms up
    return True


def _seconds(clock: Clock, run: Callable[[], Tensor]) -> float:
    return clock.seconds(lambda _: run())[-1]
