"""Sequences that compute a few tokens each, and what they take of others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """N sequences that compute T tokens each, and take all other keys and values from one of G anchors.

    Args:
        input_ids: (N, T) int64, the tokens that are computed.
        start: (N,) int64, the column of its anchor where each one's tokens stand: token j is at column start + j.
        slot: (N,) int64, ``slots`` times each one's anchor plus its number among that anchor's sequences.
        slots: of each anchor, the most sequences that one has.
        prefix_mask: (G, W) bool, which of an anchor's first W columns its sequences attend to.
        own_mask: (N, T) bool, False at tokens that nothing attends to; None: there are none.
        causal: whether of the columns that ``prefix_mask`` says only those before the tokens are attended to.
    """

    input_ids: Tensor
    start: Tensor
    slot: Tensor
    slots: int
    prefix_mask: Tensor
    own_mask: Tensor | None = None
    causal: bool = False

    @property
    def anchor(self) -> Tensor:
        """(N,) int64, each one's anchor."""
        return self.slot // self.slots

    @staticmethod
    def assign_slots(anchor: Tensor) -> tuple[Tensor, int]:
        """``slot`` and ``slots`` of sequences whose anchors are ``anchor`` (N,); waits for a GPU."""
        number = (anchor[:, None] == anchor).tril(-1).sum(-1)  # among those of the same anchor
        slots = int(number.max()) + 1 if len(number) else 1
        return anchor * slots + number, slots

    @staticmethod
    def prefix(start: Tensor, length: int, width: int, attention_mask: Tensor | None) -> Tensor:
        """``prefix_mask`` (G, ``width``): the anchors' columns but for ``length`` from ``start`` (G,), and padding."""
        column = torch.arange(width, device=start.device)
        seen = (column < start[:, None]) | (column >= start[:, None] + length)
        return seen if attention_mask is None else seen & attention_mask[:, :width]

    def columns(self) -> Tensor:
        """(N, T) int64, where the tokens stand in their anchors."""
        own = torch.arange(self.input_ids.shape[1], device=self.start.device)
        return self.start[:, None] + own


class KVCache(NamedTuple):
    """What G sequences computed, for others to reuse.

    Args:
        layers: of each layer the keys and values (G, H_kv, W, D) of the first W columns.
        attention_mask: (G, T') bool, False at padding; None when nothing is padded.
        before: (G, 1, d) the states before the columns where the others' tokens begin, or (G * slots, 1, d), that of
            each slot, where these begin at different ones; None without a shift.
    """

    layers: list[tuple[Tensor, Tensor]]
    attention_mask: Tensor | None
    before: Tensor | None
