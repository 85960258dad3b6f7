"""A closer look at some trajectories: what student and teacher made of every step, and what a run keeps of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dopsd.distillation import Distillation
from dopsd.files import plain, write_text
from dopsd.method import Method
from dopsd.objective import state_means
from dopsd.rollout import Decoder, Rollout
from dopsd.sampler import inference
from dopsd.step_batch import Example, step_batches
from dopsd_kernels import fused_confidence

FOLDER = "inspect"  # of a run's folder

# Entries of each distribution that are kept.
TOP = 5
# Positions of a step of which figures are kept: K, and as many others as there is room for, the most different first.
POSITIONS = 8


class Top(NamedTuple):
    """The likeliest entries of R distributions: ``tokens`` (R, k) int64 and ``probabilities`` (R, k) fp32."""

    tokens: Tensor
    probabilities: Tensor

    @classmethod
    def of(
        cls,
        hidden: Tensor,  # (R, d)
        weight: Tensor,  # (V, d)
    ) -> Top:
        """The ``TOP`` likeliest, on the CPU, without the logits of the others."""
        out = fused_confidence(hidden, weight, top_k=min(TOP, len(weight)))
        return cls(out.top_indices.cpu(), (out.top_values - out.logsumexp[:, None]).exp().float().cpu())


@dataclass(frozen=True)
class Look:
    """One trajectory as d-OPSD compares it, on the CPU; a row is a position that is masked for both sides in a state.

    Args:
        example: its S states.
        state, position: (R,) int64, the state of each row among these, and the response position.
        chosen: (R,) bool, whether it is in K.
        kl: (R,), the divergence without the clip.
        clip_fraction: (R,) share of vocabulary entries whose contribution is clipped.
        student, teacher: what each side predicts there.
    """

    example: Example
    state: Tensor
    position: Tensor
    chosen: Tensor
    kl: Tensor
    clip_fraction: Tensor
    student: Top
    teacher: Top

    def selection(self) -> Tensor:
        """(S, L) bool: K of each state."""
        chosen = torch.zeros_like(self.example.reveal)
        chosen[self.state[self.chosen], self.position[self.chosen]] = True
        return chosen

    def state_divergence(self) -> Tensor:
        """(S,) mean divergence over each state's K; 0 where K is empty."""
        return state_means(self.kl[self.chosen], self.state[self.chosen], self.selection())

    def to_json(self) -> list[dict[str, Any]]:
        """For each state its step, what the teacher is shown, and rows of figures: position, whether in K, divergence,
        clip fraction, and each side's tokens and probabilities, the teacher's first."""
        columns = (self.position, self.chosen, self.kl, self.clip_fraction, *self.teacher, *self.student)
        rows = [[rounded(value) for value in row] for row in zip(*(column.tolist() for column in columns), strict=True)]
        found: dict[int, list[Any]] = {}  # a state in which nothing is masked for both has none
        for state, ours in groupby(zip(self.state.tolist(), rows, strict=True), key=lambda pair: pair[0]):
            # What is not finite differs most.
            own = sorted((row for _, row in ours), key=lambda row: (not row[1], -far(row[2])))
            found[state] = sorted(own[: max(POSITIONS, sum(row[1] for row in own))])
        return [
            {"step": step, "shown": shown.nonzero().flatten().tolist(), "rows": found.get(state, [])}
            for state, (step, shown) in enumerate(zip(self.example.steps.tolist(), self.example.reveal, strict=True))
        ]


def rounded(value: Any) -> Any:
    """Numbers as they are shown, four digits of each, so that files stay small."""
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def far(value: float) -> float:
    """A divergence to sort by."""
    return value if math.isfinite(value) else math.inf


def look(method: Distillation, example: Example) -> Look:
    """How student and teacher, as they are now, see an example, which has at least one state.

    Called inside of the method's :meth:`~dopsd.method.Method.free_passes`.
    """
    objective, decoder, done = method.objective, method.decoder, 0
    network, weight = decoder.model, decoder.model.lm_head_weight.detach()
    parts: list[tuple[Tensor, ...]] = []
    with inference(method.student):
        for batch in step_batches([example], method.states_without_gradient, **method.collation()):
            with method.teacher.active():
                block = batch.teacher.hidden_states(network, batch.columns)
                chosen = objective.choose(block, weight, batch, decoder.mask_id)
            ours = batch.student.hidden_states(network, batch.columns).flatten(0, 1)[batch.candidate_index]
            theirs = block.flatten(0, 1)[batch.candidate_index].to(ours.dtype)
            out = objective.compare(ours, theirs, weight, torch.ones(len(ours), device=ours.device))
            index = batch.candidate_index.cpu()
            parts.append(
                (
                    done + index // batch.columns.shape[1],
                    batch.columns.flatten().cpu()[index],
                    chosen.flatten().cpu()[index],
                    out.row_kl.float().cpu(),
                    out.row_clip_fraction.float().cpu(),
                    *Top.of(ours, weight),
                    *Top.of(theirs, weight),
                )
            )
            done += len(batch)
    *figures, ours, our_share, theirs, their_share = (torch.cat(column) for column in zip(*parts, strict=True))
    state, position, chosen, kl, clipped = figures
    return Look(example, state, position, chosen, kl, clipped, Top(ours, our_share), Top(theirs, their_share))


def label(token: int, decoder: Decoder) -> str:
    """A token's own text; the end-of-text is a mark."""
    return "∎" if token == decoder.eos_id else decoder.tokenizer.decode([token])


def keep(path: Path, method: Method[Any, Any], rollouts: Sequence[Rollout], seeds: Sequence[int], **about: Any) -> None:
    """Write ``rollouts`` for the inspector, with figures if it is d-OPSD that learns from them.

    Args:
        path: the file; it replaces one of an earlier start.
        method: student and teacher as they are now.
        rollouts: to be kept.
        seeds: one for each, of what the teacher is shown.
        about: what the file says of all of them.
    """
    decoder, samples, used = method.decoder, [], set()
    for rollout, seed in zip(rollouts, seeds, strict=True):
        trajectory, states = rollout.trajectory.to_json(), []
        if isinstance(method, Distillation) and len((example := method.example(rollout, seed)).steps):
            states = look(method, example).to_json()
        used.update(trajectory["tokens"])
        used.update(token for state in states for row in state["rows"] for token in (*row[4], *row[6]))
        sample = {name: trajectory[name] for name in ("tokens", "reveal_step", "block_length", "lead")}
        sample |= {"prompt": decoder.shown(rollout.row), "response": rollout.response}
        samples.append({**sample, "score": rollout.score, "tries": rollout.tries, "states": states})
    texts = {token: label(token, decoder) for token in sorted(used)}
    content = {**about, "texts": texts, "samples": samples}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(plain(content), separators=(",", ":")) + "\n")
