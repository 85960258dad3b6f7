"""VRPO (Zhu et al., *LLaDA 1.5*, 2025): preferences between a student's own responses, by estimates of their ELBOs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dopsd.baselines.groups import GroupMethod
from dopsd.baselines.masked import MaskedBatch, MaskedResponse, collate, denoising
from dopsd.method import BatchLoss, Note
from dopsd.models import device_of
from dopsd.ranks import spread
from dopsd.rollout import Rollout
from dopsd.sampler import inference
from dopsd.seeds import MASKING, PAIRING, mix_seeds
from dopsd.tasks import Row
from dopsd_kernels import fused_token_logprob


@dataclass(frozen=True, eq=False)
class Pair:
    """A right and a wrong response to one prompt, each in the states of the draws of its ELBO.

    Args:
        right, wrong: the sum of a state's log-probabilities, times its weight, is one draw's part of the ELBO.
        length: of the right one, in tokens up to the first end-of-text token and with it.
    """

    right: MaskedResponse
    wrong: MaskedResponse
    length: int

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {"right": self.right.to_json(), "wrong": self.wrong.to_json(), "length": self.length}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Pair:
        """The inverse of :meth:`to_json`."""
        right, wrong = (MaskedResponse.from_json(fields[name]) for name in ("right", "wrong"))
        return cls(right, wrong, fields["length"])


@dataclass(frozen=True, eq=False)
class PreferenceBatch(MaskedBatch):
    """A batch whose weighted cross-entropies have the gradient of the loss, and not its value.

    Args:
        share: (S,), each state's share of its pair's loss.
    """

    share: Tensor


class VRPO(GroupMethod[Pair, PreferenceBatch]):
    """DPO with estimates B of the ELBO in the place of log-likelihoods; arguments as of :class:`~dopsd.method.Method`.

    The loss of a pair of a right response w and a wrong one l, with the reference's weights those at the start, is

        -log sigmoid(beta ((B(w) - B_ref(w)) - (B(l) - B_ref(l)))) - sft_weight B(w) / length of w

    B is the mean over n draws of a time, with one mask each: 1 / p times the log-probabilities of the masked tokens, if
    p is the time's share of masked positions. The policy and the reference have the same draws, whose noise then
    cancels in part; a pair's update has its own. Behind the first end-of-text token positions are masked like others,
    for else they would tell where the text ends, but do not count.

    What the sigmoid's derivative is depends on all 2 n draws. So the values of both are computed first, without a
    gradient and without dropout; cross-entropies weighted by the derivative then have the gradient, draw by draw.
    """

    example_type = Pair
    summary = "the model decodes several answers to a problem, and learns to prefer the right ones to the wrong ones"

    def examples(self, rows: Sequence[Row], rollouts: Sequence[Rollout], seeds: Tensor) -> list[Pair]:
        """One of each row with right and wrong responses, of which its seed draws one each."""
        pairs = []
        for group, seed in zip(self.groups(rollouts), seeds, strict=True):
            right = [rollout for rollout in group if rollout.score >= self.teaching.score_threshold]
            wrong = [rollout for rollout in group if rollout.score < self.teaching.score_threshold]
            if right and wrong:
                first, second = mix_seeds(seed, PAIRING, torch.arange(2)).tolist()
                chosen = right[first % len(right)], wrong[second % len(wrong)]
                pairs.append(self.pair(*chosen, int(mix_seeds(seed, MASKING))))
        return pairs

    def pair(self, right: Rollout, wrong: Rollout, seed: int) -> Pair:
        """What is trained on of two responses; drawn from ``seed`` alone."""
        generator = torch.Generator().manual_seed(seed)
        return Pair(self.draws(right, generator), self.draws(wrong, generator), self.length(right))

    def length(self, rollout: Rollout) -> int:
        """Tokens of a response that count."""
        return min(rollout.trajectory.text_length(self.decoder.eos_id) + 1, len(rollout.trajectory.tokens))

    def draws(self, rollout: Rollout, generator: torch.Generator) -> MaskedResponse:
        """A response in a state for each draw of its ELBO."""
        length = self.length(rollout)
        counts = torch.arange(len(rollout.trajectory.tokens)) < length
        tokens = rollout.trajectory.tokens.where(counts, self.decoder.eos_id)
        return denoising(rollout.trajectory.prompt_ids, tokens, length, self.teaching.elbo_draws, generator)

    def size(self, examples: Sequence[Pair]) -> float:
        """Each update of a batch of rows has its share of the examples."""
        return len(examples) / self.teaching.updates_per_batch

    def states(self, example: Pair) -> int:
        return 2 * self.teaching.elbo_draws

    def batches(self, examples: Sequence[Pair], seed: Tensor, note: Note) -> Iterator[PreferenceBatch]:
        """Every draw of every pair, weighted by the derivative of the pair's loss by its ELBO."""
        if not examples:
            return iter(())
        with inference(self.student):
            elbos = self.elbos(examples)
        with self.teacher.active():
            gains = elbos - self.elbos(examples)
        margins = self.teaching.preference_beta * (gains[:, 0] - gains[:, 1])
        note(len(examples), margin=float(margins.mean()), preferred=float((margins > 0).double().mean()))
        anchor = self.teaching.sft_weight / torch.tensor([float(pair.length) for pair in examples]).to(margins)
        losses = -F.logsigmoid(margins) - anchor * elbos[:, 0]
        pull = self.teaching.preference_beta * torch.sigmoid(-margins)
        factors = torch.stack((pull + anchor, -pull), dim=-1)
        return self.weighted(examples, factors, losses)

    def weighted(
        self,
        examples: Sequence[Pair],
        factors: Tensor,  # (E, 2)
        losses: Tensor,  # (E,)
    ) -> Iterator[PreferenceBatch]:
        """Every state, by the factor of its response, with its share of its pair's loss."""
        index, count = states_of(examples), self.teaching.elbo_draws
        factor = factors.flatten().repeat_interleave(count)
        share = (losses / (2 * count)).repeat_interleave(2 * count)
        for start in range(0, len(index), self.sizes.states_per_forward):
            part = slice(start, start + self.sizes.states_per_forward)
            batch = vars(collate(index[part], **self.collation()))
            yield PreferenceBatch(**{**batch, "weight": batch["weight"] * factor[part]}, share=share[part])

    def elbos(self, examples: Sequence[Pair]) -> Tensor:
        """(E, 2), those of each pair's right and wrong response, by the network as it is."""
        index, size = states_of(examples), self.states_without_gradient

        def sums(part: list[tuple[MaskedResponse, int]]) -> Tensor:
            batch = collate(part, **self.collation())
            logprob = self.logprob(batch)
            rows = logprob.new_zeros(batch.columns.numel()).index_copy(0, batch.row, logprob)
            return (rows.view(batch.columns.shape).sum(-1) * batch.weight).cpu()

        with self.free_passes():
            parts = spread((index[start : start + size] for start in range(0, len(index), size)), sums)
        return torch.cat(parts).view(len(examples), 2, -1).sum(-1).to(device_of(self.decoder.model))

    def logprob(self, batch: MaskedBatch) -> Tensor:
        """(N,) of the tokens that are read."""
        model = self.decoder.model
        hidden, workspace = batch.hidden_states(model), self.sizes.workspace_bytes
        return fused_token_logprob(hidden, model.lm_head_weight, batch.targets, workspace_bytes=workspace).logprob

    def loss(self, batch: PreferenceBatch) -> BatchLoss:
        slope = -(self.logprob(batch) * batch.weight[batch.state]).sum()
        return BatchLoss(batch.share.sum() + (slope - slope.detach()), {})

    def most_states(self, rollout: Rollout) -> int:
        return 2 * self.teaching.elbo_draws

    def costliest(self, short: Rollout, long: Rollout, states: int) -> PreferenceBatch:
        """States in which all is masked, and counts; prompts of two lengths need a mask."""
        index = []
        for one in [long] * max(1, states - 1) + [short] * (states > 1):
            trajectory = one.trajectory
            every = torch.ones(1, len(trajectory.tokens), dtype=torch.bool)
            index.append((MaskedResponse(trajectory.prompt_ids, trajectory.tokens, every, every, torch.ones(1)), 0))
        batch = collate(index, **self.collation())
        return PreferenceBatch(**vars(batch), share=batch.weight)


def states_of(examples: Sequence[Pair]) -> list[tuple[MaskedResponse, int]]:
    """Those of each pair's right response, then of its wrong one."""
    responses = (response for pair in examples for response in (pair.right, pair.wrong))
    return [(response, state) for response in responses for state in range(len(response.weight))]
