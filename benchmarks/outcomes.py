"""A pytest plugin for runs with a deadline: no test starts after it, and each one's outcome is written as it comes.

python -m pytest -p benchmarks.outcomes --until UNIX_SECONDS --outcomes FILE

Tests whose outcome the file has already are not run again. A process whose GPU is lost ends with the test that cost it:
a worker of pytest-xdist is replaced, any other process has the exit status 75.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.measure import unusable
from benchmarks.results import Recorder

OUT_OF_TIME = "out of time"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--until", type=float, default=float("inf"), help="Unix time after which no test starts")
    parser.addoption("--outcomes", type=Path, help="a run's file, to which a row is added for every test")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--outcomes"):
        config.pluginmanager.register(Outcomes(config))


class Outcomes:
    """Writes what became of every test, in the one process that is not a worker."""

    def __init__(self, config: pytest.Config) -> None:
        self.until: float = config.getoption("--until")
        self.worker = hasattr(config, "workerinput")
        self.recorder = Recorder(config.getoption("--outcomes"))
        self.done = {row["name"] for row in self.recorder.rows if row["part"] == "tests"}
        self.failed = False

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.done]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.time() > self.until:
            pytest.skip(OUT_OF_TIME)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed
        if self.worker or report.nodeid in self.done or (report.when != "call" and report.outcome == "passed"):
            return
        self.done.add(report.nodeid)  # a test can fail and then its cleanup, too: the first says what was wrong
        status = "ok"
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash is not None else report.longreprtext
            status = f"failed: {(said or 'without a word').splitlines()[0]}"
        elif report.skipped:
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            reason = reason.removeprefix("Skipped: ")
            status = reason if reason == OUT_OF_TIME else f"skipped: {reason}"
        self.recorder.add([{"part": "tests", "name": report.nodeid, "status": status, "seconds": report.duration}])

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        if self.failed and unusable():
            os._exit(75)
        self.failed = False
