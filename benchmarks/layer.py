"""One pre-norm transformer layer with adapters on its linear layers, which are frozen: PEFT's modules, and ours.

The layer is full attention and SwiGLU, without biases and dropout. All adapters are of one rank, and everything is of
one dtype but the norms' and the rotary tables, which are fp32: PEFT would by itself keep the adapters in fp32, and pay
for the conversions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Case
from dopsd_kernels.lora_layer import LoraLinear, lora_linears, lora_swiglu, rotary

SCALE, EPS = 2.0, 1e-5
# Of a kind of machine: LLaDA-8B's on a GPU.
SIZES = {
    "cpu": {"sequences": 8, "length": 228, "width": 512, "heads": 8, "hidden": 1536, "rank": 64},
    "cuda": {"sequences": 8, "length": 456, "width": 4096, "heads": 32, "hidden": 12288, "rank": 128},
    "rehearsal": {"sequences": 2, "length": 5, "width": 32, "heads": 2, "hidden": 48, "rank": 4},
}
NAMES = ("query", "key", "value", "out", "gate", "up", "down")


class Tensors(NamedTuple):
    """A case's tensors, in order; the last three have one for each linear layer."""

    x: Tensor  # (B, T, d), with a gradient
    norms: tuple[Tensor, ...]  # of attention and MLP, (d,) each
    tables: tuple[Tensor, ...]  # cos and sin, (1, 1, T, D) each
    weights: tuple[Tensor, ...]  # (out, in) each
    a: tuple[Tensor, ...]  # (r, in) each, with a gradient
    b: tuple[Tensor, ...]  # (out, r) each, with a gradient

    @classmethod
    def of(cls, flat: tuple[Tensor, ...]) -> Tensors:
        return cls(flat[0], flat[1:3], flat[3:5], flat[5:12], flat[12:19], flat[19:26])


def shapes(case: Case) -> list[tuple[int, int]]:
    """(out, in) of each linear layer."""
    d, h = case.width, case.hidden
    return [(d, d)] * 4 + [(h, d)] * 2 + [(d, h)]


def tensors(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Random ones, scaled so that every output is of the size of its input."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(case.dtype)

    angle = torch.outer(torch.arange(case.length), 1e4 ** -torch.arange(0, 1, 2 / (case.width // case.heads)))
    angle = torch.cat((angle, angle), -1)[None, None].to(device)
    norms = [1 + 0.1 * draw(case.width).float() for _ in range(2)]
    weights = [draw(*shape, scale=shape[1] ** -0.5) for shape in shapes(case)]
    a = [draw(case.rank, i, scale=i**-0.5).requires_grad_() for _, i in shapes(case)]
    b = [draw(o, case.rank, scale=0.1 * case.rank**-0.5).requires_grad_() for o, _ in shapes(case)]
    x = draw(case.sequences, case.length, case.width).requires_grad_()
    return x, *norms, angle.cos(), angle.sin(), *weights, *a, *b


def needs(case: Case) -> dict[str, float]:
    """The products forward; backward those of the inputs' gradients, and of the adapters'. Every tensor once."""
    tokens, both = case.sequences * case.length, case.phase == "both"
    frozen = sum(o * i for o, i in shapes(case))
    trained = sum(case.rank * (o + i) for o, i in shapes(case))
    scores = case.sequences * case.length**2 * case.width  # multiplications of each of attention's two products
    flops = 2 * tokens * (frozen * (2 if both else 1) + trained * (3 if both else 1)) + 2 * scores * (6 if both else 2)
    numbers = frozen + trained * (2 if both else 1) + tokens * case.width * (4 if both else 2)
    return {"flops": flops, "bytes": numbers * case.dtype.itemsize}


def floor(case: Case, *flat: Tensor) -> None:
    """The products of `needs`, bare; adapters' are added to the others' as they are made."""
    given = Tensors.of(tuple(x.detach() for x in flat))
    of_width = {case.width: given.x.flatten(0, 1)}
    for weight, a, b in zip(given.weights, given.a, given.b, strict=True):
        out, x = weight.shape[0], of_width[weight.shape[1]]
        result = x @ weight.T
        narrow = x @ a.T
        result.addmm_(narrow, b.T)
        of_width.setdefault(out, result)
        if case.phase == "both":
            of_x, of_narrow = result @ weight, result @ b
            of_x.addmm_(of_narrow, a)
            of_narrow.T @ x, result.T @ narrow
    query = heads(given.x, case.heads)
    for _ in range(3 if case.phase == "both" else 1):
        query @ query.mT @ query


def heads(x: Tensor, count: int) -> Tensor:
    """(B, T, d) as (B, H, T, D)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def ours(case: Case, *flat: Tensor) -> Tensor:
    """Of `dopsd_kernels.lora_layer`."""
    given = Tensors.of(flat)
    linears = [
        LoraLinear(weight, None, a, b, SCALE) for weight, a, b in zip(given.weights, given.a, given.b, strict=True)
    ]
    parts = lora_linears(given.x, linears[:3], norm=(given.norms[0], EPS))
    query, key, value = (heads(part, case.heads) for part in parts)
    mixed = F.scaled_dot_product_attention(rotary(query, *given.tables), rotary(key, *given.tables), value)
    (x,) = lora_linears(mixed.transpose(1, 2).flatten(2), linears[3:4], residual=given.x)
    return lora_swiglu(x, *linears[4:], norm=(given.norms[1], EPS))


class Parts(NamedTuple):
    """What lies between a layer's products."""

    norm: Callable[[Tensor, Tensor], Tensor]  # of x and its weight
    rotary: Callable[..., tuple[Tensor, Tensor]]  # of query, key, cos, sin
    swiglu: Callable[[Tensor, Tensor], Tensor]


def plain() -> Parts:
    """As models are written in transformers."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return weight.to(x.dtype) * wide.to(x.dtype)

    def turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (table[:, 0].to(query.dtype) for table in (cos, sin))
        return apply_rotary_pos_emb(query, key, cos, sin)

    return Parts(norm, turned, lambda gate, up: F.silu(gate) * up)


def liger() -> Parts:
    """Liger's kernels, as its patches put them in."""
    from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return LigerRMSNormFunction.apply(x, weight.to(x.dtype), EPS, 0.0, "llama", True)

    def turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return LigerRopeFunction.apply(query, key, *(table[:, 0].to(query.dtype) for table in (cos, sin)))

    return Parts(norm, turned, LigerSiLUMulFunction.apply)


class Layer(nn.Module):
    """A layer as transformers has it, whose linear layers PEFT takes the place of."""

    def __init__(self, case: Case, parts: Parts) -> None:
        super().__init__()
        self.heads, self.parts = case.heads, parts
        for name, (rows, columns) in zip(NAMES, shapes(case), strict=True):
            self.add_module(name, nn.Linear(columns, rows, bias=False, device="meta"))

    def forward(self, x: Tensor, norms: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
        normed = self.parts.norm(x, norms[0])
        query, key, value = (heads(part(normed), self.heads) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(*self.parts.rotary(query, key, *tables), value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        normed = self.parts.norm(x, norms[1])
        return x + self.down(self.parts.swiglu(self.gate(normed), self.up(normed)))


@functools.lru_cache(4)
def _module(case: Case, parts: Callable[[], Parts]) -> nn.Module:
    """The layer with PEFT's modules, which have no memory."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=case.rank, lora_alpha=SCALE * case.rank, target_modules=list(NAMES))
    return inject_adapter_in_model(config, Layer(case, parts()), low_cpu_mem_usage=True)


_compiled = functools.cache(torch.compile)


def compiled(*arguments: Any) -> Tensor:
    """Call a module by `torch.compile`."""
    return _compiled(torch.func.functional_call)(*arguments)


def peft(
    case: Case,
    *flat: Tensor,
    parts: Callable[[], Parts] = plain,
    call: Callable[..., Tensor] = torch.func.functional_call,
) -> Tensor:
    """The layer of PEFT's modules, called with a case's tensors for its parameters."""
    given = Tensors.of(flat)
    named = {}
    for name, weight, a, b in zip(NAMES, given.weights, given.a, given.b, strict=True):
        named |= {f"{name}.base_layer.weight": weight, f"{name}.lora_A.default.weight": a}
        named[f"{name}.lora_B.default.weight"] = b
    return call(_module(case, parts), named, (given.x, given.norms, given.tables))
