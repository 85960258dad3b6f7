"""`pytest --benchmark-only` runs the benchmarks and nothing else; any other run skips them."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, results
from benchmarks.problems import DEVICE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write the benchmarks' figures")
    parser.addoption("--results", type=Path, help="file that --record adds to (default: a new one, benchmarks/results)")
    parser.addoption("--rehearse", action="store_true", help="small sizes and few rounds: figures that mean nothing")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--rehearse"):
        torch.compiler.set_stance("force_eager")  # a rehearsal has no time for compilers


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("benchmark_only"):
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="a benchmark: run pytest --benchmark-only"))


@pytest.fixture(scope="session")
def recorder(request: pytest.FixtureRequest) -> results.Recorder:
    """Writes rows if asked to."""
    option = request.config.getoption
    path = None
    if option("--record"):
        path = option("--results") or results.new_path(results.FOLDER, results.machine(DEVICE))
    return results.Recorder(path, DEVICE, rehearsal=option("--rehearse"))


@pytest.fixture(scope="session")
def fresh_process(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any] | None]:
    """Calls a function in a process whose resident memory is what is in use; None where that can't be measured."""
    if DEVICE.type != "cpu" or sys.platform != "linux" or request.config.getoption("--rehearse"):
        yield None
        return
    fresh = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, fresh, measure.prepare_memory_process, threads) as process:
        yield lambda function, *args: process.submit(function, *args).result()
