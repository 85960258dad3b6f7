"""What an update computes, in sizes that can change: examples, batches of their states, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from dopsd.drift import mean_drifts
from dopsd.models import checkpoint_activations, device_of
from dopsd.objective import Objective, StepOutput
from dopsd.rollout import Decoder, Rollout
from dopsd.seeds import REVEAL, mix_seeds
from dopsd.step_batch import Example, StepBatch, step_batches
from dopsd.teacher import TeacherWeights


@dataclass(frozen=True)
class Sizes:
    """What a run can change without changing what it computes, but for rounding and for which inputs dropout drops.

    Args:
        states_per_forward: states of a micro-batch.
        checkpointing: whether activations inside a layer are computed again in the backward pass.
        sequences_per_forward: sequences decoded at a time.
        workspace_bytes: of the ops; None for their own default.
    """

    states_per_forward: int
    checkpointing: bool
    sequences_per_forward: int
    workspace_bytes: int | None = None


class Distillation:
    """A student and its teacher on one network, what is taught, and the sizes in which that is computed.

    Args:
        student: the network with its adapter.
        teacher: whose weights the teacher's passes have.
        objective: what is taught.
        decoder: the network unwrapped, its tokenizer and task.
        sizes: to begin with.
        accelerator: in whose precision passes are computed, and by which gradients are.
    """

    def __init__(
        self,
        student: PeftModel,
        teacher: TeacherWeights,
        objective: Objective,
        decoder: Decoder,
        sizes: Sizes,
        accelerator: Accelerator,
    ) -> None:
        self.student, self.teacher, self.accelerator = student, teacher, accelerator
        self.objective, self.decoder, self.sizes = objective, decoder, sizes
        if sizes.checkpointing:
            checkpoint_activations(decoder.model, True)

    def resize(self, sizes: Sizes) -> None:
        """Compute with these sizes from now on."""
        network = self.decoder.model
        if sizes.checkpointing != self.sizes.checkpointing and network.supports_gradient_checkpointing:
            checkpoint_activations(network, sizes.checkpointing)
        self.sizes = sizes
        self.decoder = replace(self.decoder, batch_size=sizes.sequences_per_forward)
        self.objective = replace(self.objective, workspace_bytes=sizes.workspace_bytes)

    def collation(self) -> dict[str, Any]:
        """Options of :func:`~dopsd.step_batch.collate`, but for reuse."""
        decoder = self.decoder
        return {"mask_id": decoder.mask_id, "pad_id": decoder.eos_id, "device": device_of(decoder.model)}

    def example(self, rollout: Rollout, seed: int) -> Example:
        """What is trained on of a rollout; drawn from ``seed`` alone."""
        decoder, prompt_ids = self.decoder, rollout.trajectory.prompt_ids
        if self.objective.teacher_context == "reference":
            prompt_ids = decoder.encode(decoder.task.reference_prompt(rollout.row)).cpu()
        return self.objective.example(rollout.trajectory, prompt_ids, eos_id=decoder.eos_id, seed=seed)

    def examples(self, rollouts: Sequence[Rollout], seeds: Sequence[int]) -> list[Example]:
        """Those of ``rollouts``, leaving out the ones with no step to train on."""
        examples = [
            self.example(rollout, int(mix_seeds(seed, REVEAL))) for rollout, seed in zip(rollouts, seeds, strict=True)
        ]
        return [example for example in examples if len(example.steps)]

    def drifts(self, examples: Sequence[Example], samples: int, seed: int) -> Tensor:
        """(len(examples),) fp32 on the CPU: see :func:`~dopsd.drift.mean_drifts`; there is at least one example."""
        with self.accelerator.autocast():
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

    @property
    def states_without_gradient(self) -> int:
        """States of a batch of which no gradient is taken: whole ones take what decoding does."""
        return min(self.sizes.states_per_forward, self.sizes.sequences_per_forward)

    def batches(self, examples: Sequence[Example], exact: Sequence[Example] = ()) -> Iterator[StepBatch]:
        """Every state of ``examples``, with the objective's reuse, and of ``exact`` without, in micro-batches."""
        size, options = self.sizes.states_per_forward, self.collation()
        reused = step_batches(examples, size, reuse=self.objective.reuse, **options)
        return chain(reused, step_batches(exact, size, **options))

    def distil(
        self, batches: Iterable[StepBatch], count: int, *, on_batch: Callable[[int], object] | None = None
    ) -> tuple[list[StepOutput], Tensor, int]:  # per batch; loss; tokens of the student
        """Forward and backward over ``batches``; ``count`` examples share the update.

        ``on_batch`` is told of each finished batch's states.
        """
        self.student.train()
        outputs, loss, tokens = [], torch.zeros((), device=self.accelerator.device), 0
        for batch in batches:
            with self.accelerator.autocast():
                output = self.objective.forward(self.decoder.model, self.teacher, batch, self.decoder.mask_id)
            self.accelerator.backward(output.loss / count)
            loss = loss + output.loss.detach() / count
            outputs.append(replace(output, loss=output.loss.detach()))  # the graph is not kept
            tokens += batch.student.tokens
            if on_batch is not None:
                on_batch(len(batch))
        return outputs, loss, tokens
