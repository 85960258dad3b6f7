"""Bounds for what others have written and this process runs: patterns and templates that may never end."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from dopsd.errors import RunError

SECONDS = 5.0
MEMORY = 768 << 20


@contextmanager
def limited_memory(what: str) -> Iterator[None]:
    """Raise :class:`~dopsd.errors.RunError`, naming ``what``, where that takes, under Linux, too much memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = Path("/proc/self/statm")
    if pages.is_file():
        most = int(pages.read_text().split()[0]) * resource.getpagesize() + MEMORY
        others = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([most, *others]), hard))

    try:
        yield
    except MemoryError:
        raise RunError(f"{what} takes more than {MEMORY >> 20} MiB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def limited(what: str) -> Iterator[None]:
    """Raise :class:`~dopsd.errors.RunError`, naming ``what``, where it takes too much time or, under Linux, memory.

    Only the main thread can be interrupted: in others there is no limit to the time.
    """

    def end(*_: object) -> NoReturn:
        raise RunError(f"{what} takes more than {SECONDS:g} seconds")

    main = threading.current_thread() is threading.main_thread()
    if main:
        handler = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with limited_memory(what):
            yield
    finally:
        if main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
