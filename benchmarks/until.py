"""A pytest plugin for runs with a deadline: no test starts after it, and each one's outcome is written as it comes.

python -m pytest -p benchmarks.until --until UNIX_SECONDS --outcomes FILE
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.problems import DEVICE
from benchmarks.results import Recorder

OUT_OF_TIME = "out of time"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--until", type=float, default=float("inf"), help="Unix time after which no test starts")
    parser.addoption("--outcomes", type=Path, help="a run's file, to which a row is added for every test")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--outcomes"):
        config.pluginmanager.register(Outcomes(Recorder(config.getoption("--outcomes"), DEVICE)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > item.config.getoption("--until"):
        pytest.skip(OUT_OF_TIME)


class Outcomes:
    """Writes what became of every test."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        row = {"part": "tests", "name": report.nodeid, "status": "ok", "seconds": report.duration}
        if report.failed:
            # A test can fail and then its cleanup, too: the first says what was wrong.
            row["status"] = f"failed: {(report.longreprtext or 'without a word').splitlines()[-1]}"
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reason = reason.removeprefix("Skipped: ")
            row["status"] = OUT_OF_TIME if reason == OUT_OF_TIME else f"skipped: {reason}"
        if all(other.get("name") != report.nodeid for other in self.recorder.rows):
            self.recorder.add([row])
