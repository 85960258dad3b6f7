"""Weights that the processes of a run share (FSDP2): each holds a part, and a layer gathers its own to compute.

So do gradients and the optimiser's state. What is computed is what one process with all weights computes: hidden
states, K and the loss inside the wrapped :meth:`~dopsd.models.bidirectional.DiffusionModel.compute`, a frozen base and
its adapters alike.

Gathering is collective: in a pass with a gradient every process takes part, layer by layer. Decoding takes one process
more passes than another, so weights are gathered once before it, and are whole on each process until its end. Of W
bytes of weights a process then receives (n - 1) / n W once, and not with each pass; but all W must fit.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from dopsd.errors import must_be, require

# Layers return values as views, which nothing here writes to.
VIEWS = "FSDP2-wrapped module .* returned a view tensor"


def require_own_sharding(fsdp: str | None, **others: object) -> None:
    """Raise UsageError unless ``fsdp`` can be had, and weights are to be shared in no other way.

    Those are the ``others``, options by their name, and what a launcher's environment says.
    """
    how = "--fsdp full_shard"
    must_be(fsdp in (None, "full_shard"), "fsdp", fsdp, "full_shard, or none")
    for name, given in others.items():
        require(not given, name, given, f"{how} is how processes share weights here")
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        asked = os.environ.get(name, "false")
        require(asked.lower() != "true", name, asked, f"launch without it: {how} is how processes share weights here")


def shard(network: Any, device: torch.device, processes: int) -> None:
    """Leave each of the run's ``processes`` its part of all weights of ``network``, on its ``device``.

    All call it, with the same weights. Gradients are summed over the processes.
    """
    warnings.filterwarnings("ignore", message=VIEWS)
    mesh = init_device_mesh(device.type, (processes,))
    for module in (*network.layers, network):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(network, "compute")
    for module in parts(network):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    network.compute(lambda: None)  # which tells the layers that this is the root
    network.reshard()


def is_sharded(network: Any) -> bool:
    """Whether the processes share the weights of ``network``."""
    return isinstance(network, FSDPModule)


def parts(network: Any) -> list[FSDPModule]:
    """The modules of a sharded network that gather weights, the network first."""
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(network: Any) -> Iterator[None]:
    """Inside, all weights of ``network`` are whole on each process, for any number of passes without a gradient.

    All processes enter it. Of a network that is not sharded they always are.
    """
    if not is_sharded(network):
        yield
        return
    for module in parts(network):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in parts(network):
            module.reshard()
            module.set_reshard_after_forward(module is not network, recurse=False)


def part_of(tensor: Tensor, like: Any) -> Tensor:
    """Of a ``tensor`` that all processes have, what is held of ``like``, which has its shape: a part, or all of it."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(tensor: Any) -> Tensor:
    """All of a tensor, on each process; all call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor, or all of one that is not shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(network: nn.Module) -> tuple[int, int]:
    """The parameters of a network, and those of them that this process holds."""
    parameters = list(network.parameters())
    return sum(p.numel() for p in parameters), sum(local(p).numel() for p in parameters)


@contextmanager
def whole_state(optimizer: Any, first: bool) -> Iterator[None]:
    """Inside, an optimiser's state on the ``first`` process is that of whole parameters, as one process alone has it.

    All processes enter it; the state of others is of no use inside.
    """
    states = list(optimizer.state.values())
    before = [dict(state) for state in states]
    for state in states:
        for name, value in state.items():
            if isinstance(value, DTensor):
                value = whole(value)
                state[name] = value.cpu() if first else None
    try:
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            state.update(values)


def share_state(optimizer: Any) -> None:
    """Leave this process its part of the optimiser's state, which was loaded whole."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = part_of(value, parameter)
