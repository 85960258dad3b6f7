"""How probable a response is to a network that fills masks: an estimate from one pass, or the product over its order.

A state is one sequence of a pass: a prompt, some of it masked perhaps, with a response that is masked, or is so from
the token on that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dopsd.seeds import PROMPT_MASK, mix_seeds
from dopsd.step_batch import Inputs, with_prompts
from dopsd_kernels import fused_token_logprob


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, and what the policy's log-probabilities of their tokens are held against.

    Of a response, tokens up to the first end-of-text token count, and that one. Log-probabilities are (E,), one for
    each token that counts, in the order of :meth:`Likelihood.places`.

    Args:
        prompt_ids: (P,) int64.
        tokens: (k, L) int64, the responses.
        lengths: (k,) int64, how many tokens of each count.
        advantages: (k,) fp32.
        seed: of the prompt's masks.
        update: which of its batch's updates this is for, from 0.
        old: those of the policy that responded; None in the first update, whose policy that is.
        reference: those of the reference policy; None without one.
    """

    prompt_ids: Tensor
    tokens: Tensor
    lengths: Tensor
    advantages: Tensor
    seed: int
    update: int = 0
    old: Tensor | None = None
    reference: Tensor | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Group:
        """The inverse of :meth:`to_json`."""
        tensors = {name: torch.tensor(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**{**fields, **tensors})


@dataclass(frozen=True)
class Likelihood:
    """Which passes log-probabilities are from.

    Args:
        exact: whether token t is predicted from the prompt and the tokens before it, as where a response is decoded
            from left to right; else all are from the prompt alone, in one pass.
        prompt_mask: share of the prompt's tokens that are masked, each by chance; none are if ``exact``.
        share: whether the responses of a group have one mask of the prompt, and not one each.
    """

    exact: bool
    prompt_mask: float
    share: bool

    @property
    def draws(self) -> bool:
        """Whether the states of another update are others."""
        return not self.exact and self.prompt_mask > 0

    @property
    def shared(self) -> bool:
        """Whether one state serves a group: what a masked response's positions predict does not depend on it."""
        return not self.exact and (self.share or not self.prompt_mask)

    def places(self, group: Group) -> tuple[Tensor, Tensor, Tensor]:  # (E,) int64 each
        """State, response and position of each token that counts; states are ascending."""
        counted = torch.arange(group.tokens.shape[1]) < group.lengths[:, None]
        if self.shared:
            position, response = counted.T.nonzero(as_tuple=True)
            return torch.zeros_like(position), response, position
        response, position = counted.nonzero(as_tuple=True)
        return torch.arange(len(position)) if self.exact else response, response, position

    def states(self, group: Group) -> int:
        """How many states the group takes."""
        if self.exact:
            return int(group.lengths.sum())
        return 1 if self.shared else len(group.tokens)

    def prompt(self, group: Group, state: int, mask_id: int) -> Tensor:  # (P,) int64
        """The prompt as a state shows it."""
        if not self.draws:
            return group.prompt_ids
        seed = mix_seeds(group.seed, PROMPT_MASK, group.update, state)
        draw = torch.rand(len(group.prompt_ids), generator=torch.Generator().manual_seed(int(seed)))
        return group.prompt_ids.masked_fill(draw < self.prompt_mask, mask_id)


@dataclass(frozen=True)
class LikelihoodBatch:
    """S states that predict E tokens in N rows; a row is a position of a state, with m tokens to be predicted there.

    Args:
        inputs: the model inputs.
        columns: (S, R) int64, the response positions that are read; where a state has fewer, the first one again.
        row: (N,) int64, indices into the flattened (S, R).
        targets: (N, m) int64, of which some may not count.
        place: (E,) int64, indices into the flattened (N, m): those that do.
        advantage: (E,) fp32, of their responses.
        old, reference: (E,) or None, as in a :class:`Group`.
    """

    inputs: Inputs
    columns: Tensor
    row: Tensor
    targets: Tensor
    place: Tensor
    advantage: Tensor
    old: Tensor | None
    reference: Tensor | None

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def tokens(self) -> int:
        """As :attr:`~dopsd.step_batch.Inputs.tokens`."""
        return self.inputs.tokens

    def log_probabilities(self, model: Any, mask_id: int, workspace_bytes: int | None) -> Tensor:
        """(E,) those of the tokens that count; the mask, which is never chosen, has no probability."""
        hidden = self.inputs.hidden_states(model, self.columns).flatten(0, 1)[self.row]
        weight = model.lm_head_weight.detach()
        out = fused_token_logprob(hidden, weight, self.targets, exclude=(mask_id,), workspace_bytes=workspace_bytes)
        return out.logprob.flatten()[self.place]


def likelihood_batches(
    groups: Sequence[Group], likelihood: Likelihood, size: int, *, mask_id: int, pad_id: int, device: torch.device
) -> Iterator[LikelihoodBatch]:
    """Every state of every group, in order, in batches of at most ``size`` states, which may mix groups."""
    index = [(number, state) for number, group in enumerate(groups) for state in range(likelihood.states(group))]
    for start in range(0, len(index), size):
        yield collate(groups, index[start : start + size], likelihood, mask_id=mask_id, pad_id=pad_id, device=device)


def collate(
    groups: Sequence[Group],
    index: Sequence[tuple[int, int]],
    likelihood: Likelihood,
    *,
    mask_id: int,
    pad_id: int,
    device: torch.device,
) -> LikelihoodBatch:
    """The states (group's number, state) of ``index`` as one batch on ``device``; those of a group are consecutive."""
    wanted: dict[int, list[int]] = {}
    for number, state in index:
        wanted.setdefault(number, []).append(state)
    prompts: list[Tensor] = []
    parts: list[dict[str, Tensor]] = []
    count = 0  # of rows
    for number, chosen in wanted.items():
        group, length, first = groups[number], groups[number].tokens.shape[1], len(prompts)
        places = likelihood.places(group)
        mine = (places[0] >= chosen[0]) & (places[0] <= chosen[-1])
        of_state, response, position = (values[mine] for values in places)
        # Tokens that one state predicts at one position are a row; there are several in shared states alone.
        where, row = (of_state * length + position).unique_consecutive(return_inverse=True)
        at = where % length
        if likelihood.shared:
            targets, slot = group.tokens.T[at], response
        else:
            targets, slot = group.tokens[response, position, None], torch.zeros_like(response)
        shown = torch.full((len(chosen), length), mask_id)
        if likelihood.exact:
            shown = torch.where(torch.arange(length) < position[:, None], group.tokens[response], mask_id)
        prompts += [likelihood.prompt(group, state, mask_id) for state in chosen]
        known = {name: value[mine] for name in ("old", "reference") if (value := getattr(group, name)) is not None}
        parts.append(
            {
                "shown": shown,
                "state": first + where // length - chosen[0],
                "rank": torch.zeros_like(at) if likelihood.exact else at,
                "at": at,
                "targets": targets,
                "place": (count + row) * targets.shape[1] + slot,
                "advantage": group.advantages[response],
                **known,
            }
        )
        count += len(at)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    columns = torch.zeros(len(prompts), int(whole["rank"].max()) + 1, dtype=torch.int64)
    columns[whole["state"], whole["rank"]] = whole["at"]
    row = whole["state"] * columns.shape[1] + whole["rank"]
    there = {name: value.to(device) for name, value in {**whole, "columns": columns, "row": row}.items()}
    return LikelihoodBatch(
        with_prompts(prompts, there["shown"], pad_id),
        there["columns"],
        there["row"],
        there["targets"],
        there["place"],
        there["advantage"],
        there.get("old"),
        there.get("reference"),
    )
