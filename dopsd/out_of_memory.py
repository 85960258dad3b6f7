"""What happens when there is no more memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU's allocator, had no more."""
    texts = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def unless_out_of_memory(action: Callable[[], T]) -> T | None:
    """What ``action`` returns, or None if memory ran out; all that it had allocated is free again then."""
    try:
        return action()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Out of the handler, nothing refers to the error any more, nor by its traceback to the graph that was computed.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
