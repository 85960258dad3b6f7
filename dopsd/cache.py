"""Decoding that reuses activations: a block's first step computes whole sequences, its later steps a part of them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dopsd.models.bidirectional import BidirectionalModel, KVCache, Packed

Cache = Literal["none", "prefix", "block"]
# Words of an earlier release, which options, recipes and files may still use.
FORMER = {"off": "none", "dual": "block"}


def todays(word: Any) -> Any:
    """A kind of cache by today's word; anything else as it is."""
    return FORMER.get(str(word), word)


class BlockCache:
    """The network over the steps of one block, with the keys and values of the first (Wu et al. 2025, *Fast-dLLM*).

    Later steps compute the block alone (``block``) or all from the block on (``prefix``), and take everything else as
    it was. Sequences that are equal at the first step, as are tries at one prompt before their first token, are
    computed once and share what is kept.

    Args:
        model: the network.
        kind: ``prefix`` or ``block``.
        start: column of the block's first token.
        stop: column behind its last.
        count: sequences, N.
    """

    def __init__(self, model: BidirectionalModel, kind: Cache, start: int, stop: int, count: int) -> None:
        self.model, self.kind, self.start, self.stop = model, kind, start, stop
        self.slot = torch.zeros(count, dtype=torch.int64, device=model.lm_head_weight.device)  # as in Packed
        self.kept: KVCache | None = None

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None, read: Tensor, sequences: Tensor
    ) -> Tensor:
        """One step, for some of the N sequences. The first step is for all that come later.

        Args:
            input_ids, attention_mask, read: as in :meth:`~dopsd.models.bidirectional.DiffusionModel.hidden_states`;
                sequences with equal tokens are read at equal columns.
            sequences: (n,) int64, which ones these are.

        Returns:
            (n, R, d).
        """
        if self.kept is None:
            return self._first(input_ids, attention_mask, read, sequences)
        packed = Packed(
            input_ids=input_ids[:, self.start : self.stop],
            start=self.starts,
            slot=self.slot[sequences],
            slots=self.slots,
            prefix_mask=self.prefix_mask,
        )
        return self.model.packed_hidden_states(self.kept, packed, read)

    def _first(self, input_ids: Tensor, attention_mask: Tensor | None, read: Tensor, sequences: Tensor) -> Tensor:
        count, width = input_ids.shape
        shown = input_ids if attention_mask is None else torch.cat((input_ids, attention_mask.long()), dim=1)
        unique, anchor = shown.unique(dim=0, return_inverse=True)
        self.slot[sequences], self.slots = Packed.assign_slots(anchor)
        row = torch.arange(count, device=anchor.device)
        first = anchor.new_full((len(unique),), count).scatter_reduce(0, anchor, row, "amin")
        mask = None if attention_mask is None else attention_mask[first]
        self.starts = read.new_full((len(unique),), self.start)
        if self.kind == "prefix":
            self.stop, width = width, self.start
        self.prefix_mask = Packed.prefix(self.starts, self.stop - self.start, width, mask)
        states, self.kept = self.model.anchor_hidden_states(input_ids[first], mask, read[first], self.starts, width)
        return states.index_select(0, anchor)
