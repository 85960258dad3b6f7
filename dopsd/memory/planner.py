"""Which sizes keep to a budget.

A plan comes from probes: single micro-batches, made up to be as large as a run's can be, whose peak is measured. The
peak is a fixed part and a part for every token that is computed, so few probes suffice, and each is run only if those
before it predict that it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any, Protocol

from dopsd.errors import UsageError
from dopsd.method import Sizes
from dopsd.tables import show
from dopsd.units import gib

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


@dataclass(frozen=True)
class Persistent:
    """Bytes that are in use throughout, whatever the sizes.

    Args:
        weights: of all that is not trained: the base, an averaged teacher.
        trained: the adapter's parameters.
        gradients: theirs.
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
        persistent: what is in use throughout.
        training, decoding: the predicted peaks of the two phases, everything included.
    """

    budget: int
    sizes: Sizes
    tokens: int
    persistent: Persistent
    training: int
    decoding: int

    @property
    def peak(self) -> int:
        """The predicted peak of the whole run."""
        return max(self.training, self.decoding)

    def parts(self) -> dict[str, int]:
        """What the peak of training consists of, in bytes."""
        computed = self.training - self.persistent.total
        workspace = min(computed, self.sizes.workspace_bytes or 0)
        return {**asdict(self.persistent), "activations": computed - workspace, "workspace": workspace}

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


class Probe(Protocol):
    """A run of which the peaks can be asked, in bytes, with all that is persistent; None where memory ran out."""

    persistent: Persistent

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
        persistent: the peak at no tokens.
    """

    def __init__(self, measure: Callable[[int], int | None], tokens: Callable[[int], int], persistent: int) -> None:
        self.measure, self.tokens = cache(measure), cache(tokens)
        self.points = [(0, persistent)]  # (tokens, bytes), ascending

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
            if len(self.points) == 2:  # one size does not tell how much of its peak is fixed: the next does
                fitting = fitting or open_sizes[:1]
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
        persistent = probe.persistent.total
        self.training = {
            checkpointing: Curve(partial(probe.training, checkpointing=checkpointing), probe.tokens, persistent)
            for checkpointing in (True, False)
        }
        self.decoding = Curve(probe.decoding, lambda size: size, persistent - probe.persistent.gradients)

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
            self.probe.persistent,
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
    bound = "" if least.peak > least.persistent.total else "more than "
    return UsageError(
        f"{argument}={text!r} can't be used: {gib(least.budget)} GiB, and one state at a time with checkpointing takes "
        f"{bound}{gib(least.peak)} GiB ({parts}); {remedies}"
    )


def remedies(model: Any, rollouts: Any, teaching: Any, args: Any, device: str, reusable: bool = True) -> str:
    """What of the options would take less memory, as a clause; only what is not in use yet, and can be used."""
    options = {
        "--quantize nf4": device == "cuda" and model.quantize != "nf4" and not model.full_finetune,
        # With a limit to the drift, all trajectories may have to be computed without reuse.
        "--reuse block": teaching.reuse != "block" and teaching.drift_limit is None and reusable,
        "--optim adamw_8bit": "8bit" not in args.optim,
        f"a --gen_length below {rollouts.gen_length}": rollouts.gen_length > rollouts.block_length,
        "LoRA, without --full_finetune": model.full_finetune,
        f"a --lora_r below {model.lora_r}": model.lora_r > 1 and not model.full_finetune,
    }
    return f"less is taken by {', '.join(name for name, open_ in options.items() if open_) or 'a smaller model'}"
