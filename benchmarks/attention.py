"""Attention of many short sequences over shared prefixes: ours against concatenated keys and flex_attention.

The shape is that of a block's states: G prefixes, S states of each, T tokens of a state, P keys that a group shares.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure as measuring
from benchmarks.results import Row, dtype_name, figures
from dopsd_kernels import prefix_attention
from dopsd_kernels.backends import triton_unsupported

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes, by the names of a row's columns."""

    groups: int
    sequences: int
    heads: int
    length: int
    prefix: int
    width: int

    def needs(self, dtype: torch.dtype, phase: str) -> Row:
        """Two products forward, four backward (scores computed again are not counted); every tensor once."""
        queries = self.groups * self.sequences * self.heads * self.length
        product = 2 * queries * (self.prefix + self.length) * self.width
        own, shared = queries * self.width, self.groups * self.heads * self.prefix * self.width
        # q, k, v, out and the prefix' two; backward reads them and out's gradient, and writes the gradients.
        numbers = 4 * own + 2 * shared
        if phase == "both":
            numbers += 4 * own + 2 * shared + own + 3 * own + 2 * shared
        return {"flops": product * (2 if phase == "forward" else 6), "bytes": numbers * dtype.itemsize}

    def tensors(self, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Random q, k, v and the prefix' keys and values, with gradients."""
        generator = torch.Generator(device).manual_seed(0)
        own = (self.groups, self.sequences, self.heads, self.length, self.width)
        shared = (self.groups, self.heads, self.prefix, self.width)
        q, k, v, k_prefix, v_prefix = (
            torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
            for shape in (own, own, own, shared, shared)
        )
        return q, k, v, k_prefix, v_prefix


REHEARSED = [Shape(2, 3, 2, length, 12, 16) for length in (4, 8)]


def shapes(device: torch.device, rehearsal: bool = False) -> list[Shape]:
    """Those of LLaDA-8B with reuse of all but the block, and of the prompt; on a CPU of a quarter of a layer."""
    if rehearsal:
        return REHEARSED
    groups, heads = (8, 32) if device.type == "cuda" else (1, 8)
    return [Shape(groups, 15, heads, length, prefix, 128) for length, prefix in ((32, 424), (256, 200))]


# ------------------------------------------------------------------------------------------------------------
# Who computes it
# ------------------------------------------------------------------------------------------------------------


def _ours(backend: str) -> Callable[..., Tensor]:
    return lambda *inputs: prefix_attention(*inputs, backend=backend)


def concatenated(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor) -> Tensor:
    """PyTorch's attention over every sequence's own copy of the prefix."""
    keys, values = (
        torch.cat([prefix[:, None].expand(-1, q.shape[1], -1, -1, -1), own], 3).flatten(0, 1)
        for prefix, own in ((k_prefix, k), (v_prefix, v))
    )
    return F.scaled_dot_product_attention(q.flatten(0, 1), keys, values).view_as(q)


def flex(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor) -> Tensor:
    """flex_attention over the prefix and all of a group's sequences, with a mask that keeps these apart."""
    from torch.nn.attention.flex_attention import flex_attention

    groups, sequences, heads, length, _ = q.shape
    queries, own_keys, own_values = (x.transpose(1, 2).flatten(2, 3) for x in (q, k, v))
    keys, values = torch.cat([k_prefix, own_keys], 2), torch.cat([v_prefix, own_values], 2)
    mask = _flex_mask(sequences, length, k_prefix.shape[2], q.device)
    attend: Any = flex_attention if q.device.type == "cpu" else _compiled_flex()
    out: Tensor = attend(queries, keys, values, block_mask=mask)
    return out.view(groups, heads, sequences, length, -1).transpose(1, 2)


@functools.cache
def _flex_mask(sequences: int, length: int, prefix: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < prefix) | ((key - prefix) // length == query // length)

    return create_block_mask(allowed, None, None, sequences * length, prefix + sequences * length, device=str(device))


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "ours triton": _ours("triton"),
    "ours torch": _ours("torch"),
    "concatenated": concatenated,
    "flex": flex,
}


def missing(provider: str, phase: str, device: torch.device) -> str | None:
    """Return why a provider cannot run a phase here, or None if it can."""
    if provider == "ours triton":
        if device.type == "cpu":
            return "Triton kernels need a GPU; their interpreter is for tests"
        return triton_unsupported([torch.empty(0, device=device)])
    if provider == "flex" and phase == "both" and device.type == "cpu":
        return "flex_attention has no backward on a CPU"
    return None


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


def run(provider: str, inputs: Inputs, gradient: Tensor, phase: str) -> None:
    """Run a phase once: "forward" without a gradient, or "both", with the output's gradient."""
    if phase == "forward":
        with torch.no_grad():
            PROVIDERS[provider](*inputs)
        return
    out = PROVIDERS[provider](*inputs)
    torch.autograd.grad(out, inputs, gradient)


def cpu_peak_memory(shape: Shape, dtype: torch.dtype, provider: str, phase: str) -> int:
    """Return how far resident memory rises in a run, when one-time costs are paid (Linux only)."""
    inputs = shape.tensors(dtype, torch.device("cpu"))
    gradient = torch.ones_like(inputs[0])
    run(provider, inputs, gradient, phase)
    return measuring.cpu_peak(lambda: run(provider, inputs, gradient, phase))


class Trial:
    """One provider's runs of one phase, and what became of them."""

    def __init__(self, provider: str, shape: Shape, inputs: Inputs, phase: str) -> None:
        self.provider, self.shape, self.phase, self.dtype = provider, shape, phase, inputs[0].dtype
        gradient = torch.ones_like(inputs[0])
        self.run = lambda: run(provider, inputs, gradient, phase)
        reason = missing(provider, phase, gradient.device)
        self.status = "ok" if reason is None else f"skipped: {reason}"
        self.seconds: list[float] = []
        self.peak_bytes: int | None = None

    def warm_up(self, peak_memory: Callable[[Trial], int | None]) -> None:
        """Compile, and measure memory."""

        def action() -> None:
            self.run()
            self.peak_bytes = peak_memory(self)

        self.attempt(action)

    def sample(self, clock: measuring.Clock) -> None:
        """Time one run."""
        self.attempt(lambda: self.seconds.append(clock.seconds(lambda _: self.run())[-1]))

    def attempt(self, action: Callable[[], None]) -> None:
        """Do something unless it has failed before."""
        if self.status == "ok":
            self.status = measuring.attempt(action)

    def row(self) -> Row:
        """What is written."""
        about = {
            "part": "attention",
            **asdict(self.shape),
            "dtype": dtype_name(self.dtype),
            "phase": self.phase,
            "provider": self.provider,
            "status": self.status,
        }
        if self.status != "ok":
            return about
        needs = self.shape.needs(self.dtype, self.phase)
        return {**about, **figures(self.seconds, self.peak_bytes), **needs}
