"""The ops against the bare products, straightforward code, torch.compile and other libraries: time, memory and error.

A case's providers are timed together, in rounds that each run all of them once; pytest-benchmark is then told of every
provider what was measured, by a clock that a replayed run advances. No time is asserted.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from benchmarks.case import Case
from benchmarks.measure import measure_case
from benchmarks.ops import OPS, cases, providers
from benchmarks.results import DEVICE

_NOW = [0.0]  # of the clock


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every provider that is here, in the order in which they are measured."""
    chosen = [
        pytest.param(case, name, id=f"{case}, {name}".replace(" = ", "=").replace(", ", "-").replace(" ", "_"))
        for case in cases(DEVICE, metafunc.config.getoption("--rehearse"))
        for name in providers(case)
        if OPS[case.op].providers[name].missing(DEVICE) is None
    ]
    metafunc.parametrize(("case", "provider"), chosen)


@functools.lru_cache(1)  # it holds the case's tensors
def measured(case: Case, rehearsal: bool) -> tuple[Any, ...]:
    """The rows and the trials of a case, which is measured once."""
    return measure_case(case, providers(case), rehearsal, (0.0, 2, 2) if rehearsal else (0.6, 3, 15))


@pytest.mark.benchmark(timer=lambda: _NOW[0])
def test_op(benchmark: Any, recorder: Any, request: pytest.FixtureRequest, case: Case, provider: str) -> None:
    rows, trials = measured(case, request.config.getoption("--rehearse"))
    recorder.add(recorder.new(rows))
    row, trial = next((row, trial) for row, trial in zip(rows, trials, strict=True) if row["provider"] == provider)
    benchmark.group, benchmark.name = str(case), provider
    if trial.status != "ok":
        (pytest.fail if provider.startswith("ours") else pytest.skip)(trial.status)
    left = iter(trial.times)

    def replay() -> None:
        _NOW[0] += next(left)[0]

    benchmark.pedantic(replay, rounds=len(trial.times))
    benchmark.extra_info |= {name: row[name] for name in ("error", "peak_bytes", "host_ms") if name in row}
    if provider.startswith("ours"):
        assert row["error"] < 0.01
