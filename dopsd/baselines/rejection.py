"""Rejection fine-tuning (RFT, STaR): SFT on the student's own responses, where these are right."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dopsd.baselines.masked import MaskedResponse
from dopsd.baselines.sft import Denoising
from dopsd.rollout import Rollout
from dopsd.tasks import Row


class Rejection(Denoising):
    """Tries and filter as d-OPSD's, objective as SFT's; arguments as of :class:`~dopsd.method.Method`."""

    summary = (
        "the model decodes answers, and learns the masked tokens of those that are right. No stronger model took part"
    )

    def examples(self, rows: Sequence[Row], rollouts: Sequence[Rollout], seeds: Tensor) -> list[MaskedResponse]:
        """Those of the accepted ``rollouts``."""
        return [
            self.example(rollout.trajectory.prompt_ids, rollout.trajectory.tokens, seed)
            for rollout, seed in zip(rollouts, seeds, strict=True)
            if self.teaching.accepts(rollout.score)
        ]
