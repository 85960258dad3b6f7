"""diffu-GRPO (Zhao et al. 2025, *d1*): a policy gradient on groups of responses, from likelihoods of one pass.

With exact likelihoods, standardised advantages and no reference it is what JustGRPO does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dopsd.baselines.groups import GroupMethod
from dopsd.baselines.likelihood import Group, Likelihood, LikelihoodBatch, collate, likelihood_batches
from dopsd.method import BatchLoss, Note
from dopsd.ranks import spread
from dopsd.rollout import Rollout
from dopsd.sampler import inference
from dopsd.tasks import Row

# Added to a group's standard deviation before its advantages are divided by it.
LEAST_DEVIATION = 1e-4


class DiffuGRPO(GroupMethod[Group, LikelihoodBatch]):
    """PPO's clipped surrogate over tokens, with a penalty for leaving a reference.

    Arguments as of :class:`~dopsd.method.Method`.
    """

    example_type = Group
    summary = "the model decodes several answers to a problem, and what is better than their mean becomes likelier"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        options = self.teaching
        self.likelihood = Likelihood(options.likelihood == "exact", options.prompt_mask, options.share_prompt_mask)

    def examples(self, rows: Sequence[Row], rollouts: Sequence[Rollout], seeds: Tensor) -> list[Group]:
        """A group for each row; without a reference, only those whose rewards differ, for others have no gradient."""
        return [
            self.group(responses, int(seed))
            for responses, seed in zip(self.groups(rollouts), seeds, strict=True)
            if self.teaching.kl_weight or len({response.score for response in responses}) > 1
        ]

    def group(self, responses: Sequence[Rollout], seed: int) -> Group:
        """What is trained on of the responses to one row; prompts' masks are drawn from ``seed``."""
        trajectories = [response.trajectory for response in responses]
        tokens = torch.stack([trajectory.tokens for trajectory in trajectories])
        ends = torch.tensor([trajectory.text_length(self.decoder.eos_id) for trajectory in trajectories])
        rewards = torch.tensor([response.score for response in responses], dtype=torch.float64)
        advantages = rewards - rewards.mean()
        if self.teaching.advantage == "standardized":
            advantages = advantages / (rewards.std() + LEAST_DEVIATION)
        lengths = (ends + 1).clamp_max(tokens.shape[1])
        return Group(trajectories[0].prompt_ids, tokens, lengths, advantages.float(), seed)

    def states(self, example: Group) -> int:
        return self.likelihood.states(example)

    def size(self, examples: Sequence[Group]) -> float:
        """The tokens that count."""
        return sum(int(group.lengths.sum()) for group in examples)

    def slices(self, examples: Sequence[Group]) -> list[list[Group]]:
        """Each update has every group, with masks of its own.

        What its log-probabilities are held against is computed here, while the student is the policy that responded;
        the first update needs none of that policy, for it is its own.
        """
        count = self.teaching.updates_per_batch
        updates = [[replace(group, update=number) for group in examples] for number in range(count)]

        @cache
        def old(number: int) -> list[Tensor]:
            return self.log_probabilities(updates[number], inference(self.student))

        @cache
        def reference(number: int) -> list[Tensor]:
            return self.log_probabilities(updates[number], self.teacher.active())

        def held(group: Group, place: int) -> Group:
            # Where nothing is drawn, all updates have the states of the first.
            states = group.update if self.likelihood.draws else 0
            return replace(
                group,
                old=old(states)[place] if group.update else None,
                reference=reference(states)[place] if self.teaching.kl_weight else None,
            )

        return [[held(group, place) for place, group in enumerate(groups)] for groups in updates]

    def log_probabilities(self, groups: Sequence[Group], weights: AbstractContextManager[object]) -> list[Tensor]:
        """Each of at least one group's (E,), on the CPU, by ``weights`` that are active inside, without gradient."""
        batches = likelihood_batches(groups, self.likelihood, self.states_without_gradient, **self.collation())
        with weights, self.free_passes():
            parts = spread(batches, lambda batch: self.of_batch(batch).cpu())
        return list(torch.cat(parts).split([int(group.lengths.sum()) for group in groups]))

    def of_batch(self, batch: LikelihoodBatch) -> Tensor:
        """(E,), with a gradient."""
        return batch.log_probabilities(self.decoder.model, self.decoder.mask_id, self.sizes.workspace_bytes)

    def batches(self, examples: Sequence[Group], seed: Tensor, note: Note) -> Iterator[LikelihoodBatch]:
        return likelihood_batches(examples, self.likelihood, self.sizes.states_per_forward, **self.collation())

    def loss(self, batch: LikelihoodBatch) -> BatchLoss:
        """The sum over tokens of -min(r A, clip(r) A) + kl_weight (q / p - log(q / p) - 1), r = p / p_old.

        p is a token's probability by the student, q by the reference.
        """
        logprob, clip = self.of_batch(batch), self.teaching.ratio_clip
        ratio = (logprob - (logprob.detach() if batch.old is None else batch.old)).exp()
        gain, bounded = ratio * batch.advantage, ratio.clamp(1 - clip, 1 + clip) * batch.advantage
        loss = -torch.minimum(gain, bounded)
        figures = {"ratio": ratio.detach(), "clipped": (bounded < gain).float()}
        if batch.reference is not None:
            change = batch.reference - logprob
            kl = change.exp() - change - 1
            loss = loss + self.teaching.kl_weight * kl
            figures["kl"] = kl.detach()
        return BatchLoss(loss.sum(), figures)

    def most_states(self, rollout: Rollout) -> int:
        return self.teaching.updates_per_batch * self.states(self.alike(rollout))

    def alike(self, rollout: Rollout) -> Group:
        """A group of responses that all are this one, as it is in the updates after the first."""
        group = self.group([rollout] * self.decoding.pass_k, seed=0)
        nothing = torch.zeros(int(group.lengths.sum()))
        return replace(group, old=nothing, reference=nothing if self.teaching.kl_weight else None)

    def costliest(self, short: Rollout, long: Rollout, states: int) -> LikelihoodBatch:
        """A state of one group, and then all of others: prompts of two lengths need a mask."""
        few, many = self.alike(short if states > 1 else long), self.alike(long)
        each = self.states(many)
        index = [(0, 0), *((1 + state // each, state % each) for state in range(states - 1))]
        return collate([few, *[many] * index[-1][0]], index, self.likelihood, **self.collation())
