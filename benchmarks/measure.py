"""Time and peak memory of a provider's run, on a GPU and on a CPU."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import providers
from benchmarks.problems import Case, Problem, make_problem
from benchmarks.providers import Provider

# Something to time, which may call what it is given to mark a time on the way.
Run = Callable[[Callable[[], None]], object]


class Clock:
    """Times runs: by CUDA events with a cold L2 cache on a GPU, else by the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(2 * max(cache_bytes, 64 << 20), dtype=torch.int8, device=device)

    def seconds(self, run: Run) -> list[float]:
        """Return the seconds from the start of a run to each mark that it makes, and to its end."""
        if not self.cuda:
            times = [time.perf_counter()]
            run(lambda: times.append(time.perf_counter()))
            times.append(time.perf_counter())
            return [mark - times[0] for mark in times[1:]]
        events: list[torch.cuda.Event] = []

        def record() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        torch.cuda.synchronize()
        self.flush.zero_()  # while it runs, the host gets ahead: launches are not what is timed
        record()
        run(record)
        record()
        torch.cuda.synchronize()
        return [events[0].elapsed_time(event) / 1000 for event in events[1:]]

    def time(self, provider: Provider, problem: Problem, phase: str) -> dict[str, float]:
        """Return the seconds of a run by phase: of "both", the part after the forward is "backward"."""
        marks = self.seconds(lambda mark: providers.run(provider, problem, phase, mark))
        seconds = {phase: marks[-1]}
        if phase == "both":
            seconds["backward"] = marks[-1] - marks[0]
        return seconds


def attempt(action: Callable[[], None]) -> str:
    """Do something and return what became of it: one that fails must not end what is measured after it."""
    status = "ok"
    try:
        action()
    except torch.OutOfMemoryError:
        status = "out of memory"
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        status = f"failed: {type(error).__name__}: {first_line}"
    if status != "ok":
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return status


def gpu_peak_memory(provider: Provider, problem: Problem, phase: str) -> int:
    """Return the bytes that a run allocates at most, beyond what exists before."""
    problem.student.grad = None
    return gpu_peak(lambda: providers.run(provider, problem, phase))


def gpu_peak(run: Callable[[], object]) -> int:
    """Return the bytes that are allocated at most while something runs, beyond what exists before."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# On a CPU, peak memory is read from the kernel in a process of its own, whose resident memory is what is in use:
# malloc gives every larger block back when it is freed.

_M_MMAP_THRESHOLD = -3
_last_problem: list[Problem] = []
_warm: set[tuple[str, str, str]] = set()


def prepare_memory_process(threads: int) -> None:
    """Set up a process that `cpu_peak_memory` is to be called in."""
    torch.set_num_threads(threads)
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def cpu_peak_memory(case: Case, label: str, phase: str) -> int:
    """Return how far resident memory rises in a run, when one-time costs are paid (Linux only)."""
    if not _last_problem or _last_problem[0].case != case:
        _last_problem[:] = [make_problem(case, torch.device("cpu"))]
    problem = _last_problem[0]
    (provider,) = (provider for provider in providers.providers(case) if provider.label == label)
    kind = (case.setting, label, phase)
    if kind not in _warm:
        _warm.add(kind)
        providers.run(provider, problem, phase)
    problem.student.grad = None
    return cpu_peak(lambda: providers.run(provider, problem, phase))


def cpu_peak(run: Callable[[], object]) -> int:
    """Return how far resident memory rises while something runs (Linux only)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    kib = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert kib is not None
    return int(kib[1]) * 1024
