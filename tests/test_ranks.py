"""What a process of several takes for the reason why its run ends; processes of their own are in test_distributed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from datetime import timedelta

import pytest

from dopsd.errors import Interrupted, RunError, UsageError
from dopsd.ranks import GRACE, LOST, SIGNALS, End, Ranks

SILENT = "nothing has been heard of process {} of 3 for {} s"
ENDED = "process {} of 3 ended the run: {}"
FIRM, SIGTERM, CLOSED = End(2, "a bad row", 0), End(143, "stopped by SIGTERM", 1), End(1, "connection closed", 2)
RELAYED = End(1, ENDED.format(2, "a bad row"), 3)


@pytest.fixture
def first() -> Iterator[Ranks]:
    """The first of three processes, which gives others up after 60 s; without its threads."""
    ranks = Ranks(timedelta(seconds=60), lambda: "checkpoint-1 is left")
    ranks.rank, ranks.world, ranks.silent = 0, 3, {1: 0.0, 2: 0.0}
    ranks.said.set()
    before = [signal.getsignal(number) for number in SIGNALS]
    yield ranks
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("silent", "ends", "expected"),
    [
        ({}, {}, None),
        ({1: 59.0}, {}, None),
        ({1: 60.0}, {}, (1, SILENT.format(1, 60), 0.0)),
        ({1: 61.0, 2: 70.0}, {}, (1, "nothing has been heard of processes 1, 2 of 3 for 61 s", 0.0)),
        # What has ended is silent.
        ({1: 70.0}, {1: FIRM}, (1, ENDED.format(1, "a bad row"), GRACE)),
        ({}, {1: RELAYED, 2: FIRM}, (1, ENDED.format(2, "a bad row"), GRACE)),
        ({}, {1: SIGTERM}, (143, ENDED.format(1, "stopped by SIGTERM"), GRACE + LOST)),
        # A connection is closed, or a launcher sends a signal, because another process is gone.
        ({2: LOST}, {1: CLOSED}, (1, SILENT.format(2, 5), 0.0)),
        ({}, {1: CLOSED, 2: SIGTERM}, (143, ENDED.format(2, "stopped by SIGTERM"), GRACE + LOST)),
    ],
)
def test_the_least_doubtful_reason_is_said(
    silent: dict[int, float], ends: dict[int, End], expected: tuple[int, str, float] | None, first: Ranks
) -> None:
    first.silent |= silent
    first.ends |= ends
    found = first.cause()
    assert (None if found is None else (found[0].status, found[0].sentence, found[1])) == expected


def test_an_error_that_follows_from_another_process_is_said_to(first: Ranks) -> None:
    """A collective that fails, and a signal, while another process is gone or has failed; not what has a reason of its
    own, nor what all have in common."""
    closed, stopped = RuntimeError("Connection closed by peer"), Interrupted("stopped by SIGTERM", 143)
    first.silent, first.ends = {1: LOST, 2: 0.0}, {2: CLOSED}
    for error in (closed, stopped):
        with pytest.raises(RunError, match=f"^{SILENT.format(1, 5)}; checkpoint-1 is left$"):
            first.leave(error)
    first.leave(RunError("no memory"))
    first.leave(UsageError("no such file"))
    assert first.end == End(2, "no such file", 0)

    first.ends = {1: SIGTERM, 2: CLOSED}
    first.leave(stopped)
    assert first.end == SIGTERM
    with pytest.raises(Interrupted, match=f"^{ENDED.format(1, 'stopped by SIGTERM')}$"):
        first.leave(closed)
    first.ends = {1: CLOSED, 2: CLOSED}
    first.leave(RuntimeError("a bug"))
    assert first.end == End(1, "RuntimeError: a bug", 2)
    first.ends = {1: RELAYED, 2: FIRM}
    with pytest.raises(RunError, match=f"^{ENDED.format(2, 'a bad row')}; "):
        first.leave(closed)
