"""The ops against the bare products, straightforward code, torch.compile and other libraries: time, memory and error.

A case's providers are timed together, in rounds that each run all of them once; pytest-benchmark is then told of every
provider what was measured. No time is asserted.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

import pytest

from benchmarks import kernels, measure
from benchmarks.measure import DEVICE, Trial
from benchmarks.ops import Case, Provider, cases
from benchmarks.results import Recorder


class Replay:
    """A clock that a run advances by what was measured."""

    def __init__(self) -> None:
        self.now = 0.0
        self.left: Iterator[measure.Times] = iter(())

    def read(self) -> float:
        return self.now

    def run(self) -> None:
        self.now += next(self.left).device


REPLAY = Replay()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every provider that is here, in the order in which they are measured."""
    chosen = [
        pytest.param(case, place, id=f"{case}, {provider.name}".replace(", ", "-").replace(" ", "_"))
        for case in cases(DEVICE, metafunc.config.getoption("--rehearse"))
        for place, provider in enumerate(case.providers())
        if provider.missing(DEVICE) is None
    ]
    metafunc.parametrize(("case", "place"), chosen)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest, recorder: Recorder) -> Iterator[Any]:
    """Measures a case, once."""
    rehearsal = request.config.getoption("--rehearse")
    limits = kernels.ceilings(rehearsal)
    known: dict[Case, tuple[list[Provider], list[Any], list[Trial]]] = {}

    def find(process: Executor | None, case: Case) -> tuple[list[Provider], list[Any], list[Trial]]:
        if case not in known:
            rounds = (2, 2) if rehearsal else (3, 15)
            rows, trials = kernels.measure_case(case, case.providers(), limits, process, 1.0, rounds)
            recorder.add(rows)
            known[case] = case.providers(), rows, trials
        return known[case]

    with measure.fresh_process() as process:
        yield lambda case: find(None if rehearsal else process, case)


@pytest.mark.benchmark(timer=REPLAY.read)
def test_op(benchmark: Any, measured: Any, case: Case, place: int) -> None:
    providers, rows, trials = measured(case)
    provider, row, trial = providers[place], rows[place], trials[place]
    benchmark.group, benchmark.name = str(case), provider.name
    if trial.status != "ok":
        (pytest.fail if provider.name.startswith("ours") else pytest.skip)(trial.status)
    REPLAY.left = iter(trial.times)
    benchmark.pedantic(REPLAY.run, rounds=len(trial.times))
    benchmark.extra_info |= {name: row[name] for name in ("error", "peak_bytes", "host_ms") if name in row}
    if provider.name.startswith("ours"):
        assert row["error"] < 0.01
