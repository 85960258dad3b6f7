"""A decoded response together with the order in which it was revealed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Reveal step of a position that was never decoded (behind the end of the text, when decoding stopped there).
NEVER = torch.iinfo(torch.int64).max


def text_length(tokens: Tensor, eos_id: int) -> int:
    """Positions of ``tokens`` (L,) before the first end-of-text token; L if there is none."""
    ends = (tokens == eos_id).nonzero()
    return int(ends[0]) if len(ends) else len(tokens)


def block_positions(start: Tensor, width: int, length: int) -> tuple[Tensor, Tensor]:
    """The positions of blocks of ``width`` from ``start`` (N,) on in responses of ``length``, and which there are.

    A block that begins in a prompt, at a negative position, or ends behind the response has fewer: in the places of the
    others are positions of another block, and none twice.

    Returns:
        (N, width) int64 and bool.
    """
    position = start[:, None] + torch.arange(width, device=start.device)
    before, behind = position < 0, position >= length
    return position + width * (before.long() - behind.long()), ~(before | behind)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What a student decoded, and when: 2L integers from which every state of the denoising process follows.

    The state before step ``s`` shows position ``i`` iff ``reveal_step[i] < s``; step ``s`` commits the positions with
    ``reveal_step[i] == s``, which all lie in one block.

    Args:
        prompt_ids: (P,) int64.
        tokens: (L,) int64, the final response.
        reveal_step: (L,) int64 in [0, S) or ``NEVER``.
        block_length: positions per block; divides L.
        lead: how many of the prompt's last tokens are in the first block, below ``block_length``; that block then has
            fewer positions, and so has a last one that takes the rest.

    Raises:
        ValueError: if the four do not describe a block-by-block decoding; the sentence says in what way.
    """

    prompt_ids: Tensor
    tokens: Tensor
    reveal_step: Tensor
    block_length: int
    lead: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "tokens", "reveal_step"):
            value = getattr(self, name)
            if value.ndim != 1 or value.dtype != torch.int64:
                raise ValueError(f"{name} must be a 1-D int64 tensor, got {value.dtype} of shape {tuple(value.shape)}")
        if len(self.tokens) != len(self.reveal_step):
            raise ValueError(f"tokens has {len(self.tokens)} positions and reveal_step has {len(self.reveal_step)}")
        if self.block_length < 1 or len(self.tokens) % self.block_length:
            raise ValueError(f"block_length={self.block_length} does not divide the length {len(self.tokens)}")
        if not 0 <= self.lead < self.block_length:
            raise ValueError(f"lead={self.lead} must be at least 0 and below block_length={self.block_length}")
        if bool((self.reveal_step < 0).any()):
            raise ValueError("reveal_step must not be negative")
        decoded = self.reveal_step != NEVER
        steps = self.reveal_step[decoded]
        if len(steps) and len(steps.unique()) != self.num_steps:
            raise ValueError(f"reveal_step reaches {self.num_steps - 1} but leaves out some step before it")
        order = (steps * len(self.tokens) + torch.arange(len(self.tokens), device=steps.device)[decoded]).argsort()
        blocks = (torch.arange(len(self.tokens), device=steps.device)[decoded][order] + self.lead) // self.block_length
        before = int(blocks[-1]) * self.block_length - self.lead if len(blocks) else 0
        unfinished = not bool(decoded[: max(before, 0)].all())
        mixed = bool((blocks.diff() < 0).any()) or bool((blocks.diff()[steps[order].diff() == 0] != 0).any())
        if unfinished or mixed:
            raise ValueError("reveal_step must finish one block before the next, and a step must stay in one block")

    @property
    def num_steps(self) -> int:
        """S, the number of denoising steps."""
        decoded = self.reveal_step[self.reveal_step != NEVER]
        return int(decoded.max()) + 1 if len(decoded) else 0

    def states(self, steps: Tensor, mask_id: int) -> Tensor:
        """(len(steps), L): the response as it stood before each of ``steps``."""
        return torch.where(self.reveal_step < steps[:, None], self.tokens, mask_id)

    def commits(self, steps: Tensor) -> Tensor:
        """(len(steps), L) bool: the positions that each step revealed."""
        return self.reveal_step == steps[:, None]

    def block_starts(self, steps: Tensor) -> Tensor:
        """(len(steps),) first position of the block that each step worked on; negative where that is in the prompt."""
        position = self.commits(steps).long().argmax(-1) + self.lead
        return position // self.block_length * self.block_length - self.lead

    def text_length(self, eos_id: int) -> int:
        """As :func:`text_length`, of the response."""
        return text_length(self.tokens, eos_id)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; ``NEVER`` becomes -1."""
        reveal_step = self.reveal_step.masked_fill(self.reveal_step == NEVER, -1)
        return {
            "prompt_ids": self.prompt_ids.tolist(),
            "tokens": self.tokens.tolist(),
            "reveal_step": reveal_step.tolist(),
            "block_length": self.block_length,
            "lead": self.lead,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Trajectory:
        """The inverse of :meth:`to_json`."""
        prompt_ids, tokens, reveal_step = (
            torch.tensor(fields[name], dtype=torch.int64) for name in ("prompt_ids", "tokens", "reveal_step")
        )
        reveal_step = reveal_step.masked_fill(reveal_step == -1, NEVER)
        return cls(prompt_ids, tokens, reveal_step, fields["block_length"], fields.get("lead", 0))
