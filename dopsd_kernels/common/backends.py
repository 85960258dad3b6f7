"""Which backend an op runs on: Triton kernels on a GPU they were compiled for, else plain PyTorch."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .products import full_precision

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_unsupported(tensors: Sequence[Tensor | None]) -> str | None:
    """Return why the Triton kernels cannot take these tensors of one device, or None if they can."""
    device = next(x.device for x in tensors if x is not None)
    if not _triton_installed():
        return "the package triton is not installed"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "tensors on a CPU need Triton's interpreter (TRITON_INTERPRET=1 before the first import)"
    else:
        from .configs import SHARED_MEMORY, family

        if family(device) is None:
            return f"there are kernels for {', '.join(SHARED_MEMORY)} and their relatives, but not for {device}"
    for x in tensors:
        if x is not None and x.dtype not in _DTYPES:
            return f"the kernels take float16, bfloat16 and float32, but not {x.dtype}"
    return None


def choose_backend(backend: str, tensors: Sequence[Tensor | None], also: str | None = None) -> str:
    """Return "triton" or "torch" for a backend argument; `also` is a further reason against Triton.

    "auto" is Triton on a GPU where nothing speaks against it. The interpreter is for tests: it must be asked for.
    """
    if backend == "torch":
        return "torch"
    reason = triton_unsupported(tensors) or also
    if backend == "triton" and reason is not None:
        raise ValueError(f'backend is "triton", but {reason}: use "auto" or "torch".')
    on_gpu = next(x for x in tensors if x is not None).device.type == "cuda"
    return "triton" if reason is None and (backend == "triton" or on_gpu) else "torch"


def as_traced(operator: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the registered operator while torch.compile traces, else the function behind it.

    Eager code then shows profilers and counters of operations what is inside, and costs less per call.
    """
    return operator if torch.compiler.is_compiling() else function


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as one that torch.compile does not look into; eager code need not import the compiler."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


@contextlib.contextmanager
def undisturbed(x: Tensor) -> Iterator[None]:
    """Compute in the dtypes that the code names, on the device of `x`: without autocast, which of whose operations
    round is PyTorch's to change, in full fp32, and with that GPU as the one kernels are launched on."""
    with torch.autocast(x.device.type, enabled=False), full_precision(), torch.cuda.device_of(x):
        yield
