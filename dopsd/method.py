"""How a student learns: what every method of training has in common, and what it has of its own.

    rows -> rollouts -> examples -> an update's batches -> loss

The trainer, the planner of memory, checkpoints, logs and reports know no more of a method than what is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from dopsd.config import RolloutArguments, TeachingArguments
from dopsd.errors import require
from dopsd.metrics import of_rollouts
from dopsd.models import checkpoint_activations, device_of
from dopsd.models.bidirectional import DiffusionModel
from dopsd.ranks import turns
from dopsd.rollout import Decoder, Rollout
from dopsd.seeds import DROPOUT, mix_seeds
from dopsd.sharding import gathered, is_sharded
from dopsd.tasks import Row
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


class Batch(Protocol):
    """A micro-batch of so many states: sequences of which the student computes a gradient."""

    def __len__(self) -> int: ...

    @property
    def tokens(self) -> int:
        """Those that the student's pass computes, padding included."""


class BatchLoss(NamedTuple):
    """What a method makes of a micro-batch.

    Args:
        loss: scalar, the sum of its examples' losses.
        figures: metrics by name, (R,) each, detached; the log has the means over all R of an update.
    """

    loss: Tensor
    figures: Mapping[str, Tensor]


class Serialisable(Protocol):
    """An example of a method, which a checkpoint keeps."""

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""


E = TypeVar("E", bound=Serialisable)
B = TypeVar("B", bound=Batch)
# Keeps metrics that are means over so many things for the log.
Note = Callable[..., object]


class Method(ABC, Generic[E, B]):
    """A student, the weights that it is held to, and how it learns from a batch of rows.

    Args:
        student: the network with its adapter.
        teacher: other weights on the same network: a teacher's, or those of a reference policy.
        decoder: the network unwrapped, its tokenizer and task.
        sizes: to begin with.
        accelerator: in whose precision passes are computed, and by which gradients are.
        rollouts, teaching: options.
    """

    #: The class of the examples; its ``from_json`` is the inverse of their ``to_json``.
    example_type: ClassVar[type[Any]]
    #: What a card says of it: what the model does, and learns.
    summary: ClassVar[str]
    #: Whether some pass has other weights than the student's: a teacher's, or those of a reference policy.
    has_teacher: ClassVar[bool] = True
    #: Whether some pass has a task's ``reference_prompt``.
    shows_references: bool = False

    def __init__(
        self,
        student: PeftModel,
        teacher: TeacherWeights,
        decoder: Decoder,
        sizes: Sizes,
        accelerator: Accelerator,
        rollouts: RolloutArguments,
        teaching: TeachingArguments,
    ) -> None:
        self.student, self.teacher, self.accelerator = student, teacher, accelerator
        self.decoder, self.sizes = decoder, sizes
        self.decoding, self.teaching = rollouts, teaching
        #: The share of the run's updates that are behind when a batch of rows is begun.
        self.progress = 0.0
        if sizes.checkpointing:
            checkpoint_activations(decoder.model, True)

    # ---- what a method is ----

    @classmethod
    def check_model(cls, model: DiffusionModel, teaching: TeachingArguments) -> None:
        """Raise UsageError if the model can't be taught so."""
        hint = "only d_opsd trains block-causal models: other methods mask all of a response, which these never see"
        require(model.block_size is None, "method", teaching.method, hint)

    def check(self, rows: Sequence[Row]) -> None:
        """Raise RunError if something of the rows can't be trained on; their prompts are known to fit."""

    def rollouts(
        self,
        decoder: Decoder,
        rows: Sequence[Row],
        seeds: Tensor,  # (N,) int64
        on_rows: Callable[[int], object],
    ) -> list[Rollout]:
        """Graded responses to the rows, drawn from their seeds; none if a method learns from the rows alone.

        Unless it says otherwise: the first correct one of at most ``pass_k`` tries at each row, else the best; or the
        best of all.
        """
        options = self.decoding
        tries = options.first_try(), seeds, options.pass_k, options.temperature
        return decoder.pass_at_k(rows, *tries, every=options.all_tries, on_rows=on_rows)

    @abstractmethod
    def examples(
        self,
        rows: Sequence[Row],
        rollouts: Sequence[Rollout],
        seeds: Tensor,  # (N,) int64
    ) -> list[E]:
        """What is trained on of the rows and their :meth:`rollouts`."""

    @abstractmethod
    def states(self, example: E) -> int:
        """How many states of a micro-batch an example takes."""

    @abstractmethod
    def batches(self, examples: Sequence[E], seed: Tensor, note: Note) -> Iterator[B]:
        """An update's examples in micro-batches of ``sizes.states_per_forward`` states.

        Args:
            examples: those of one of the :meth:`slices`.
            seed: () int64, of what is drawn.
            note: takes metrics, as ``note(over, name=mean)``.
        """

    @abstractmethod
    def loss(self, batch: B) -> BatchLoss:
        """The loss of a micro-batch, with a gradient for the student."""

    @abstractmethod
    def most_states(self, rollout: Rollout) -> int:
        """The states that a prompt can give all updates of its batch, if its responses are as this one."""

    @abstractmethod
    def costliest(self, short: Rollout, long: Rollout, states: int) -> B:
        """A micro-batch that takes as much memory as one of ``states`` states can, if responses are as these two."""

    def size(self, examples: Sequence[E]) -> float:
        """What the sum of the examples' losses is divided by: their number, unless a method says otherwise."""
        return len(examples)

    def slices(self, examples: Sequence[E]) -> list[list[E]]:
        """The examples of each update that a batch of rows is for."""
        count = self.teaching.updates_per_batch
        bounds = [part * len(examples) // count for part in range(count + 1)]
        return [list(examples[begin:end]) for begin, end in pairwise(bounds)]

    def figures(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Metrics of at least one rollout: means."""
        return of_rollouts(rollouts, self.decoder.eos_id)

    # ---- what all methods share ----

    @contextmanager
    def free_passes(self) -> Iterator[None]:
        """Inside, each process may make any number of passes without a gradient, in the precision of training.

        All processes enter it.
        """
        with gathered(self.decoder.model), self.accelerator.autocast():
            yield

    def resize(self, sizes: Sizes) -> None:
        """Compute with these sizes from now on."""
        network = self.decoder.model
        if sizes.checkpointing != self.sizes.checkpointing and network.supports_gradient_checkpointing:
            checkpoint_activations(network, sizes.checkpointing)
        self.sizes = sizes
        self.decoder = replace(self.decoder, batch_size=sizes.sequences_per_forward)

    def collation(self) -> dict[str, Any]:
        """What batches are made with: special tokens, and the device."""
        decoder = self.decoder
        return {"mask_id": decoder.mask_id, "pad_id": decoder.eos_id, "device": device_of(decoder.model)}

    @property
    def states_without_gradient(self) -> int:
        """States of a batch of which no gradient is taken: whole ones take what decoding does."""
        return min(self.sizes.states_per_forward, self.sizes.sequences_per_forward)

    def backward(
        self,
        batches: Iterable[B],
        size: float,
        seed: Tensor | int,  # () int64
        *,
        on_batch: Callable[[int], object] | None = None,
    ) -> tuple[list[Mapping[str, Tensor]], Tensor]:  # each batch's figures; loss
        """Forward and backward over ``batches``, whose examples are part of an update of this ``size``.

        Args:
            batches: the same on all processes, which take them in turn.
            size: what the sum of all losses is divided by.
            seed: of what passes draw, such as inputs that are dropped: mixed with the number of the batch, so that it
                does not depend on the processes.
            on_batch: told of each finished batch's states.
        """
        self.student.train()
        figures, loss = [], torch.zeros((), device=self.accelerator.device)
        network = self.decoder.model
        for number, batch, mine in turns(batches, everyone=is_sharded(network)):
            torch.manual_seed(int(mix_seeds(seed, DROPOUT, number)))
            with self.accelerator.autocast():
                output = network.compute(partial(self.loss, batch))
            self.accelerator.backward(output.loss / size if mine else 0 * output.loss)
            if not mine:  # others need this process in their passes
                continue
            loss = loss + output.loss.detach() / size
            figures.append(output.figures)
            if on_batch is not None:
                on_batch(len(batch))
        return figures, loss
