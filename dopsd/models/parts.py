"""The modules of a pre-norm layer with SwiGLU, and what they compute."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 and cast back before the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rows(
    x: Tensor,  # (B, T, d)
    read: Tensor,  # (B, R) int64
) -> Tensor:  # (B, R, d)
    """``x`` at the positions ``read``."""
    return x.gather(1, read[..., None].expand(-1, -1, x.shape[-1]))


def rotate(
    x: Tensor,  # (B, H, T, D)
    cos: Tensor,  # (B or 1, 1, T, D)
    sin: Tensor,  # (B or 1, 1, T, D)
) -> Tensor:  # (B, H, T, D)
    """Apply the rotary embedding in at least fp32."""
    wide = x if x.dtype == torch.float64 else x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Parts(NamedTuple):
    """The modules of a layer, whatever a checkpoint calls them; the last two norm the heads of queries and keys."""

    attention_norm: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_out: nn.Module
    mlp_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    query_norm: nn.Module = nn.Identity()
    key_norm: nn.Module = nn.Identity()

    def project(
        self,
        x: Tensor,  # (B, T, d)
        read: Tensor | None,  # (B, R) int64
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``x`` and queries (B, R, d) at the positions ``read``, or all; keys and values (B, T, d_kv) of all."""
        normed = self.attention_norm(x)
        key, value = self.key(normed), self.value(normed)
        if read is not None:
            x, normed = rows(x, read), rows(normed, read)
        return x, self.query(normed), key, value

    def place_query(
        self,
        x: Tensor,  # (B, H, T, D)
        cos: Tensor,  # (B or 1, 1, T, D)
        sin: Tensor,  # (B or 1, 1, T, D)
    ) -> Tensor:  # (B, H, T, D)
        """Apply the norm of queries' heads and the rotary embedding, in the dtype of ``x``."""
        return rotate(self.query_norm(x), cos, sin).to(x.dtype)  # a norm's weight may be wider, under autocast

    def place_key(
        self,
        x: Tensor,  # (B, H_kv, T, D)
        cos: Tensor,  # (B or 1, 1, T, D)
        sin: Tensor,  # (B or 1, 1, T, D)
    ) -> Tensor:  # (B, H_kv, T, D)
        """Apply the norm of keys' heads and the rotary embedding, likewise."""
        return rotate(self.key_norm(x), cos, sin).to(x.dtype)

    def add_attention(
        self,
        x: Tensor,  # (B, T, d)
        mixed: Tensor,  # (B, T, d), of all heads
    ) -> Tensor:  # (B, T, d)
        """The layer's input and what attention gives."""
        return x + self.attention_out(mixed)

    def add_mlp(
        self,
        x: Tensor,  # (B, T, d)
    ) -> Tensor:  # (B, T, d)
        """That, and what the other half of the layer gives."""
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))
