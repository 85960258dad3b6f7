"""Block-causal models: a position attends to its own block and to those before it, and to nothing behind.

Keys and values of a finished block then depend on nothing that comes later: one pass over a clean sequence serves every
state of every block, exactly. (Those of a block's last denoising step are others: made while masks stood beside them.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from dopsd.models.bidirectional import BidirectionalModel
from dopsd.models.packed import KVCache


class BlockCausalModel(BidirectionalModel):
    """A network of layers whose attention is full inside a block and causal over blocks of ``config.block_size``.

    Where blocks are counted from the prompt's end, responses are whole blocks: a sequence ends where a block does. With
    a ``block_size`` of 0 there are no blocks, and attention is full.

    Raises:
        ValueError: the config does not say a block size, or one that can't be.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        given = self.config.block_size
        name = config.attribute_map.get("block_size", "block_size")
        if given is None:
            raise ValueError(
                f"config.json does not say {name}, the tokens of a block of attention: give it as block_size, or 0 for "
                "a model with full attention"
            )
        if given < 0:
            raise ValueError(f"config: {name}={given} must be at least 0")
        self.block_size = given or None

    def _positions(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        positions, real = super()._positions(input_ids, attention_mask)
        if self.block_size is None:
            return positions, real
        column = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        at = positions if self.block_origin == "token_0" else column - input_ids.shape[1]
        block = at.div(self.block_size, rounding_mode="floor")
        seen = (block[:, None, :] <= block[:, :, None])[:, None]  # (B or 1, 1, T, T)
        if real is not None:
            # Padding sees all there is: a softmax over nothing would be NaN, and is never read.
            seen = real & (seen | ~real.mT)
        return positions, seen

    def clean_pass(
        self, input_ids: Tensor, attention_mask: Tensor | None, start: Tensor, slot: Tensor, slots: int, width: int
    ) -> KVCache:
        """What the states of N blocks take from their sequences' clean tokens; gradients flow through it.

        Args:
            input_ids: (G, T') int64, sequences of which all that is before any block is final.
            attention_mask: (G, T') bool, as in :meth:`hidden_states`.
            start: (N,) int64, the column at which each block begins.
            slot, slots: which sequence's it is, as in :class:`Packed`.
            width: of how many columns, from the first, keys and values are kept.

        Returns:
            What :meth:`packed_hidden_states` takes, with the same blocks in a causal :class:`Packed`.
        """
        self.begin_pass(input_ids)
        if not self.shift:
            # The last layer is read somewhere, for its keys and values.
            _, layers = self._states(input_ids, attention_mask, input_ids.new_zeros(len(input_ids), 1), width)
            return KVCache(layers, attention_mask, None)
        read = start.new_zeros(len(input_ids) * slots).index_copy(0, slot, start).view(-1, slots)
        states, layers = self._states(input_ids, attention_mask, self.shifted(read, attention_mask), width)
        return KVCache(layers, attention_mask, states.flatten(0, 1)[:, None])
