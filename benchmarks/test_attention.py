"""Attention over shared prefixes, against copies of the prefix and against flex_attention: time and peak memory.

A round runs every provider once, so that what else the machine does hits all of them. No time is asserted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import attention, measure, results
from benchmarks.problems import DEVICE

SECONDS = 2.0  # for the rounds of one shape and phase
ROUNDS = (3, 15)
REHEARSED_ROUNDS = (2, 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every shape, small ones in a rehearsal."""
    shapes = attention.shapes(DEVICE, metafunc.config.getoption("--rehearse"))
    metafunc.parametrize("shape", shapes, ids=lambda shape: f"T{shape.length}-P{shape.prefix}")


@pytest.mark.parametrize("phase", ["forward", "both"])
def test_attention(
    benchmark: Any,
    recorder: results.Recorder,
    fresh_process: Callable[..., Any] | None,
    shape: attention.Shape,
    phase: str,
    request: pytest.FixtureRequest,
) -> None:
    def peak_memory(trial: attention.Trial) -> int | None:
        if DEVICE.type == "cuda":
            return measure.gpu_peak(trial.run)
        if fresh_process is None:
            return None
        return fresh_process(attention.cpu_peak_memory, shape, dtype, trial.provider, phase)

    rehearsal = request.config.getoption("--rehearse")
    dtype = torch.bfloat16 if DEVICE.type == "cuda" and not rehearsal else torch.float32
    inputs, clock = shape.tensors(dtype, DEVICE), measure.Clock(DEVICE)
    trials = [attention.Trial(provider, shape, inputs, phase) for provider in attention.PROVIDERS]
    for trial in trials:
        trial.warm_up(peak_memory)

    # What pytest-benchmark times is the first of ours that runs: the Triton kernels where they do.
    ours = [trial for trial in trials if trial.provider.startswith("ours")]
    timed = next((trial for trial in ours if trial.status == "ok"), ours[-1])
    others = [trial for trial in trials if trial is not timed]

    def run_the_others() -> None:
        for trial in others:
            trial.sample(clock)

    start = time.perf_counter()
    run_the_others()
    timed.sample(clock)
    rounds = int(SECONDS / (time.perf_counter() - start))
    low, high = REHEARSED_ROUNDS if rehearsal else ROUNDS
    benchmark.pedantic(timed.sample, args=(clock,), setup=run_the_others, rounds=min(max(rounds, low), high) - 1)

    rows = [trial.row() for trial in trials]
    results.compare(rows)
    recorder.add(rows)
    broken = [f"{trial.provider}: {trial.status}" for trial in ours if trial.status.startswith("failed")]
    assert not broken, broken
