"""Learning the masked tokens of given responses: states in which some are hidden, and the cross-entropy there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dopsd.method import BatchLoss, Method, Note
from dopsd.rollout import Rollout
from dopsd.step_batch import Inputs, with_prompts
from dopsd_kernels import fused_token_logprob


@dataclass(frozen=True, eq=False)
class MaskedResponse:
    """A response, and the states in which it is learnt.

    Args:
        prompt_ids: (P,) int64.
        tokens: (L,) int64.
        masked: (S, L) bool, the positions that the student does not see in each state.
        learnt: (S, L) bool, those of them whose tokens it learns.
        weight: (S,) fp32, by what the cross-entropies of each state count.
    """

    prompt_ids: Tensor
    tokens: Tensor
    masked: Tensor
    learnt: Tensor
    weight: Tensor

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "prompt_ids": self.prompt_ids.tolist(),
            "tokens": self.tokens.tolist(),
            "masked": [row.nonzero().flatten().tolist() for row in self.masked],
            "learnt": [row.nonzero().flatten().tolist() for row in self.learnt],
            "weight": self.weight.tolist(),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> MaskedResponse:
        """The inverse of :meth:`to_json`."""
        prompt_ids, tokens = (torch.tensor(fields[name], dtype=torch.int64) for name in ("prompt_ids", "tokens"))
        masked, learnt = torch.zeros(2, len(fields["weight"]), len(tokens), dtype=torch.bool)
        for name, rows in (("masked", masked), ("learnt", learnt)):
            for row, positions in zip(rows, fields[name], strict=True):
                row[positions] = True
        return cls(prompt_ids, tokens, masked, learnt, torch.tensor(fields["weight"], dtype=torch.float32))


# No share of masked positions is less than this, by which cross-entropies are divided.
LEAST_SHARE = 1e-3


def denoising(
    prompt_ids: Tensor,  # (P,) int64
    tokens: Tensor,  # (L,) int64
    length: int,
    draws: int,
    generator: torch.Generator,
) -> MaskedResponse:
    """A response in states that give a bound on -log p of its first ``length`` tokens: the mean of ``draws`` estimates.

    Each has a share t ~ U(0, 1) of its positions masked, by chance. Those behind ``length`` are as hidden as the text,
    so that they do not tell where it ends, but are not learnt.
    """
    share = (1 - LEAST_SHARE) * torch.rand(draws, generator=generator) + LEAST_SHARE
    masked = torch.rand(draws, len(tokens), generator=generator) < share[:, None]
    learnt = masked & (torch.arange(len(tokens)) < length)
    return MaskedResponse(prompt_ids, tokens, masked, learnt, 1 / (draws * share))


@dataclass(frozen=True, eq=False)
class MaskedBatch:
    """S states, ready for the student, with N learnt tokens in all.

    Args:
        student: the model inputs.
        columns: (S, R) int64, the response positions to read: the learnt ones, and others where a state has fewer.
        row: (N,) int64, the indices of the learnt ones in the flattened (S, R).
        state: (N,) int64, the state of each.
        targets: (N,) int64, their tokens.
        weight: (S,) fp32, by what the cross-entropies of each state count.
    """

    student: Inputs
    columns: Tensor
    row: Tensor
    state: Tensor
    targets: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def tokens(self) -> int:
        """Those that the student's pass computes, padding included."""
        return self.student.tokens

    def hidden_states(self, model: Any) -> Tensor:
        """(N, d), the student's at the learnt positions."""
        return self.student.hidden_states(model, self.columns).flatten(0, 1).index_select(0, self.row)


def collate(
    index: Sequence[tuple[MaskedResponse, int]], *, mask_id: int, pad_id: int, device: torch.device
) -> MaskedBatch:
    """The states (response, number of its state) of ``index`` as one batch on ``device``."""
    tokens = torch.stack([one.tokens for one, _ in index])
    masked = torch.stack([one.masked[state] for one, state in index])
    learnt = torch.stack([one.learnt[state] for one, state in index])
    seen = torch.where(masked, mask_id, tokens).to(device)
    width = max(1, int(learnt.sum(-1).max()))  # the network reads one position at least
    columns = learnt.long().argsort(dim=-1, descending=True, stable=True)[:, :width]
    row = learnt.gather(1, columns).flatten().nonzero()[:, 0]
    return MaskedBatch(
        student=with_prompts([one.prompt_ids for one, _ in index], seen, pad_id),
        columns=columns.to(device),
        row=row.to(device),
        state=(row // width).to(device),
        targets=tokens.gather(1, columns).flatten()[row].to(device),
        weight=torch.stack([one.weight[state] for one, state in index]).to(device),
    )


class MaskedLearning(Method[MaskedResponse, MaskedBatch]):
    """The weighted cross-entropy of what is masked in given responses; arguments as of :class:`Method`."""

    example_type = MaskedResponse
    #: In how many states a response is learnt.
    states_of_response = 1

    def states(self, example: MaskedResponse) -> int:
        return len(example.weight)

    def most_states(self, rollout: Rollout) -> int:
        return self.states_of_response

    def size(self, examples: Sequence[MaskedResponse]) -> float:
        """Each update of a batch of rows has its share of the examples."""
        return len(examples) / self.teaching.updates_per_batch

    def batches(self, examples: Sequence[MaskedResponse], seed: Tensor, note: Note) -> Iterator[MaskedBatch]:
        """Every state of ``examples``; nothing is drawn."""
        index = [(example, state) for example in examples for state in range(len(example.weight))]
        for start in range(0, len(index), self.sizes.states_per_forward):
            yield collate(index[start : start + self.sizes.states_per_forward], **self.collation())

    def loss(self, batch: MaskedBatch) -> BatchLoss:
        return self.cross_entropy(batch, batch.hidden_states(self.decoder.model))

    def cross_entropy(self, batch: MaskedBatch, hidden: Tensor) -> BatchLoss:
        """Of the learnt tokens, from their states ``hidden`` (N, d)."""
        workspace = self.sizes.workspace_bytes
        out = fused_token_logprob(hidden, self.decoder.model.lm_head_weight, batch.targets, workspace_bytes=workspace)
        loss = -(out.logprob * batch.weight[batch.state]).sum()
        return BatchLoss(loss, {"cross_entropy": -out.logprob.detach()})

    def most_learnt(self) -> int:
        """The positions that are learnt in a state, at most."""
        return self.decoding.gen_length

    def costliest(self, short: Rollout, long: Rollout, states: int) -> MaskedBatch:
        """States in which as much is learnt as can be; prompts of two lengths need a mask."""
        rollouts = [short, *[long] * (states - 1)] if states > 1 else [long]
        learnt = (torch.arange(self.decoding.gen_length) < self.most_learnt())[None]
        responses = [
            MaskedResponse(one.trajectory.prompt_ids, one.trajectory.tokens, learnt, learnt, torch.ones(1))
            for one in rollouts
        ]
        return collate([(one, 0) for one in responses], **self.collation())
