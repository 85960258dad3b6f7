"""`pytest --benchmark-only` runs the benchmarks and nothing else; any other run leaves them out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.results import FOLDER, Recorder, new_path

ROWS = pytest.StashKey[Recorder]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write the benchmarks' figures")
    parser.addoption("--rehearse", action="store_true", help="small sizes and few rounds: figures that mean nothing")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_only", False):
        if config.getoption("--rehearse"):
            torch.compiler.set_stance("force_eager")  # a rehearsal has no time for compilers
        # In brackets are multiples of a column's least, which is mostly the floor's; a mean over few rounds says less.
        if not any(argument.startswith("--benchmark-columns") for argument in config.invocation_params.args):
            config.option.benchmark_columns = ["median", "min", "max", "rounds"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("benchmark_only", False):
        ours = [item for item in items if Path(__file__).parent in item.path.parents]
        config.hook.pytest_deselected(items=ours)
        items[:] = [item for item in items if item not in ours]


@pytest.fixture(scope="session")
def recorder(request: pytest.FixtureRequest) -> Recorder:
    """Holds the rows, and writes them if asked to."""
    path = new_path(FOLDER) if request.config.getoption("--record") else None
    return request.config.stash.setdefault(ROWS, Recorder(path, request.config.getoption("--rehearse")))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Ours against the others, and who is missing."""
    from benchmarks.report import absent, ratios

    if ROWS in config.stash and (lines := ratios(config.stash[ROWS].rows)):
        terminalreporter.section("our time, and over the others' (plain: eager or concatenated)")
        widths = [max(map(len, column)) for column in zip(lines[0], *(line.values() for line in lines), strict=True)]
        for line in (list(lines[0]), *(list(line.values()) for line in lines)):
            cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
            terminalreporter.write_line("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
        for reason in absent(config.stash[ROWS].rows):
            terminalreporter.write_line(f"not run: {reason}")
