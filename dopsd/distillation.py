"""d-OPSD: a student learns from itself where it was shown tokens of its own future."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor

from dopsd.config import TeachingArguments
from dopsd.drift import mean_drifts
from dopsd.errors import require
from dopsd.method import BatchLoss, Method, Note, Sizes
from dopsd.models.bidirectional import DiffusionModel
from dopsd.objective import Objective
from dopsd.rollout import Rollout
from dopsd.seeds import DRIFT, REVEAL, mix_seeds
from dopsd.step_batch import Example, StepBatch, collate, step_batches
from dopsd.tasks import Row

log = logging.getLogger(__name__)

# Blocks in which a block-causal model's teacher is shown enough, as far as is known.
SHORT_BLOCK = 32


class Distillation(Method[Example, StepBatch]):
    """The step-level objective (Eq. 12) on the student's own responses; arguments as of :class:`Method`."""

    example_type = Example
    summary = (
        "the model decodes answers; the same model, shown some of an answer's own future or a reference solution, is "
        "the teacher; and at every denoising step the student's distribution is pulled to the teacher's. No stronger "
        "model took part"
    )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.objective = objective_for(self.decoder.model, self.teaching, self.sizes.workspace_bytes)
        self.shows_references = self.objective.teacher_context == "reference"
        self.said_drift = False  # that some trajectory was computed without reuse
        block = self.decoder.model.block_size
        if block is not None and block < SHORT_BLOCK and not self.shows_references:
            log.warning(
                f"a block-causal model's teacher is shown tokens of the current block alone, and blocks of {block} "
                f"have few: less may be learnt than in blocks of {SHORT_BLOCK}"
            )

    @classmethod
    def check_model(cls, model: DiffusionModel, teaching: TeachingArguments) -> None:
        objective = objective_for(model, teaching)
        hint = "this model counts blocks from a sequence's first token, so teacher and student would have other ones"
        alike = not objective.block_causal or model.block_origin == "prompt_end"
        require(alike or objective.teacher_context != "reference", "teacher_context", teaching.teacher_context, hint)

    def collation(self) -> dict[str, Any]:
        return {**super().collation(), "block_causal": self.objective.block_causal}

    def resize(self, sizes: Sizes) -> None:
        super().resize(sizes)
        self.objective = replace(self.objective, workspace_bytes=sizes.workspace_bytes)

    def check(self, rows: Sequence[Row]) -> None:
        if self.shows_references:
            self.decoder.check_lengths(map(self.decoder.reference_ids, rows), self.decoding.gen_length)

    def example(self, rollout: Rollout, seed: int) -> Example:
        """What is trained on of a rollout; drawn from ``seed`` alone."""
        decoder, prompt_ids = self.decoder, rollout.trajectory.prompt_ids
        if self.objective.teacher_context == "reference":
            prompt_ids = decoder.reference_ids(rollout.row).cpu()
        return self.objective.example(rollout.trajectory, prompt_ids, eos_id=decoder.eos_id, seed=seed)

    def examples(self, rows: Sequence[Row], rollouts: Sequence[Rollout], seeds: Tensor) -> list[Example]:
        """Those of the accepted ``rollouts``, leaving out the ones with no step to train on."""
        examples = [
            self.example(rollout, reveal_seed(seed))
            for rollout, seed in zip(rollouts, seeds, strict=True)
            if self.teaching.accepts(rollout.score)
        ]
        return [example for example in examples if len(example.steps)]

    def slices(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Each update has a run of every example's states."""
        count, equal = self.teaching.updates_per_batch, self.teaching.equal_slices
        return [
            [part for example in examples if len((part := example.slice(number, count, equal)).steps)]
            for number in range(count)
        ]

    def states(self, example: Example) -> int:
        return len(example.steps)

    def batches(self, examples: Sequence[Example], seed: Tensor, note: Note) -> Iterator[StepBatch]:
        """Every state of ``examples``, with reuse, or without for those that drift by more than ``drift_limit``."""
        samples, limit = self.teaching.drift_samples, self.teaching.drift_limit
        size, options = self.sizes.states_per_forward, self.collation()
        if not examples or self.objective.reuse == "none" or not samples:
            return step_batches(examples, size, reuse=self.objective.reuse, **options)
        drifts = self.drifts(examples, samples, int(mix_seeds(seed, DRIFT)))
        note(len(drifts), drift=float(drifts.mean()))
        far = [limit is not None and drift > limit for drift in drifts.tolist()]
        if any(far) and not self.said_drift:
            self.said_drift = True
            log.warning(
                f"reuse={self.objective.reuse} makes a trajectory drift by {float(drifts.max()):.3g}, more than "
                f"drift_limit={limit}: such ones are computed without it"
            )
        exact = [example for example, is_far in zip(examples, far, strict=True) if is_far]
        reused = [example for example, is_far in zip(examples, far, strict=True) if not is_far]
        return chain(
            step_batches(reused, size, reuse=self.objective.reuse, **options), step_batches(exact, size, **options)
        )

    def drifts(self, examples: Sequence[Example], samples: int, seed: int) -> Tensor:
        """(len(examples),) fp32 on the CPU: see :func:`~dopsd.drift.mean_drifts`; there is at least one example."""
        with self.free_passes():
            return mean_drifts(
                self.objective,
                self.decoder.model,
                self.teacher,
                examples,
                samples=samples,
                seed=seed,
                size=self.states_without_gradient,
                **self.collation(),
            )

    def loss(self, batch: StepBatch) -> BatchLoss:
        output = self.objective.forward(self.decoder.model, self.teacher, batch, self.decoder.mask_id)
        figures = {"kl": output.divergence, "clip_fraction": output.clip_fraction, "overlap_top20": output.overlap}
        return BatchLoss(output.loss, figures)

    def most_states(self, rollout: Rollout) -> int:
        return self.states(self.example(rollout, seed=0))

    def costliest(self, short: Rollout, long: Rollout, states: int) -> StepBatch:
        """The last state of one example, and then the first ones of others.

        No other batch has its states in more blocks, and prompts of two lengths need a mask.
        """
        # Trajectories that drift too far are computed without reuse, and all of them may.
        reuse = self.objective.reuse if self.teaching.drift_limit is None else "none"
        few, many = self.example(short if states > 1 else long, seed=0), self.example(long, seed=0)
        return costliest_batch(few, many, states, reuse=reuse, **self.collation())


def reveal_seed(seed: Tensor) -> int:
    """Of what the teacher is shown of a row's response; ``seed`` is the row's, () int64."""
    return int(mix_seeds(seed, REVEAL))


def objective_for(model: DiffusionModel, teaching: TeachingArguments, workspace_bytes: int | None = None) -> Objective:
    """The objective that a model is taught by; UsageError if it can't be."""
    block_causal = model.block_size is not None
    return replace(teaching.objective(), workspace_bytes=workspace_bytes, block_causal=block_causal)


def costliest_batch(short: Example, long: Example, states: int, **options: Any) -> StepBatch:
    """As :meth:`Distillation.costliest`, of two examples; ``options`` are :func:`~dopsd.step_batch.collate`'s."""
    index = [(0, len(short.steps) - 1)]
    index += [(1 + state // len(long.steps), state % len(long.steps)) for state in range(states - 1)]
    return collate([short, *[long] * index[-1][0]], index, **options)
