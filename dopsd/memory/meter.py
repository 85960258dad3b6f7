"""How much memory is in use."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from abc import ABC, abstractmethod
from pathlib import Path

import torch

from dopsd.errors import require
from dopsd.units import GIB

# Of glibc's mallopt: from which size on (bytes) a block is mapped by itself.
M_MMAP_THRESHOLD = -3
LARGE_BLOCK = 1 << 20

# CUDA's context and what its allocator holds in pieces too small to use: nothing that PyTorch's count of allocated
# memory shows. An assumption: contexts take about half of it.
CUDA_ALLOWANCE = GIB


class Meter(ABC):
    """Measures a device's memory; ``allowance`` is for what it does not see (bytes)."""

    allowance = 0

    @abstractmethod
    def total(self) -> int:
        """The device's memory in bytes."""

    @abstractmethod
    def take_peak(self) -> int:
        """The peak since the last call in bytes; the next begins at what is in use now."""


class CudaMeter(Meter):
    """What PyTorch has allocated on a GPU."""

    allowance = CUDA_ALLOWANCE

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def total(self) -> int:
        return torch.cuda.get_device_properties(self.device).total_memory

    def take_peak(self) -> int:
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


class ResidentMeter(Meter):
    """What of this process is resident, interpreter and libraries included: Linux keeps its high-water mark."""

    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self) -> None:
        # glibc keeps freed memory for later, in pieces of which too many are too small: that would double some peaks.
        # Blocks of this size and above go back to the system instead, which takes time. Other C libraries have no such
        # option.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)

    def total(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def take_peak(self) -> int:
        found = re.search(r"VmHWM:\s*(\d+) kB", self.status.read_text())
        assert found is not None
        self.reset.write_text("5")
        return int(found[1]) << 10


def process_peak(device: torch.device) -> int | None:
    """The peak of this process so far in bytes, of what PyTorch has allocated or, on a CPU, of what was resident; None
    on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1 << 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return None


def meter_of(device: torch.device, budget: str) -> Meter:
    """The meter of a device; UsageError, naming the ``budget``, where peaks can't be measured."""
    if device.type == "cuda":
        return CudaMeter(device)
    measurable = device.type == "cpu" and os.access(ResidentMeter.reset, os.W_OK)
    accepted = "peaks of memory can be measured on CUDA GPUs, and on CPUs under Linux"
    require(measurable, "memory_budget", budget, accepted)
    return ResidentMeter()
