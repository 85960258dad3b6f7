"""Measured peaks: synthetic micro-batches of a run that is about to begin."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dopsd.config import RolloutArguments, TeachingArguments, TrainingArguments
from dopsd.memory.meter import Meter
from dopsd.memory.planner import Persistent, optimizer_bytes
from dopsd.method import Batch, Method
from dopsd.models import device_of
from dopsd.out_of_memory import unless_out_of_memory
from dopsd.rollout import Rollout
from dopsd.sampler import Decoding, decode
from dopsd.tasks import Row
from dopsd.trajectory import Trajectory


def synthetic_trajectory(
    prompt_ids: Tensor, decoding: Decoding, vocab: int, *special: int, lead: int = 0
) -> Trajectory:
    """A response of random tokens, none of them ``special``, with the most steps that ``decoding`` can make.

    ``lead`` is as of a :class:`~dopsd.trajectory.Trajectory`.
    """
    length, width = decoding.gen_length, decoding.block_length
    schedule = [[1] * width] * decoding.blocks if decoding.threshold is not None else decoding.schedule()
    reveals: list[int] = []
    for start in range(-lead, length, width):
        left = min(start + width, length) - max(start, 0)
        for count in schedule[min((start + lead) // width, len(schedule) - 1)]:
            reveals.append(min(count, left))
            left -= reveals[-1]
    shares = torch.tensor([count for count in reveals if count])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (decoding.gen_length,), generator=generator)
    # An end of the text would hide what is behind it, and the mask has no probability.
    tokens[torch.isin(tokens, torch.tensor(special))] = next(token for token in range(vocab) if token not in special)
    reveal_step = torch.arange(len(shares)).repeat_interleave(shares)
    return Trajectory(prompt_ids.cpu(), tokens, reveal_step, width, lead)


class RunProbe:
    """Measures micro-batches of a method, and leaves no trace of them: no gradient, no draw.

    Args:
        method: whose passes, and decoding, are measured.
        meter: of its device.
        rows: that are trained on.
        rollouts, teaching, args: options of the run.
    """

    def __init__(
        self,
        method: Method,
        meter: Meter,
        rows: Sequence[Row],
        rollouts: RolloutArguments,
        teaching: TeachingArguments,
        args: TrainingArguments,
    ) -> None:
        self.method, self.meter = method, meter
        self.rollouts, self.teaching, self.args = rollouts, teaching, args
        decoder = method.decoder
        rows = list(rows)
        prompts = sorted(map(decoder.prompt_ids, rows), key=len)
        self.prompts = prompts[0] if args.train_batch_size > 1 else prompts[-1], prompts[-1]
        if method.shows_references:
            rows.sort(key=lambda row: len(decoder.reference_ids(row)))
        decoding, self.vocab = rollouts.decoding(), len(decoder.model.lm_head_weight)
        special = decoder.eos_id, decoder.mask_id
        trajectories = [
            synthetic_trajectory(prompt, decoding, self.vocab, *special, lead=decoder.model.lead(len(prompt)))
            for prompt in self.prompts
        ]
        self.short, self.long = (
            Rollout(row, trajectory, "", score=1.0, tries=1)
            for row, trajectory in zip((rows[0], rows[-1]), trajectories, strict=True)
        )
        self.trained = [p for p in method.student.parameters() if p.requires_grad]
        self.processes = method.accelerator.num_processes
        self.persistent = self.at_rest()

    def at_rest(self) -> Persistent:
        """What is there before anything is computed, and what comes to it by arithmetic."""
        gc.collect()
        self.meter.take_peak()
        used = self.meter.take_peak()
        student = self.method.student
        held = [*student.parameters(), *student.buffers()]
        trained = sum(p.nbytes for p in self.trained)
        weights = sum(p.nbytes for p in held) - trained
        optimizer = optimizer_bytes(self.args.optim) * sum(p.numel() for p in self.trained)
        runtime = max(0, used - weights - trained) + self.meter.allowance
        return Persistent(weights, trained, trained, optimizer, runtime)

    @property
    def states(self) -> int:
        """Those of a whole update, at most."""
        return -(-self.args.train_batch_size * self.method.most_states(self.long) // self.teaching.updates_per_batch)

    def tokens(self, states: int) -> int:
        return self.batch(states).tokens

    def batch(self, states: int) -> Batch:
        """The micro-batch that is measured."""
        return self.method.costliest(self.short, self.long, states)

    def training(self, states: int, checkpointing: bool) -> int | None:
        method = self.method
        method.resize(replace(method.sizes, checkpointing=checkpointing))
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)  # as they are from an update's second micro-batch on
        peak = self.peak(lambda: method.backward([self.batch(states)] * self.processes, 1, seed=0))  # one for each
        method.student.zero_grad()
        return peak

    def decoding(self, sequences: int) -> int | None:
        decoder, own = self.method.decoder, self.rollouts.decoding()
        # A step of each block, all at the highest temperature of tries, whose noise takes memory too.
        temperature = max(self.rollouts.first_temperature, self.rollouts.temperature * (self.rollouts.pass_k > 1))
        scheduled = replace(own, steps=own.blocks, threshold=None, sub_block_length=None)
        quick = replace(scheduled, stop_at_eos=False, temperature=temperature)
        short, long = (len(prompt) for prompt in self.prompts)
        # All are different, because equal ones may share what is computed; one is short, which takes a mask.
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocab, (sequences, long), generator=generator).to(device_of(decoder.model))
        prompts = [*ids[:-1], ids[-1, -short:] if sequences > 1 else ids[-1]]
        seeds = torch.arange(sequences)

        def run() -> object:
            with self.method.accelerator.autocast():
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
        later = self.persistent.optimizer
        return None if done is None else peak + later + self.meter.allowance
