"""Memory: how much a run may take, how much its sizes take, and which sizes follow from that.

A plan comes from probes: single micro-batches, made up to be as large as a run's can be, whose peak is measured. The
peak is a fixed part and a part for every token that is computed, so few probes suffice, and each is run only if those
before it predict that it fits.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from dopsd.errors import UsageError, must_be, require
from dopsd.models import device_of
from dopsd.objective import Objective
from dopsd.rollout import Decoder, Rollout
from dopsd.sampler import Decoding, decode
from dopsd.step_batch import Lesson, StepBatch, collate
from dopsd.tables import show
from dopsd.trajectory import Trajectory

if TYPE_CHECKING:
    from dopsd.trainer import Trainer

T = TypeVar("T")

# What a peak consists of, as it is called in tables and errors.
PARTS = {
    "weights": "weights",
    "trained": "trained parameters",
    "gradients": "gradients",
    "optimizer": "optimiser state",
    "runtime": "runtime (CUDA, or interpreter and libraries)",
    "activations": "activations",
    "workspace": "workspace",
}

GIB = 1 << 30

# Tokens a forward from which on products are bound by arithmetic on today's GPUs, and no longer by reading the weights:
# larger micro-batches gain little then, and computing activations twice costs a third.
ENOUGH_TOKENS = 4096

# A probe has at most so many times the states of the largest that fitted: far ahead, a line through small sizes is
# wrong, because what is the peak in small ones need not be it in large ones.
GROWTH = 8
# Sizes less than this factor apart are not worth another probe.
NEAR = 1.05

# The workspace of the ops is this share of the budget, and at least and at most so many bytes. The upper bounds are
# the ops' own defaults, from which on more makes nothing faster.
WORKSPACE_SHARE = 1 / 64
LEAST_WORKSPACE = 16 << 20
MOST_WORKSPACE = {"cpu": 64 << 20, "cuda": 256 << 20}

# Of glibc's mallopt: from which size on (bytes) a block is mapped by itself.
M_MMAP_THRESHOLD = -3
LARGE_BLOCK = 1 << 20

# CUDA's context and what its allocator holds in pieces too small to use: nothing that PyTorch's count of allocated
# memory shows. An assumption: contexts take about half of it.
CUDA_ALLOWANCE = GIB


def read_bytes(argument: str, text: str, total: int | None) -> int:
    """Bytes from ``24`` or ``24GiB``, or from ``0.8`` or ``80%`` of ``total``; a bare number up to 1 is a share.

    Raises:
        UsageError: it is neither, or more than ``total``; without a ``total`` there are no shares.
    """
    shares = "" if total is None else ", or a share of the device's memory (0.8, 80%)"
    accepted = f"a positive number of GiB (24, 24GiB){shares}"
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(gib|%)?", text.strip().lower())
    must_be(found is not None, argument, text, accepted)
    number, unit = float(found[1]), found[2]  # type: ignore[index]
    must_be(0 < number < math.inf, argument, text, accepted)
    if unit == "%" or (unit is None and number <= 1 and total is not None):
        share = number / 100 if unit == "%" else number
        must_be(total is not None and share <= 1, argument, text, accepted)
        return int(share * (total or 0))
    accepted = f"at most the {(total or 0) / GIB:.1f} GiB that the device has"
    must_be(total is None or number * GIB <= total, argument, text, accepted)
    return int(number * GIB)


# ---- how much is in use ----


class Meter(ABC):
    """Measures a device's memory; ``allowance`` is for what it does not see (bytes)."""

    allowance = 0

    @abstractmethod
    def total(self) -> int:
        """The device's memory in bytes."""

    @abstractmethod
    def lap(self) -> int:
        """The peak since the last call in bytes; the next begins at what is in use now."""


class CudaMeter(Meter):
    """What PyTorch has allocated on a GPU."""

    allowance = CUDA_ALLOWANCE

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def total(self) -> int:
        return torch.cuda.get_device_properties(self.device).total_memory

    def lap(self) -> int:
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


class ResidentMeter(Meter):
    """What of this process is resident, interpreter and libraries included: Linux keeps its high-water mark."""

    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self) -> None:
        # glibc keeps freed memory for later, in pieces of which too many are too small: that would double some peaks.
        # Blocks of this size and above go back to the system instead, which takes time. Other C libraries have no such
        # option.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)

    def total(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def lap(self) -> int:
        found = re.search(r"VmHWM:\s*(\d+) kB", self.status.read_text())
        assert found is not None
        self.reset.write_text("5")
        return int(found[1]) << 10


def meter_of(device: torch.device, budget: str) -> Meter:
    """The meter of a device; UsageError, naming the ``budget``, where peaks can't be measured."""
    if device.type == "cuda":
        return CudaMeter(device)
    measurable = device.type == "cpu" and os.access(ResidentMeter.reset, os.W_OK)
    accepted = "peaks of memory can be measured on CUDA GPUs, and on CPUs under Linux"
    require(measurable, "memory_budget", budget, accepted)
    return ResidentMeter()


# ---- running out of it ----


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU's allocator, had no more."""
    texts = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def attempt(action: Callable[[], T]) -> T | None:
    """What ``action`` returns, or None if memory ran out; all that it had allocated is free again then."""
    try:
        return action()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Out of the handler, nothing refers to the error any more, nor by its traceback to the graph that was computed.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


# ---- plans ----


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


@dataclass(frozen=True)
class Standing:
    """Bytes that are in use throughout, whatever the sizes.

    Args:
        weights: of all that is not trained: the base, an averaged teacher.
        trained: the adapter's parameters.
        gradients: theirs; with several processes also the buckets in which DistributedDataParallel has them.
        optimizer: what the optimiser remembers of them.
        runtime: on a CPU the interpreter and its libraries; on a GPU an allowance for CUDA's context and
            fragmentation, which is an assumption.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    runtime: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Plan:
    """Sizes, and the peaks (bytes) that they are predicted to have.

    Args:
        budget: what may be used.
        sizes: the choice.
        tokens: that the student computes in a micro-batch.
        standing: what is in use throughout.
        training, decoding: the predicted peaks of the two phases, everything included.
    """

    budget: int
    sizes: Sizes
    tokens: int
    standing: Standing
    training: int
    decoding: int

    @property
    def peak(self) -> int:
        """The predicted peak of the whole run."""
        return max(self.training, self.decoding)

    def parts(self) -> dict[str, int]:
        """What the peak of training consists of, in bytes."""
        computed = self.training - self.standing.total
        workspace = min(computed, self.sizes.workspace_bytes or 0)
        return {**asdict(self.standing), "activations": computed - workspace, "workspace": workspace}

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, in bytes."""
        peaks = {"training": self.training, "decoding": self.decoding, "whole": self.peak}
        return {"budget": self.budget, "sizes": asdict(self.sizes), "predicted": peaks, "parts": self.parts()}

    def __str__(self) -> str:
        sizes = self.sizes
        checkpointing = "with" if sizes.checkpointing else "without"
        return (
            f"{sizes.states_per_forward} states a forward ({self.tokens} tokens) {checkpointing} checkpointing, "
            f"{sizes.sequences_per_forward} sequences a forward in decoding, a workspace of "
            f"{(sizes.workspace_bytes or 0) >> 20} MiB"
        )

    def show(self) -> None:
        """Print the prediction and its parts."""
        sizes = {f"  {PARTS[part]}": size for part, size in self.parts().items()}
        sizes |= {"training": self.training, "decoding": self.decoding, "budget": self.budget}
        show([{"": name, "GiB": gib(size)} for name, size in sizes.items()], "memory: predicted, not measured")


def gib(size: float) -> str:
    """Bytes as GiB, with two digits."""
    return f"{size / GIB:.2f}"


class Probe(Protocol):
    """A run of which the peaks can be asked, in bytes, with all that is standing; None where memory ran out."""

    standing: Standing

    def tokens(self, states: int) -> int:
        """Those that the student computes in a micro-batch."""

    def training(self, states: int, checkpointing: bool) -> int | None:
        """The peak of a micro-batch's forward and backward."""

    def decoding(self, sequences: int) -> int | None:
        """The peak of decoding a batch."""


class Curve:
    """A peak by size: what was measured, and straight lines in between and ahead.

    Args:
        measure: the peak at a size, None if memory ran out.
        tokens: how many are computed at a size.
        standing: the peak at no tokens.
    """

    def __init__(self, measure: Callable[[int], int | None], tokens: Callable[[int], int], standing: int) -> None:
        self.measure, self.tokens = cache(measure), cache(tokens)
        self.points = [(0, standing)]  # (tokens, bytes), ascending

    def at(self, size: int) -> float:
        """The peak at a size in bytes, measured or predicted."""
        tokens = self.tokens(size)
        if len(self.points) == 1:
            return self.points[0][1]
        # Ahead of all points the last two are continued.
        pairs = pairwise(self.points)
        (first, low), (last, high) = next((pair for pair in pairs if tokens <= pair[1][0]), tuple(self.points[-2:]))
        return low + (high - low) * (tokens - first) / (last - first)

    def largest(self, limit: int, sizes: Sequence[int]) -> int:
        """The largest of these ascending ``sizes`` whose measured peak is at most ``limit``; 0 if there is none."""
        best, over = 0, sizes[-1] + 1
        while True:
            reach = max(sizes[0], GROWTH * best)
            open_sizes = [size for size in sizes if NEAR * best < size < over and size <= reach]
            fitting = [size for size in open_sizes if self.at(size) <= limit]
            if not fitting:
                return best
            peak = self.measure(fitting[-1])
            if peak is not None:
                self.points = sorted({**dict(self.points), self.tokens(fitting[-1]): peak}.items())
            if peak is None or peak > limit:
                over = fitting[-1]
            else:
                best = fitting[-1]


class Planner:
    """Chooses sizes that keep to a budget.

    Args:
        probe: what is planned.
        budget: bytes.
        states: of a whole update; no micro-batch has more.
        sequences: that a recipe decodes at a time; no more are.
        workspace_bytes: of the ops.
    """

    def __init__(self, probe: Probe, budget: int, states: int, sequences: int, workspace_bytes: int) -> None:
        self.probe, self.budget, self.states, self.sequences = probe, budget, states, sequences
        self.workspace_bytes = workspace_bytes
        standing = probe.standing.total
        self.training = {
            checkpointing: Curve(partial(probe.training, checkpointing=checkpointing), probe.tokens, standing)
            for checkpointing in (True, False)
        }
        self.decoding = Curve(probe.decoding, lambda size: size, standing - probe.standing.gradients)

    def plan(self) -> Plan | None:
        """The fastest sizes that fit; None if not even the least do, those of :meth:`least`.

        Activations are kept if they all fit, or those of as many tokens as products want; else they are computed
        twice, and as many states as fit at a time.
        """
        sequences = self.decoding.largest(self.budget, even_sizes(self.sequences))
        if not sequences or not self.training[True].largest(self.budget, [1]):
            return None
        states, checkpointing = self.most(checkpointing=False), False
        if states < self.states and (not states or self.probe.tokens(states) < ENOUGH_TOKENS):
            more = self.most(checkpointing=True)
            if more > states:
                states, checkpointing = more, True
        return self.at(Sizes(states, checkpointing, sequences, self.workspace_bytes))

    def most(self, checkpointing: bool) -> int:
        """The most states a forward that fit; 0 if one does not."""
        return self.training[checkpointing].largest(self.budget, even_sizes(self.states))

    def least(self) -> Plan:
        """The smallest sizes: what is needed at the least, as far as that has been measured."""
        return self.at(Sizes(1, True, 1, self.workspace_bytes))

    def at(self, sizes: Sizes) -> Plan:
        """The plan that has these sizes."""
        return Plan(
            self.budget,
            sizes,
            self.probe.tokens(sizes.states_per_forward),
            self.probe.standing,
            int(self.training[sizes.checkpointing].at(sizes.states_per_forward)),
            int(self.decoding.at(sizes.sequences_per_forward)),
        )


def even_sizes(count: int) -> list[int]:
    """Sizes of batches, ascending, that cut ``count`` into equal ones but for rounding."""
    return sorted({-(-count // batches) for batches in range(1, count + 1)})


def workspace_for(budget: int, device: str) -> int:
    """Bytes of workspace for the ops on a ``cpu`` or ``cuda`` device."""
    return int(min(max(budget * WORKSPACE_SHARE, LEAST_WORKSPACE), MOST_WORKSPACE[device]))


def optimizer_bytes(optim: str) -> int:
    """Bytes that an optimiser remembers of a parameter: two moments or three, in 8 bits or in fp32.

    What remembers less than AdamW is counted like AdamW.
    """
    moments = 3 if optim == "grokadamw" or "ademamix" in optim else 2
    return moments * (1 if "8bit" in optim else 4)


def too_little(argument: str, text: str, least: Plan, remedies: str) -> UsageError:
    """The error of a budget that does not do: what would be needed, what for, and what takes less."""
    parts = ", ".join(f"{PARTS[part]} {gib(size)}" for part, size in least.parts().items())
    bound = "" if least.peak > least.standing.total else "more than "
    return UsageError(
        f"{argument}={text!r} can't be used: {gib(least.budget)} GiB, and one state at a time with checkpointing takes "
        f"{bound}{gib(least.peak)} GiB ({parts}); {remedies}"
    )


def remedies(model: Any, rollouts: Any, teaching: Any, args: Any, device: str, reusable: bool = True) -> str:
    """What of the options would take less memory, as a clause; only what is not in use yet, and can be used."""
    options = {
        "--quantize nf4": device == "cuda" and model.quantize != "nf4",
        # With a limit to the drift, all trajectories may have to be computed without reuse.
        "--reuse block": teaching.reuse != "block" and teaching.drift_limit is None and reusable,
        "--optim adamw_8bit": "8bit" not in args.optim,
        f"a --gen_length below {rollouts.gen_length}": rollouts.gen_length > rollouts.block_length,
        f"a --lora_r below {model.lora_r}": model.lora_r > 1,
    }
    return f"less is taken by {', '.join(name for name, open_ in options.items() if open_) or 'a smaller model'}"


# ---- made-up work ----


def made_up(
    objective: Objective, decoder: Decoder, row: Any, prompt_ids: Tensor, decoding: Decoding, vocab: int
) -> Lesson:
    """A lesson with the most states that ``decoding`` can make, of random tokens; ``row`` is its teacher's."""
    counts = [[1] * decoding.block_length] * decoding.blocks if decoding.threshold is not None else decoding.schedule()
    reveals = torch.tensor([count for block in counts for count in block])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (decoding.gen_length,), generator=generator)
    tokens[tokens == decoder.eos_id] = (decoder.eos_id + 1) % vocab  # an end of the text would hide what is behind it
    reveal_step = torch.arange(len(reveals)).repeat_interleave(reveals)
    trajectory = Trajectory(prompt_ids.cpu(), tokens, reveal_step, decoding.block_length)
    return objective.lesson(Rollout(row, trajectory, "", score=1.0, tries=1), decoder, seed=0)


def rehearsal(short: Lesson, long: Lesson, states: int, **options: Any) -> StepBatch:
    """The costliest micro-batch: the last state of one lesson, and then the first ones of others.

    No other has its states in more blocks, and prompts of two lengths need a mask. ``options`` are those of
    :func:`~dopsd.step_batch.collate`.
    """
    index = [(0, len(short.steps) - 1)]
    index += [(1 + place // len(long.steps), place % len(long.steps)) for place in range(states - 1)]
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
            made_up(trainer.objective, decoder, row, prompt, decoding, self.vocab)
            for row, prompt in zip((rows[0], rows[-1]), self.prompts, strict=True)
        )
        # Trajectories that drift too far are computed without reuse, and all of them may.
        self.reuse = trainer.teaching.reuse if trainer.teaching.drift_limit is None else "none"
        self.trained = [p for p in trainer.student.parameters() if p.requires_grad]
        self.buckets = sum(p.nbytes for p in self.trained) if trainer.accelerator.num_processes > 1 else 0
        self.standing = self.at_rest()

    def at_rest(self) -> Standing:
        """What is there before anything is computed, and what comes to it by arithmetic."""
        gc.collect()
        self.meter.lap()
        used = self.meter.lap()
        held = [*self.trainer.student.parameters(), *self.trainer.student.buffers()]
        trained = sum(p.nbytes for p in self.trained)
        weights = sum(p.nbytes for p in held) - trained
        optimizer = optimizer_bytes(self.trainer.args.optim) * sum(p.numel() for p in self.trained)
        runtime = max(0, used - weights - trained) + self.meter.allowance
        return Standing(weights, trained, trained + self.buckets, optimizer, runtime)

    @property
    def states(self) -> int:
        """Those of a whole update, at most."""
        rows, slices = self.trainer.args.train_batch_size, self.trainer.teaching.update_per_slice
        return -(-rows * len(self.long.steps) // slices)

    def tokens(self, states: int) -> int:
        return self.batch(states).student.tokens

    def batch(self, states: int) -> StepBatch:
        """The micro-batch that is measured."""
        return rehearsal(self.short, self.long, states, reuse=self.reuse, **self.trainer.collation())

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
            self.meter.lap()
            done = attempt(action)
            peak = self.meter.lap()
        later = self.standing.optimizer + self.buckets
        return None if done is None else peak + later + self.meter.allowance
