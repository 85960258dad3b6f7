"""The order in which a run takes its prompts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from dopsd.seeds import mix_seeds


class PromptSampler(Sampler[int]):
    """Row indices in a new random order each epoch, each chunk of ``chunk`` rows ``times`` times in a row.

    With ``times`` > 1 an epoch's incomplete last chunk is left out: repeated, it would straddle batches.
    """

    def __init__(self, rows: int, chunk: int, times: int, seed: int) -> None:
        self.rows, self.chunk, self.times, self.seed, self.epoch = rows, min(chunk, rows), times, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of each epoch, also when a run is resumed."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows if self.times == 1 else self.rows // self.chunk * self.chunk * self.times

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(int(mix_seeds(self.seed, self.epoch)))
        order = torch.randperm(self.rows, generator=generator)
        for chunk in order.split(self.chunk):
            if self.times == 1 or len(chunk) == self.chunk:
                yield from chunk.tolist() * self.times
