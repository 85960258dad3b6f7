"""Measured peaks: synthetic micro-batches of a run that is about to begin."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dopsd.config import RolloutArguments, TeachingArguments, TrainingArguments
from dopsd.distillation import Distillation
from dopsd.memory.meter import Meter, unless_out_of_memory
from dopsd.memory.planner import Persistent, optimizer_bytes
from dopsd.models import device_of
from dopsd.rollout import Rollout
from dopsd.sampler import Decoding, decode
from dopsd.step_batch import Example, StepBatch, collate
from dopsd.tasks import Row
from dopsd.trajectory import Trajectory


def synthetic_trajectory(prompt_ids: Tensor, decoding: Decoding, vocab: int, eos_id: int) -> Trajectory:
    """A response of random tokens with the most steps that ``decoding`` can make."""
    counts = [[1] * decoding.block_length] * decoding.blocks if decoding.threshold is not None else decoding.schedule()
    reveals = torch.tensor([count for block in counts for count in block])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (decoding.gen_length,), generator=generator)
    tokens[tokens == eos_id] = (eos_id + 1) % vocab  # an end of the text would hide what is behind it
    reveal_step = torch.arange(len(reveals)).repeat_interleave(reveals)
    return Trajectory(prompt_ids.cpu(), tokens, reveal_step, decoding.block_length)


def costliest_batch(short: Example, long: Example, states: int, **options: Any) -> StepBatch:
    """The costliest micro-batch: the last state of one example, and then the first ones of others.

    No other has its states in more blocks, and prompts of two lengths need a mask. ``options`` are those of
    :func:`~dopsd.step_batch.collate`.
    """
    index = [(0, len(short.steps) - 1)]
    index += [(1 + state // len(long.steps), state % len(long.steps)) for state in range(states - 1)]
    return collate([short, *[long] * index[-1][0]], index, **options)


class RunProbe:
    """Measures micro-batches of a distillation, and leaves no trace of them: no gradient, no draw.

    Args:
        distillation: whose passes, and decoding, are measured.
        meter: of its device.
        rows: that are trained on.
        rollouts, teaching, args: options of the run.
    """

    def __init__(
        self,
        distillation: Distillation,
        meter: Meter,
        rows: Sequence[Row],
        rollouts: RolloutArguments,
        teaching: TeachingArguments,
        args: TrainingArguments,
    ) -> None:
        self.distillation, self.meter = distillation, meter
        self.rollouts, self.teaching, self.args = rollouts, teaching, args
        decoder, task = distillation.decoder, distillation.decoder.task
        rows = list(rows)
        prompts = sorted((decoder.encode(task.prompt(row)) for row in rows), key=len)
        self.prompts = prompts[0] if args.train_batch_size > 1 else prompts[-1], prompts[-1]
        if distillation.objective.teacher_context == "reference":
            rows.sort(key=lambda row: len(decoder.encode(task.reference_prompt(row))))
        decoding, self.vocab = rollouts.decoding(), len(decoder.model.lm_head_weight)
        trajectories = [synthetic_trajectory(prompt, decoding, self.vocab, decoder.eos_id) for prompt in self.prompts]
        self.short, self.long = (
            distillation.example(Rollout(row, trajectory, "", score=1.0, tries=1), seed=0)
            for row, trajectory in zip((rows[0], rows[-1]), trajectories, strict=True)
        )
        # Trajectories that drift too far are computed without reuse, and all of them may.
        self.reuse = distillation.objective.reuse if teaching.drift_limit is None else "none"
        self.trained = [p for p in distillation.student.parameters() if p.requires_grad]
        several = distillation.accelerator.num_processes > 1
        self.buckets = sum(p.nbytes for p in self.trained) if several else 0
        self.persistent = self.at_rest()

    def at_rest(self) -> Persistent:
        """What is there before anything is computed, and what comes to it by arithmetic."""
        gc.collect()
        self.meter.take_peak()
        used = self.meter.take_peak()
        student = self.distillation.student
        held = [*student.parameters(), *student.buffers()]
        trained = sum(p.nbytes for p in self.trained)
        weights = sum(p.nbytes for p in held) - trained
        optimizer = optimizer_bytes(self.args.optim) * sum(p.numel() for p in self.trained)
        runtime = max(0, used - weights - trained) + self.meter.allowance
        return Persistent(weights, trained, trained + self.buckets, optimizer, runtime)

    @property
    def states(self) -> int:
        """Those of a whole update, at most."""
        return -(-self.args.train_batch_size * len(self.long.steps) // self.teaching.updates_per_batch)

    def tokens(self, states: int) -> int:
        return self.batch(states).student.tokens

    def batch(self, states: int) -> StepBatch:
        """The micro-batch that is measured."""
        return costliest_batch(self.short, self.long, states, reuse=self.reuse, **self.distillation.collation())

    def training(self, states: int, checkpointing: bool) -> int | None:
        distillation = self.distillation
        distillation.resize(replace(distillation.sizes, checkpointing=checkpointing))
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)  # as they are from an update's second micro-batch on
        peak = self.peak(lambda: distillation.distil([self.batch(states)], count=1))
        distillation.student.zero_grad()
        return peak

    def decoding(self, sequences: int) -> int | None:
        decoder, own = self.distillation.decoder, self.rollouts.decoding()
        # A step of each block, all at the temperature of retries, whose noise takes memory too.
        temperature = self.rollouts.temperature if self.rollouts.pass_k > 1 else 0.0
        quick = replace(own, steps=own.blocks, threshold=None, stop_at_eos=False, temperature=temperature)
        short, long = (len(prompt) for prompt in self.prompts)
        # All are different, because equal ones may share what is computed; one is short, which takes a mask.
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocab, (sequences, long), generator=generator).to(device_of(decoder.model))
        prompts = [*ids[:-1], ids[-1, -short:] if sequences > 1 else ids[-1]]
        seeds = torch.arange(sequences)

        def run() -> object:
            with self.distillation.accelerator.autocast():
                return decode(
                    decoder.model, prompts, quick, mask_id=decoder.mask_id, eos_id=decoder.eos_id, seeds=seeds
                )

        return self.peak(run)

    def peak(self, action: Callable[[], object]) -> int | None:
        """The peak of ``action``, as it would be in the run."""
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.meter.take_peak()
            done = unless_out_of_memory(action)
            peak = self.meter.take_peak()
        later = self.persistent.optimizer + self.buckets
        return None if done is None else peak + later + self.meter.allowance
