"""`pytest --benchmark-only` runs the benchmarks and nothing else; any other run skips them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


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
