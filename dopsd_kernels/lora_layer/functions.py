"""The halves of a layer as autograd functions whose backward passes are written out.

Saved for the backward are inputs, what attention or the nonlinearity needs anyway, and the adapters' narrow products.
Norms, the nonlinearity's result, dropout masks and weights in the dtype of the products are made again.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.backends import undisturbed
from . import elementwise
from .contracts import LoraLinear, adapters_of

Norm = tuple[Tensor, float] | None


def normed(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """What the products of an input (N, d) take."""
    return x.to(dtype) if norm is None else elementwise.rms_norm(x, *norm, dtype)


def dropped(x: Tensor, linear: LoraLinear) -> Tensor:
    """What an adapter takes of its layer's input (N, d)."""
    return elementwise.drop(x, linear.dropout, linear.seed) if linear.dropout else x


def pairs(
    linears: Sequence[LoraLinear], adapters: Sequence[Tensor], dtype: torch.dtype
) -> Iterator[tuple[LoraLinear, Tensor, Tensor]]:
    """The layers that have an adapter, with A and B, which are next to each other in ``adapters``."""
    left = (adapter.to(dtype) for adapter in adapters)
    return ((linear, next(left), next(left)) for linear in linears if linear.lora_a is not None)


def add_product(
    total: Tensor,  # (N, m)
    a: Tensor,  # (N, k)
    b: Tensor,  # (k, m)
    scale: float = 1.0,
) -> None:
    """Add scale a b to ``total``, in one pass over it; the operation is one that counters of operations know."""
    torch.addmm(total, a, b, alpha=scale, out=total)


def narrow_products(
    x: Tensor,  # (N, d)
    linears: Sequence[LoraLinear],
    adapters: Sequence[Tensor],
) -> list[Tensor]:  # (N, r) for each adapter
    """dropout(x) A^T; where nothing is dropped, all of them in one product."""
    parts = [(linear, a) for linear, a, _ in pairs(linears, adapters, x.dtype)]
    if any(linear.dropout for linear, _ in parts):
        return [dropped(x, linear) @ a.T for linear, a in parts]
    return list((x @ torch.cat([a for _, a in parts]).T).split([len(a) for _, a in parts], -1)) if parts else []


def products(
    x: Tensor,  # (N, d) in the dtype of the products
    linears: Sequence[LoraLinear],
    adapters: Sequence[Tensor],
    residual: Tensor | None = None,  # (N, out), added to the last one's
) -> tuple[list[Tensor], list[Tensor]]:  # (N, out) for each layer; (N, r) for each adapter
    """What the layers make of one input, and the narrow products on the way."""
    narrow = narrow_products(x, linears, adapters)
    left = zip(narrow, (b.T for _, _, b in pairs(linears, adapters, x.dtype)), strict=True)
    outputs = []
    for linear in linears:
        weight, rest = linear.matrix(x.dtype), residual if linear is linears[-1] else None
        # A product can begin with what is added to it, if that is of its dtype.
        first = rest if linear.bias is None and rest is not None and rest.dtype == x.dtype else linear.bias
        output = x @ weight.T if first is None else torch.addmm(first.to(x.dtype), x, weight.T)
        if linear.lora_a is not None:
            add_product(output, *next(left), linear.scale)
        outputs.append(output if rest is None or first is rest else rest + output)
    return outputs, narrow


def input_gradient(
    gradients: Sequence[Tensor],  # (N, out) for each layer, in the dtype of the products
    linears: Sequence[LoraLinear],
    adapters: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:  # (N, d); (N, r) for each adapter
    """Gradients of the layers' one input, and of the narrow products."""
    dtype = gradients[0].dtype
    of_input = gradients[0] @ linears[0].matrix(dtype)
    for gradient, linear in zip(gradients[1:], linears[1:], strict=True):
        add_product(of_input, gradient, linear.matrix(dtype))
    adapted = [gradient for gradient, one in zip(gradients, linears, strict=True) if one.lora_a is not None]
    parts = [
        (linear, a, (gradient @ b).mul_(linear.scale))
        for gradient, (linear, a, b) in zip(adapted, pairs(linears, adapters, dtype), strict=True)
    ]
    of_narrow = [part[2] for part in parts]
    if any(linear.dropout for linear, _, _ in parts):
        for linear, a, one in parts:
            if linear.dropout:
                elementwise.drop(one @ a, linear.dropout, linear.seed, of_input)
            else:
                add_product(of_input, one, a)
    elif parts:
        add_product(of_input, torch.cat(of_narrow, -1), torch.cat([a for _, a, _ in parts]))
    return of_input, of_narrow


def adapter_gradients(
    gradients: Sequence[Tensor],  # (N, out) for each layer
    of_narrow: Sequence[Tensor],  # (N, r) for each adapter
    x: Tensor,  # (N, d)
    linears: Sequence[LoraLinear],
    adapters: Sequence[Tensor],
    narrow: Sequence[Tensor],  # (N, r) for each adapter
) -> list[Tensor]:
    """Gradients of each A and B, in their dtypes."""
    adapted = [(one, gradient) for one, gradient in zip(linears, gradients, strict=True) if one.lora_a is not None]
    found = []
    for number, (linear, gradient) in enumerate(adapted):
        of_a = of_narrow[number].T @ dropped(x, linear)
        of_b = (gradient.T @ narrow[number]).mul_(linear.scale)
        found += [of_a.to(adapters[2 * number].dtype), of_b.to(adapters[2 * number + 1].dtype)]
    return found


class Project(torch.autograd.Function):
    """A norm, if there is one, and linear layers of its result; the residual is added to the last layer's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, d)
        residual: Tensor | None,  # (N, out)
        norm: Norm,
        linears: tuple[LoraLinear, ...],
        dtype: torch.dtype,
        *adapters: Tensor,
    ) -> tuple[Tensor, ...]:  # (N, out) each
        with undisturbed(x):
            outputs, narrow = products(normed(x, norm, dtype), linears, adapters, residual)
        ctx.norm, ctx.linears, ctx.dtype, ctx.count = norm, linears, dtype, len(adapters)
        ctx.save_for_backward(x, *adapters, *narrow)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        adapters, narrow = saved[: ctx.count], saved[ctx.count :]
        with undisturbed(x):
            gradients = [gradient.to(ctx.dtype) for gradient in upstream]
            of_x, of_narrow = input_gradient(gradients, ctx.linears, adapters)
            inner = normed(x, ctx.norm, ctx.dtype)
            of_adapters = adapter_gradients(gradients, of_narrow, inner, ctx.linears, adapters, narrow)
            of_x = of_x.to(x.dtype) if ctx.norm is None else elementwise.rms_norm_backward(of_x, x, None, *ctx.norm)
        return of_x, upstream[-1] if ctx.needs_input_grad[1] else None, None, None, None, *of_adapters


class SwiGLU(torch.autograd.Function):
    """x + down(silu(gate(n)) * up(n)) with n the norm of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, d)
        norm: Norm,
        linears: tuple[LoraLinear, LoraLinear, LoraLinear],  # gate, up, down
        dtype: torch.dtype,
        *adapters: Tensor,
    ) -> Tensor:  # (N, d)
        inner = len(adapters_of(linears[:2]))
        with undisturbed(x):
            (gate, up), narrow = products(normed(x, norm, dtype), linears[:2], adapters[:inner])
            (output,), last = products(elementwise.swiglu(gate, up), linears[2:], adapters[inner:], x)
        ctx.norm, ctx.linears, ctx.count, ctx.inner = norm, linears, len(adapters), inner
        ctx.save_for_backward(x, gate, up, *adapters, *narrow, *last)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, *saved = ctx.saved_tensors
        adapters, narrow, inner = saved[: ctx.count], saved[ctx.count :], ctx.inner
        first, last = ctx.linears[:2], ctx.linears[2:]
        with undisturbed(x):
            gradients = [upstream.to(gate.dtype)]
            of_hidden, of_narrow = input_gradient(gradients, last, adapters[inner:])
            of_gate, of_up, hidden = elementwise.swiglu_backward(of_hidden, gate, up)
            of_last = adapter_gradients(gradients, of_narrow, hidden, last, adapters[inner:], narrow[inner // 2 :])
            gradients = [of_gate, of_up]
            of_x, of_narrow = input_gradient(gradients, first, adapters[:inner])
            again = normed(x, ctx.norm, gate.dtype)
            of_first = adapter_gradients(gradients, of_narrow, again, first, adapters[:inner], narrow[: inner // 2])
            of_x = upstream + of_x if ctx.norm is None else elementwise.rms_norm_backward(of_x, x, upstream, *ctx.norm)
        return of_x, None, None, None, *of_first, *of_last


class Rotary(torch.autograd.Function):
    """The rotary embedding of heads, behind a norm of each if there is one; without one it keeps its tables alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (B, H, T, D)
        cos: Tensor,  # (B or 1, 1, T, D)
        sin: Tensor,  # (B or 1, 1, T, D)
        norm: Norm,
    ) -> Tensor:  # (B, H, T, D)
        ctx.norm = norm
        ctx.save_for_backward(cos, sin, *([] if norm is None else [x]))
        with undisturbed(x):
            inner = x if norm is None else by_head(elementwise.rms_norm(rows_of(x), *norm, x.dtype), x)
            return elementwise.rotary(inner, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *inputs = ctx.saved_tensors
        with undisturbed(upstream):
            of_x = elementwise.rotary(upstream, cos, sin, transposed=True)
            for x in inputs:
                of_x = by_head(elementwise.rms_norm_backward(rows_of(of_x), rows_of(x), None, *ctx.norm), x)
        return of_x, None, None, None


def rows_of(x: Tensor) -> Tensor:  # (B, H, T, D) -> (B T H, D)
    """One row for each head of each token, which is how linear layers write them."""
    return x.transpose(1, 2).reshape(-1, x.shape[3])


def by_head(rows: Tensor, x: Tensor) -> Tensor:  # (B T H, D) -> (B, H, T, D)
    """Such rows in the shape of ``x``."""
    batch, heads, length, width = x.shape
    return rows.view(batch, length, heads, width).transpose(1, 2)
