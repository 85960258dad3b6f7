"""prefix_attention: many short sequences attend to one shared prefix and to themselves."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._ops import add_op_namespace_prefix
from ..common.arguments import check_choice, check_device, check_floating, check_number, check_shape
from ..common.backends import as_traced, choose_backend, undisturbed
from ..common.products import compute_dtype
from . import cascade

# The Triton kernels keep a whole head of a tile of rows on the chip.
_TRITON_MAX_WIDTH = 128


def prefix_attention(
    q: Tensor,  # (G, S, H, T, D)
    k: Tensor,  # (G, S, H_kv, T, D)
    v: Tensor,  # (G, S, H_kv, T, D)
    k_prefix: Tensor,  # (G, H_kv, P, D)
    v_prefix: Tensor,  # (G, H_kv, P, D)
    *,
    prefix_mask: Tensor | None = None,  # (G, P) bool
    own_mask: Tensor | None = None,  # (G, S, T) bool
    prefix_length: Tensor | None = None,  # (G, S) int64
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend, without a causal mask, from every sequence of a group to the group's prefix and to the sequence itself.

    For each query, one softmax over the P keys of its group's prefix and the T keys of its own sequence: out =
    softmax(scale * q [k_prefix; k]^T) [v_prefix; v]. That is what concatenating prefix and own keys gives, but the
    prefix is neither copied nor read once per sequence: a group's queries meet it together. Where plain PyTorch has to
    write scores, which is on GPUs alone, they are of as many sequences at a time as 64 MiB hold, or of one. Scores,
    softmax and sums are in fp32 (fp64 for fp64); only outputs and their logsumexp are kept for the backward pass, in
    which the scores are computed again. Exact gradients for all five tensors; those of the prefix are sums over its
    group. There is no second derivative.

    Args:
        q: (G, S, H, T, D): G groups of S sequences of T queries, in H heads. fp16, bf16, fp32 or fp64.
        k, v: (G, S, H_kv, T, D), own keys and values. H is a multiple of H_kv: query head h uses head h // (H / H_kv).
        k_prefix, v_prefix: (G, H_kv, P, D), P >= 0. All five have one dtype and device.
        prefix_mask: (G, P) bool, False for padding, which nothing attends to. None: all are real.
        own_mask: (G, S, T) bool, False for own keys that are padding, for sequences of different lengths. Queries there
            are computed like others; their outputs mean nothing.
        prefix_length: (G, S) int64, of how many of the prefix' keys, from the first, a sequence sees any: in causal
            models, those before it. None: all.
        scale: of the scores, > 0. None: D ** -0.5.
        backend: "torch", or "triton" for the kernels, which need a GPU, fp16, bf16 or fp32, and D of at most 128.
            "auto" takes the kernels where they can be used.

    Returns:
        (G, S, H, T, D) in q's dtype. A query that sees no key at all gets 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range, or `backend` is "triton" and
            the kernels cannot be used.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("k_prefix", k_prefix), ("v_prefix", v_prefix)):
        check_floating(name, x)
        check_device(name, x, q.device)
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}, but must be {q.dtype} like q.")
    if q.dim() != 5 or 0 in q.shape[2:]:
        raise ValueError(f"q has shape {tuple(q.shape)}, but must have (G, S, H, T, D) with H, T, D >= 1.")
    groups, sequences, heads, length, width = q.shape
    if k.dim() != 5 or k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(
            f"k has shape {tuple(k.shape)}, but must have (G, S, H_kv, T, D) with H_kv that divides {heads}."
        )
    key_heads = k.shape[2]
    check_shape("k", k, (groups, sequences, key_heads, length, width), "q's, but for the heads")
    check_shape("v", v, k.shape, "that of k")
    if k_prefix.dim() != 4:
        raise ValueError(f"k_prefix has shape {tuple(k_prefix.shape)}, but must have (G, H_kv, P, D).")
    check_shape("k_prefix", k_prefix, (groups, key_heads, k_prefix.shape[2], width), "G, H_kv and D of k")
    check_shape("v_prefix", v_prefix, k_prefix.shape, "that of k_prefix")
    masks = (
        ("prefix_mask", prefix_mask, (groups, k_prefix.shape[2])),
        ("own_mask", own_mask, (groups, sequences, length)),
    )
    for name, mask, shape in masks:
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"{name} must be a tensor of bool, but is {getattr(mask, 'dtype', type(mask).__name__)}.")
        check_shape(name, mask, shape, "one entry per key")
        check_device(name, mask, q.device)
    if prefix_length is not None:
        if not isinstance(prefix_length, Tensor) or prefix_length.dtype != torch.int64:
            given = getattr(prefix_length, "dtype", type(prefix_length).__name__)
            raise TypeError(f"prefix_length must be a tensor of int64, but is {given}.")
        check_shape("prefix_length", prefix_length, (groups, sequences), "one entry per sequence")
        check_device("prefix_length", prefix_length, q.device)
    if scale is not None:
        check_number("scale", scale, 0, above=True)
    check_choice("backend", backend, ("auto", "triton", "torch"))
    scale = width**-0.5 if scale is None else float(scale)
    out: Tensor = _PrefixAttention.apply(
        q, k, v, k_prefix, v_prefix, prefix_mask, own_mask, prefix_length, scale, backend
    )
    return out


# ------------------------------------------------------------------------------------------------------------
# Operators and autograd
# ------------------------------------------------------------------------------------------------------------


def _implementation(q: Tensor, backend: str) -> Any:
    also = None
    if q.shape[-1] > _TRITON_MAX_WIDTH:
        also = f"the kernels take heads of at most {_TRITON_MAX_WIDTH}, but D is {q.shape[-1]}"
    if choose_backend(backend, (q,), also) == "torch":
        return cascade
    from . import kernels

    return kernels


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_mask: Tensor | None,
    own_mask: Tensor | None,
    prefix_length: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the output (G, S, H, T, D) and the scores' logsumexp (G, S, H, T)."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:-1], dtype=compute_dtype(q))
    if q.numel():
        with undisturbed(q):
            _implementation(q, backend).forward(
                q, k, v, k_prefix, v_prefix, prefix_mask, own_mask, prefix_length, scale, out, lse
            )
    return out, lse


def _backward(
    grad: Tensor,  # (G, S, H, T, D)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_mask: Tensor | None,
    own_mask: Tensor | None,
    prefix_length: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the five tensors."""
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, k_prefix, v_prefix))
    if q.numel():
        with undisturbed(q):
            _implementation(q, backend).backward(
                *(grad.contiguous(), q, k, v, k_prefix, v_prefix, prefix_mask, own_mask, prefix_length),
                *(out, lse, scale, *grads),
            )
    else:
        for x in grads:
            x.zero_()
    return grads[0], grads[1], grads[2], grads[3], grads[4]


_forward_operator = torch.library.custom_op(add_op_namespace_prefix("prefix_attention"), _forward, mutates_args=())
_backward_operator = torch.library.custom_op(
    add_op_namespace_prefix("prefix_attention_backward"), _backward, mutates_args=()
)


@_forward_operator.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:-1], dtype=compute_dtype(q))


@_backward_operator.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, k_prefix, v_prefix = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, k_prefix, v_prefix)
    )
    return q, k, v, k_prefix, v_prefix


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, lse = as_traced(_forward_operator, _forward)(*arguments)
        *tensors, ctx.scale, ctx.backend = arguments
        ctx.save_for_backward(*tensors, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        arguments: Any = (grad, *ctx.saved_tensors, ctx.scale, ctx.backend)
        return *as_traced(_backward_operator, _backward)(*arguments), None, None, None, None, None
