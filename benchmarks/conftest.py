"""`pytest --benchmark-only` runs the benchmarks and nothing else; any other run skips them."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write the benchmarks' figures, in place of older ones")
    parser.addoption("--results", type=Path, help="where --record writes (default: benchmarks/results)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("benchmark_only"):
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="a benchmark: run pytest --benchmark-only"))
