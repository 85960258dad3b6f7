"""One timer and one measure of memory for everything that is compared here.

What is compared runs in rounds, each of which runs everything once: what else the machine does then hits all alike.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_CYCLES = 2e9  # of a GPU in a second, about


class Unusable(RuntimeError):
    """The GPU's context is lost: whatever this process runs on it from now on fails."""

    rows: Sequence[dict[str, object]] = ()  # of what has lost it


class Times(NamedTuple):
    """Seconds of one run.

    Args:
        device: what the GPU needed for it, or on a CPU the wall clock.
        host: what it took to issue it, on a GPU.
    """

    device: float
    host: float | None


@dataclass
class Trial:
    """Something to run, and what became of it."""

    run: Callable[[], object]
    status: str = "ok"
    times: list[Times] = field(default_factory=list)
    peak_bytes: int | None = None

    def attempt(self, action: Callable[[], object]) -> None:
        """Do something unless it has failed before: one that fails must not end what is measured after it.

        Raises:
            Unusable: nothing can run after it in this process.
        """
        if self.status != "ok":
            return
        try:
            action()
            return
        except torch.OutOfMemoryError:
            self.status = "out of memory"
        except Exception as error:
            self.status = failure(error)
            if unusable(error):
                raise Unusable(self.status) from error
        gc.collect()
        torch.cuda.empty_cache()


class Clock:
    """Times runs: by the wall clock on a CPU; by events on a GPU, with a cold L2 cache and without launches.

    A GPU is given enough work before the run that all of it has been issued when it starts.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(2 * max(cache_bytes, 64 << 20), dtype=torch.int8, device=device)

    def time(self, run: Callable[[], object], host: float = 0.002) -> Times:
        """Time a run whose issuing takes about ``host`` seconds."""
        if not self.cuda:
            start = time.perf_counter()
            run()
            return Times(time.perf_counter() - start, None)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.flush.zero_()
        torch.cuda._sleep(int(_CYCLES * min(2 * host + 0.001, 0.1)))
        first.record()
        start = time.perf_counter()
        run()
        host = time.perf_counter() - start
        last.record()
        torch.cuda.synchronize()
        return Times(first.elapsed_time(last) / 1000, host)


def interleave(trials: Sequence[Trial], clock: Clock, seconds: float, low: int, high: int) -> None:
    """Time trials in rounds: for so many seconds, but ``low`` rounds at least and ``high`` at most."""
    begin = time.perf_counter()
    for number in range(high):
        for trial in trials:
            # Whoever takes this long is not measured any better by more rounds.
            if len(trial.times) < 2 or sum(times.device for times in trial.times) < seconds / 2:
                host = trial.times[-1].host or 0.002 if trial.times else 0.002
                trial.attempt(lambda: trial.times.append(clock.time(trial.run, host)))  # noqa: B023
        spent = time.perf_counter() - begin
        if number + 1 >= low and spent * (number + 2) / (number + 1) > seconds:
            break


def failure(error: BaseException) -> str:
    """A failed row's status, in a line."""
    return f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def unusable(error: BaseException | None = None) -> bool:
    """Whether the GPU's context is lost, after this error if it is known."""
    if isinstance(error, torch.AcceleratorError):
        return True
    try:
        torch.cuda.synchronize() if DEVICE.type == "cuda" else None
    except RuntimeError:
        return True
    return False


# ------------------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------------------


def gpu_peak(run: Callable[[], object]) -> int:
    """Return the bytes that are allocated at most while something runs, beyond what exists before."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak(run: Callable[[], object]) -> int:
    """Return how far resident memory rises while something runs (Linux only, in a process of `fresh_process`)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


@contextmanager
def fresh_process() -> Iterator[ProcessPoolExecutor | None]:
    """A process whose resident memory is what is in use: malloc gives every larger block back when it is freed.

    None where that can't be measured (elsewhere than on Linux), or need not be (on a GPU).
    """
    if DEVICE.type != "cpu" or sys.platform != "linux":
        yield None
        return
    fresh, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    with ProcessPoolExecutor(1, fresh, _give_back_memory, (threads,)) as process:
        yield process


def _give_back_memory(threads: int) -> None:
    torch.set_num_threads(threads)
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD


def _status(field: str) -> int:
    kib = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert kib is not None
    return int(kib[1]) * 1024
