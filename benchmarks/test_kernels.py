"""The ops against the bare products, eager PyTorch, torch.compile and other libraries: time and peak memory.

A round runs every provider once, so that what else the machine does hits all of them; medians are compared. No time is
asserted. The memory of the loss is, on a CPU, where it does not depend on the machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from benchmarks import measure, results
from benchmarks.problems import DEVICE, Case, Problem, cases, make_problem
from benchmarks.providers import PROVIDERS, Provider, entries, errors, providers

SECONDS = 4.0  # for the rounds of one case
ROUNDS = (3, 15)
REHEARSED_ROUNDS = (2, 2)
MEMORY_RATIO = 0.1  # promised of the loss: its peak memory against eager's

PeakMemory = Callable[[Provider, Problem, str], int | None]


@pytest.fixture(scope="session")
def peak_memory(fresh_process: Callable[..., Any] | None) -> PeakMemory:
    """Measures the peak memory of a run on this device; None where there is no way to."""
    if DEVICE.type == "cuda":
        return measure.gpu_peak_memory
    if fresh_process is None:
        return lambda *_: None
    return lambda provider, problem, phase: fresh_process(measure.cpu_peak_memory, problem.case, provider.label, phase)


def _skip_if_missing(provider: Provider, recorder: results.Recorder, case: Case) -> None:
    reason = provider.missing(DEVICE)
    if reason is not None:
        recorder.add([results.describe(case, provider, "accuracy", f"skipped: {reason}")])
        pytest.skip(f"{provider.label}: {reason}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test its cases, which are small ones in a rehearsal."""
    chosen = cases(DEVICE, metafunc.config.getoption("--rehearse"))
    if "provider" in metafunc.fixturenames:
        # One of every kind, small enough for fp64.
        small = dict.fromkeys(replace(case, rows=min(case.rows, 64)) for case in chosen)
        computed = [(case, provider) for case in small for provider in providers(case) if provider.computes]
        ids = [f"{case}-{provider.label}" for case, provider in computed]
        metafunc.parametrize(("case", "provider"), computed, ids=ids)
    elif "case" in metafunc.fixturenames:
        metafunc.parametrize("case", chosen, ids=str)


def test_accuracy(benchmark: Any, recorder: results.Recorder, case: Case, provider: Provider) -> None:
    """How far loss and gradient are from fp64. What others' roundings cost them is recorded, not judged."""
    _skip_if_missing(provider, recorder, case)
    problem = make_problem(case, DEVICE)
    found: dict[str, float] = benchmark.pedantic(errors, args=(provider, problem))
    recorder.add([{**results.describe(case, provider, "accuracy", "ok"), **found}])
    if provider.name.startswith("ours") and not provider.variant:
        assert max(found.values()) < 0.01


@dataclass
class Run:
    """One provider's runs of one phase, and what became of them."""

    provider: Provider
    phase: str
    problem: Problem
    clock: measure.Clock
    status: str = "ok"
    peak_bytes: int | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def attempt(self, action: Callable[[], None]) -> None:
        """Do something unless it has failed before; one provider's failure must not end the others' case."""
        if self.status != "ok":
            return
        self.status = measure.attempt(action)
        if self.status != "ok":
            self.problem.student.grad = None

    def warm_up(self, peak_memory: PeakMemory) -> None:
        """Compile, pay one-time costs, and measure memory."""

        def action() -> None:
            self.clock.time(self.provider, self.problem, self.phase)
            self.peak_bytes = peak_memory(self.provider, self.problem, self.phase)

        self.attempt(action)

    def sample(self) -> None:
        # Whoever takes this long is not measured any better by more rounds.
        spent = self.seconds.get(self.phase, [])
        if len(spent) >= 2 and sum(spent) > SECONDS / 2:
            return

        def action() -> None:
            for phase, seconds in self.clock.time(self.provider, self.problem, self.phase).items():
                self.seconds.setdefault(phase, []).append(seconds)

        self.attempt(action)

    def rows(self) -> list[results.Row]:
        described = results.describe(self.problem.case, self.provider, self.phase, self.status)
        if self.status != "ok":
            return [described]
        case = self.problem.case
        return [
            {
                **described,
                "phase": phase,
                **results.figures(seconds, self.peak_bytes if phase == self.phase else None),
                **(results.needs(case, phase) if self.provider.computes else {}),
            }
            for phase, seconds in self.seconds.items()
        ]


def test_speed_and_memory(
    benchmark: Any,
    recorder: results.Recorder,
    peak_memory: PeakMemory,
    case: Case,
    request: pytest.FixtureRequest,
) -> None:
    problem, clock = make_problem(case, DEVICE), measure.Clock(DEVICE)
    runs = [Run(provider, phase, problem, clock) for provider, phase in entries(case)]
    for run in runs:
        reason = run.provider.missing(DEVICE)
        if reason is not None:
            run.status = f"skipped: {reason}"
        run.warm_up(peak_memory)

    # What pytest-benchmark times is the last of ours: the Triton kernels, forward and backward, where they run.
    ours = [run for run in runs if run.provider.name.startswith("ours") and not run.provider.variant]
    timed = next((run for run in reversed(ours) if run.status == "ok"), ours[0])
    others = [run for run in runs if run is not timed]

    def run_the_others() -> None:
        for run in others:
            run.sample()

    start = time.perf_counter()
    run_the_others()
    timed.sample()
    rounds = int(SECONDS / (time.perf_counter() - start))
    low, high = REHEARSED_ROUNDS if request.config.getoption("--rehearse") else ROUNDS
    benchmark.pedantic(timed.sample, setup=run_the_others, rounds=min(max(rounds, low), high) - 1)

    rows = [row for run in runs for row in run.rows()]
    results.compare(rows)
    recorder.add(rows)
    broken = [f"{run.provider.label}: {run.status}" for run in ours if run.status.startswith("failed")]
    assert not broken, broken


@pytest.mark.skipif(DEVICE.type != "cpu" or sys.platform != "linux", reason="peak memory of a process on Linux")
def test_memory_of_the_loss_is_a_tenth_of_eager(
    benchmark: Any, recorder: results.Recorder, peak_memory: PeakMemory, request: pytest.FixtureRequest
) -> None:
    """At a size where eager's logits outweigh the workspace that ours may use."""
    if request.config.getoption("--rehearse"):
        pytest.skip("the size is what it is about")
    case = Case("step_kl", rows=1024, width=256, vocab=32768, dtype=torch.float32)
    problem = make_problem(case, DEVICE)
    eager, ours = (
        next(provider for provider in PROVIDERS["step_kl"] if provider.label == label)
        for label in ("eager", "ours torch")
    )
    peaks = {ours.label: benchmark.pedantic(peak_memory, args=(ours, problem, "both"))}
    peaks[eager.label] = peak_memory(eager, problem, "both")
    recorder.add(
        [
            {**results.describe(case, provider, "both", "ok"), "peak_bytes": peaks[provider.label]}
            for provider in (eager, ours)
        ]
    )
    assert peaks[ours.label] <= MEMORY_RATIO * peaks[eager.label]
