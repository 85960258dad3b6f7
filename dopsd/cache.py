"""Decoding that reuses activations: a block's first step computes whole sequences, its later steps a part of them.

With a block-causal model every step computes its block alone, and that is exact.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dopsd.models.bidirectional import BidirectionalModel
from dopsd.models.block_causal import BlockCausalModel
from dopsd.models.packed import KVCache, Packed

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
            start=read.new_full((len(sequences),), self.start),
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


class CleanBlocks:
    """A block-causal network over the steps of its blocks, with the keys and values of all that stands before them.

    These are made by a pass over prompts and one over each finished block, never by a step that saw masks, and depend
    on nothing that comes later: what is computed is what whole sequences give.

    Args:
        model: the network.
        prompt_ids: (N, P) int64.
        prompt_mask: (N, P) bool, False at padding on the left; None: there is none.
        responses: (N, L) int64, of masks.
        start: (N,) int64, the columns where first blocks begin.
    """

    def __init__(
        self, model: BlockCausalModel, prompt_ids: Tensor, prompt_mask: Tensor | None, responses: Tensor, start: Tensor
    ) -> None:
        assert model.block_size is not None
        self.model, self.start = model, start
        self.own = torch.arange(model.block_size, device=start.device)
        self.width = prompt_ids.shape[1]  # no block that is open begins behind so many columns
        length = responses.shape[1]
        rows = torch.arange(len(start), device=start.device)
        # With the first block, whose keys nothing attends to, because a prompt may be empty.
        ids = torch.cat((prompt_ids, responses[:, : model.block_size]), dim=1)
        self.mask, mask = None, None
        if prompt_mask is not None:
            self.mask = torch.cat((prompt_mask, torch.ones_like(responses, dtype=torch.bool)), dim=1)
            mask = self.mask[:, : ids.shape[1]]
        kept = model.clean_pass(ids, mask, start, rows, 1, self.width)
        self.layers = [(F.pad(key, (0, 0, 0, length)), F.pad(value, (0, 0, 0, length))) for key, value in kept.layers]
        self.before = kept.before

    def advance(self, ids: Tensor, sequences: Tensor) -> None:
        """Go on to the next block.

        Args:
            ids: (n, P + L) int64, some sequences, whose block is finished.
            sequences: (n,) int64, which ones these are.
        """
        packed = self.packed(ids, sequences)
        columns = packed.columns()
        self.model.begin_pass(packed.input_ids)
        states, layers = self.model.packed_states(self.cache, packed, columns[:, -1:])
        for whole, made in zip(self.layers, layers, strict=True):
            for kept, part in zip(whole, made, strict=True):
                kept[sequences[:, None], :, columns] = part.transpose(1, 2)
        if self.before is not None:
            self.before = self.before.index_copy(0, sequences, states)
        self.start, self.width = self.start + len(self.own), self.width + len(self.own)

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None, read: Tensor, sequences: Tensor
    ) -> Tensor:
        """One step; as :meth:`BlockCache.hidden_states`. What is read outside of the blocks means nothing."""
        start = self.start[sequences, None]
        read = read.maximum(start).minimum(start + self.own[-1])
        return self.model.packed_hidden_states(self.cache, self.packed(input_ids, sequences), read)

    @property
    def cache(self) -> KVCache:
        """Of all N sequences, as far as blocks may look."""
        layers = [(key[:, :, : self.width], value[:, :, : self.width]) for key, value in self.layers]
        return KVCache(layers, self.mask, self.before)

    def packed(self, ids: Tensor, sequences: Tensor) -> Packed:
        """The open blocks of some sequences; what would be behind the response's end is nothing."""
        columns, last = self.start[sequences, None] + self.own, ids.shape[1] - 1
        seen = columns.new_ones((len(self.start), self.width), dtype=torch.bool)
        if self.mask is not None:
            seen = self.mask[:, : self.width]
        inside = columns <= last
        tokens = ids.gather(1, columns.clamp_max(last))
        return Packed(tokens, self.start[sequences], sequences, 1, seen, own_mask=inside, causal=True)
