"""Measured peaks: synthetic micro-batches of a run that is about to begin."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dopsd.memory.meter import Meter, unless_out_of_memory
from dopsd.memory.planner import Persistent, optimizer_bytes
from dopsd.models import device_of
from dopsd.objective import Objective
from dopsd.rollout import Decoder, Rollout
from dopsd.sampler import Decoding, decode
from dopsd.step_batch import Example, StepBatch, collate
from dopsd.trajectory import Trajectory

if TYPE_CHECKING:
    from dopsd.trainer import Trainer


def synthetic_example(
    objective: Objective, decoder: Decoder, row: Any, prompt_ids: Tensor, decoding: Decoding, vocab: int
) -> Example:
    """An example with the most states that ``decoding`` can make, of random tokens; ``row`` is its teacher's."""
    counts = [[1] * decoding.block_length] * decoding.blocks if decoding.threshold is not None else decoding.schedule()
    reveals = torch.tensor([count for block in counts for count in block])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (decoding.gen_length,), generator=generator)
    tokens[tokens == decoder.eos_id] = (decoder.eos_id + 1) % vocab  # an end of the text would hide what is behind it
    reveal_step = torch.arange(len(reveals)).repeat_interleave(reveals)
    trajectory = Trajectory(prompt_ids.cpu(), tokens, reveal_step, decoding.block_length)
    return objective.example(Rollout(row, trajectory, "", score=1.0, tries=1), decoder, seed=0)


def costliest_batch(short: Example, long: Example, states: int, **options: Any) -> StepBatch:
    """The costliest micro-batch: the last state of one example, and then the first ones of others.

    No other has its states in more blocks, and prompts of two lengths need a mask. ``options`` are those of
    :func:`~dopsd.step_batch.collate`.
    """
    index = [(0, len(short.steps) - 1)]
    index += [(1 + state // len(long.steps), state % len(long.steps)) for state in range(states - 1)]
    return collate([short, *[long] * index[-1][0]], index, **options)


class RunProbe:
    """Measures micro-batches of a trainer, and leaves no trace of them: no gradient, no draw.

    Args:
        trainer: whose network, objective and decoder are measured.
        meter: of its device.
    """

    def __init__(self, trainer: Trainer, meter: Meter) -> None:
        self.trainer, self.meter = trainer, meter
        decoder, task = trainer.decoder, trainer.decoder.task
        rows = [row for _, row in trainer.train_dataset]  # type: ignore[union-attr]
        prompts = sorted((decoder.encode(task.prompt(row)) for row in rows), key=len)
        self.prompts = prompts[0] if trainer.args.train_batch_size > 1 else prompts[-1], prompts[-1]
        if trainer.teaching.teacher_context == "reference":
            rows.sort(key=lambda row: len(decoder.encode(task.reference_prompt(row))))
        decoding, self.vocab = trainer.rollouts.decoding(), len(decoder.model.lm_head_weight)
        self.short, self.long = (
            synthetic_example(trainer.objective, decoder, row, prompt, decoding, self.vocab)
            for row, prompt in zip((rows[0], rows[-1]), self.prompts, strict=True)
        )
        # Trajectories that drift too far are computed without reuse, and all of them may.
        self.reuse = trainer.teaching.reuse if trainer.teaching.drift_limit is None else "none"
        self.trained = [p for p in trainer.student.parameters() if p.requires_grad]
        self.buckets = sum(p.nbytes for p in self.trained) if trainer.accelerator.num_processes > 1 else 0
        self.persistent = self.at_rest()

    def at_rest(self) -> Persistent:
        """What is there before anything is computed, and what comes to it by arithmetic."""
        gc.collect()
        self.meter.take_peak()
        used = self.meter.take_peak()
        held = [*self.trainer.student.parameters(), *self.trainer.student.buffers()]
        trained = sum(p.nbytes for p in self.trained)
        weights = sum(p.nbytes for p in held) - trained
        optimizer = optimizer_bytes(self.trainer.args.optim) * sum(p.numel() for p in self.trained)
        runtime = max(0, used - weights - trained) + self.meter.allowance
        return Persistent(weights, trained, trained + self.buckets, optimizer, runtime)

    @property
    def states(self) -> int:
        """Those of a whole update, at most."""
        rows, slices = self.trainer.args.train_batch_size, self.trainer.teaching.update_per_slice
        return -(-rows * len(self.long.steps) // slices)

    def tokens(self, states: int) -> int:
        return self.batch(states).student.tokens

    def batch(self, states: int) -> StepBatch:
        """The micro-batch that is measured."""
        return costliest_batch(self.short, self.long, states, reuse=self.reuse, **self.trainer.collation())

    def training(self, states: int, checkpointing: bool) -> int | None:
        trainer = self.trainer
        trainer.resize(replace(trainer.sizes, checkpointing=checkpointing))
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)  # as they are from an update's second micro-batch on
        peak = self.peak(lambda: trainer.distil([self.batch(states)], states, count=1))
        trainer.student.zero_grad()
        return peak

    def decoding(self, sequences: int) -> int | None:
        trainer, decoder = self.trainer, self.trainer.decoder
        own = trainer.rollouts.decoding()
        # A step of each block, all at the temperature of retries, whose noise takes memory too.
        temperature = trainer.rollouts.temperature if trainer.rollouts.pass_k > 1 else 0.0
        quick = replace(own, steps=own.blocks, threshold=None, stop_at_eos=False, temperature=temperature)
        short, long = (len(prompt) for prompt in self.prompts)
        # All are different, because equal ones may share what is computed; one is short, which takes a mask.
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocab, (sequences, long), generator=generator).to(device_of(decoder.model))
        prompts = [*ids[:-1], ids[-1, -short:] if sequences > 1 else ids[-1]]
        seeds = torch.arange(sequences)

        def run() -> object:
            with trainer.accelerator.autocast():
                return decode(
                    decoder.model, prompts, quick, mask_id=decoder.mask_id, eos_id=decoder.eos_id, seeds=seeds
                )

        return self.peak(run)

    def peak(self, action: Callable[[], object]) -> int | None:
        """The peak of ``action``, as it would be in the run."""
        device = self.trainer.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.meter.take_peak()
            done = unless_out_of_memory(action)
            peak = self.meter.take_peak()
        later = self.persistent.optimizer + self.buckets
        return None if done is None else peak + later + self.meter.allowance
