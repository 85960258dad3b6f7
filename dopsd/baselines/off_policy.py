"""Off-policy distillation as d3LLM does it: given tokens, in the order in which the teacher would have decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dopsd.baselines.masked import MaskedBatch, MaskedLearning, MaskedResponse
from dopsd.baselines.solutions import check_solutions, solution_tokens
from dopsd.method import BatchLoss
from dopsd.rollout import Decoder, Rollout
from dopsd.seeds import MASKING, mix_seeds
from dopsd.tasks import Row
from dopsd.trajectory import text_length
from dopsd_kernels import fused_confidence, fused_token_logprob

# The window in blocks, at equal distances over the run, from its start to five sixths of it.
WINDOWS = (0.5, 0.5, 0.75, 0.75, 1.0, 1.0)
# Of the distributions whose entropy is lowered.
TEMPERATURE = 0.5
# What two cross-entropies and two entropies are divided by, whatever the latter's weight.
TERMS = 4


class OffPolicy(MaskedLearning):
    """Cross-entropy in two states that complement each other; arguments as of :class:`~dopsd.method.Method`.

    In a window of the response, which grows with the run, the first state shows what the teacher would have decoded
    first, and the second the rest. All before the window is shown, and nothing behind it. The entropy of tokens that
    are predicted right is lowered besides.
    """

    summary = "the model learns the tokens of given solutions, in the order in which it would have decoded answers"
    states_of_response = 2

    def check(self, rows: Sequence[Row]) -> None:
        check_solutions(self.decoder, rows, self.decoding.gen_length, self.teaching.method)

    def rollouts(
        self, decoder: Decoder, rows: Sequence[Row], seeds: Tensor, on_rows: Callable[[int], object]
    ) -> list[Rollout]:
        """The teacher's greedy response to each row."""
        with self.teacher.active():
            return decoder.once(rows, self.decoding.decoding(), seeds, on_rows=on_rows)

    def figures(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """None: what the teacher answers is not learnt."""
        return {}

    def examples(self, rows: Sequence[Row], rollouts: Sequence[Rollout], seeds: Tensor) -> list[MaskedResponse]:
        """One of each row."""
        return [
            self.example(rollout, solution_tokens(self.decoder, row, self.decoding.gen_length), seed)
            for row, rollout, seed in zip(rows, rollouts, seeds, strict=True)
        ]

    def example(self, rollout: Rollout, tokens: Tensor, seed: Tensor) -> MaskedResponse:
        """A solution (L,) in both states; window and share of the first are drawn from ``seed``."""
        generator = torch.Generator().manual_seed(int(mix_seeds(seed, MASKING)))
        width, most = window(self.progress, self.decoding.block_length), self.teaching.mask_ratio
        windows = -(-min(text_length(tokens, self.decoder.eos_id) + 1, len(tokens)) // width)  # with text or its end
        start = width * int(torch.randint(windows, (), generator=generator))
        stop = min(start + width, len(tokens))
        ratio = most * (self.progress + (1 - self.progress) * float(torch.rand((), generator=generator)))
        # The teacher's order; what it did not come to is NEVER, and last.
        order = start + rollout.trajectory.reveal_step[start:stop].argsort(stable=True)
        shown = int((1 - ratio) * (stop - start))
        learnt = torch.zeros(2, len(tokens), dtype=torch.bool)
        learnt[0, order[shown:]] = True
        learnt[1, order[:shown]] = True
        masked = learnt | (torch.arange(len(tokens)) >= stop)
        weight = 1 / (TERMS * learnt.sum(-1).clamp_min(1))
        return MaskedResponse(rollout.trajectory.prompt_ids, tokens, masked, learnt, weight)

    def loss(self, batch: MaskedBatch) -> BatchLoss:
        hidden, weight = batch.hidden_states(self.decoder.model), self.decoder.model.lm_head_weight
        loss, figures = self.cross_entropy(batch, hidden)
        right = fused_confidence(hidden.detach(), weight).argmax == batch.targets
        if self.teaching.entropy_weight:
            sure, workspace = right.nonzero()[:, 0], self.sizes.workspace_bytes
            state, tokens = batch.state[sure], batch.targets[sure]
            out = fused_token_logprob(hidden[sure], weight, tokens, temperature=TEMPERATURE, workspace_bytes=workspace)
            count = torch.zeros_like(batch.weight).index_add(0, batch.state, right.to(batch.weight.dtype))
            loss = loss + self.teaching.entropy_weight / TERMS * (out.entropy / count[state]).sum()
        return BatchLoss(loss, {**figures, "masked_accuracy": right.float()})

    def most_learnt(self) -> int:
        return self.decoding.block_length


def window(progress: float, block_length: int) -> int:
    """How many positions are learnt when this share of the run is behind."""
    at = min(progress * len(WINDOWS), len(WINDOWS) - 1)
    low, high = [*pairwise((*WINDOWS, WINDOWS[-1]))][int(at)]
    return max(1, int(block_length * (low + (high - low) * (at - int(at)))))
