"""What an op costs: the arithmetic of its products, and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


def products(run: Callable[[], object]) -> int:
    """Floating-point operations of all products."""

    def addmm(_self_shape: Any, a_shape: Any, b_shape: Any, **_: object) -> int:
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm}) as counter:
        run()
    return counter.get_total_flops()


def allocated_peak(run: Callable[[], object]) -> int:
    """The most bytes that PyTorch's allocator had given out at once, beside those of before, as its profiler sees."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    level = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


class Memory(TorchDispatchMode):
    """Records the largest storage that any operation creates, and the most that exists at once, in bytes."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = {x.untyped_storage().data_ptr() for x in inputs}
        self.live: list[tuple[StorageWeakRef, int]] = []
        self.largest = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.live = [(ref, size) for ref, size in self.live if not ref.expired()]
        known = {ref.cdata for ref, _ in self.live}
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.inputs:
                ref, size = StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes()
                if ref.cdata not in known:
                    known.add(ref.cdata)
                    self.live.append((ref, size))
                    self.largest = max(self.largest, size)
        self.most = max(self.most, sum(size for _, size in self.live))
        return out
