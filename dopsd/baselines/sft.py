"""SFT: LLaDA's objective (Nie et al., 2025) on given solutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dopsd.baselines.masked import MaskedLearning, MaskedResponse, denoising
from dopsd.baselines.solutions import check_solutions, solution_tokens
from dopsd.rollout import Decoder, Rollout
from dopsd.seeds import MASKING, mix_seeds
from dopsd.tasks import Row
from dopsd.trajectory import text_length


class Denoising(MaskedLearning):
    """A bound on -log p of a response, per token, estimated in one state."""

    has_teacher = False

    def example(self, prompt_ids: Tensor, tokens: Tensor, seed: Tensor) -> MaskedResponse:
        """A response (L,) in a state in which each position is masked with a share that is drawn, all from ``seed``."""
        generator = torch.Generator().manual_seed(int(mix_seeds(seed, MASKING)))
        length = len(tokens)
        if not self.teaching.learn_tail:
            length = min(text_length(tokens, self.decoder.eos_id) + 1, length)
        bound = denoising(prompt_ids, tokens, length, 1, generator)
        return replace(bound, weight=bound.weight / length)


class SFT(Denoising):
    """Learning from solutions; arguments as of :class:`~dopsd.method.Method`."""

    summary = "the model learns the masked tokens of given solutions (the objective that LLaDA was trained with)"

    def check(self, rows: Sequence[Row]) -> None:
        check_solutions(self.decoder, rows, self.decoding.gen_length, self.teaching.method)

    def rollouts(
        self, decoder: Decoder, rows: Sequence[Row], seeds: Tensor, on_rows: Callable[[int], object]
    ) -> list[Rollout]:
        return []

    def examples(self, rows: Sequence[Row], rollouts: Sequence[Rollout], seeds: Tensor) -> list[MaskedResponse]:
        """One of each row."""
        decoder, length = self.decoder, self.decoding.gen_length
        return [
            self.example(decoder.prompt_ids(row).cpu(), solution_tokens(decoder, row, length), seed)
            for row, seed in zip(rows, seeds, strict=True)
        ]
