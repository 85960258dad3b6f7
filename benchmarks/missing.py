"""Why something cannot run here: a package, a compiler or a GPU is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F

from dopsd_kernels.common.backends import triton_unsupported

Missing = Callable[[torch.device], "str | None"]


def installed(package: str, module: str, gpu: bool = False, part: str = "") -> Missing:
    """Ask for a package, for a part of it that older versions lack and, of its Triton kernels, for a GPU."""

    def missing(device: torch.device) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed: pip install {package}"
        if part and importlib.util.find_spec(f"{module}.{part}") is None:
            return f"the installed {package} has no {part}: pip install -U {package}"
        return "it is a Triton kernel and needs a GPU" if gpu and device.type == "cpu" else None

    return missing


def no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot be used, or None if it can."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler on a CPU, and there is no g++ (or $CXX)"
    return None


def no_triton(device: torch.device) -> str | None:
    """Why our Triton kernels cannot be timed, or None if they can."""
    if device.type == "cpu":
        return "Triton kernels need a GPU; their interpreter is for tests"
    return triton_unsupported([torch.empty(0, device=device)])


def kernels_instead(device: torch.device) -> str | None:
    """Why what has Triton kernels without being asked for them is not timed in plain PyTorch, or None if it is."""
    return "on a GPU the kernels are taken" if no_triton(device) is None else None


def only_on_gpu(device: torch.device) -> str | None:
    """Why flex_attention is not timed, or None if it is."""
    return "on a CPU flex_attention is not compiled, and has no backward" if device.type == "cpu" else None


def no_torch_ce(device: torch.device) -> str | None:
    """Why PyTorch's linear cross-entropy cannot be called, or None if it can."""
    return None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has no linear_cross_entropy"
