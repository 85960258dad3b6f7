"""What a run does about memory: sizes planned for a budget, peaks that are measured, less where it runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from dopsd.config import ModelArguments, RolloutArguments, TeachingArguments, TrainingArguments
from dopsd.errors import RunError
from dopsd.memory.meter import Meter, meter_of
from dopsd.memory.planner import Plan, Planner, remedies, too_little, workspace_for
from dopsd.memory.probe import RunProbe
from dopsd.method import Method, Sizes
from dopsd.models.bidirectional import BidirectionalModel
from dopsd.out_of_memory import unless_out_of_memory
from dopsd.ranks import gather
from dopsd.rollout import Decoder
from dopsd.sharding import is_sharded
from dopsd.tasks import Row
from dopsd.units import GIB, read_bytes

T = TypeVar("T")

log = logging.getLogger(__name__)


class MemoryKeeper:
    """Keeps a method within the memory that there is, by its sizes.

    With a ``memory_budget`` they are chosen here, by probes that change nothing else.

    Args:
        method: whose sizes these are.
        rows: that are trained on.
        model, rollouts, teaching, args: options of the run.

    Raises:
        UsageError: not even the smallest sizes keep to the budget, or peaks can't be measured here.
    """

    def __init__(
        self,
        method: Method,
        rows: Sequence[Row],
        model: ModelArguments,
        rollouts: RolloutArguments,
        teaching: TeachingArguments,
        args: TrainingArguments,
    ) -> None:
        self.method = method
        reusable = isinstance(method.decoder.model, BidirectionalModel)
        self.remedies = remedies(model, rollouts, teaching, args, args.device.type, reusable)
        self.meter: Meter | None = None  # with a budget, as is the planner
        self.planner: Planner | None = None
        self.highest = 0  # peak of all updates, as measured
        budget = teaching.memory_budget
        if budget is None:
            return
        self.meter = meter_of(args.device, budget)
        limit = read_bytes("memory_budget", budget, self.meter.total())
        workspace = workspace_for(limit, args.device.type)
        method.resize(replace(method.sizes, workspace_bytes=workspace))
        probe = RunProbe(method, self.meter, rows, rollouts, teaching, args)
        self.planner = Planner(probe, limit, probe.states, method.sizes.sequences_per_forward, workspace)
        plan = self.planner.plan()
        if plan is None:
            raise too_little("memory_budget", budget, self.planner.least(), self.remedies)
        method.resize(smallest(gather(plan.sizes)))

    @property
    def plan(self) -> Plan | None:
        """What is predicted of the sizes as they are now; None without a budget."""
        return None if self.planner is None else self.planner.at(self.method.sizes)

    @property
    def predicted_peak(self) -> int:
        """What the meter is predicted to show, in bytes; 0 without a budget."""
        plan = self.plan
        return 0 if plan is None or self.meter is None else plan.peak - self.meter.allowance

    def forget_peak(self) -> None:
        """What was until now, such as pictures, is not what was planned."""
        if self.meter is not None:
            self.meter.take_peak()

    def peaks(self) -> dict[str, float]:
        """Metrics of the peak since it was last asked for; none without a budget."""
        if self.meter is None:
            return {}
        peak = self.meter.take_peak()
        self.highest = max(self.highest, peak)
        return {"peak_gib": peak / GIB, "predicted_peak_gib": self.predicted_peak / GIB}

    def training(self, work: Callable[[], T], states: int, update: int, undo: Callable[[], object]) -> T:
        """What ``work`` over ``states`` states makes; whenever memory runs out it is undone, and done with less.

        That is half a micro-batch, or at one state checkpointing; on all processes, which share the micro-batches out.

        Raises:
            RunError: less can't be taken at ``update``; or weights are shared, and others inside their passes.
        """
        network = self.method.decoder.model
        while True:
            done = unless_out_of_memory(work)
            if done is None and is_sharded(network):
                sizes = self.method.sizes
                what = f"a --states_per_forward below {min(sizes.states_per_forward, states)}"
                what += ", --gradient_checkpointing true" * (not sizes.checkpointing)
                raise RunError(f"out of memory at update {update}, with --fsdp; less is taken by {what}")
            fits = all(gather(done is not None))
            if done is not None and fits:
                return done
            undo()
            sizes = self.method.sizes
            size = min(sizes.states_per_forward, states)
            if size > 1:
                self.method.resize(replace(sizes, states_per_forward=size // 2))
                change = f"states_per_forward is {size // 2} from now on"
            elif not sizes.checkpointing and network.supports_gradient_checkpointing:
                self.method.resize(replace(sizes, checkpointing=True))
                change = "activations are checkpointed from now on"
            else:
                raise RunError(f"out of memory at update {update} with one state at a time; {self.remedies}")
            log.warning(f"update {update}: out of memory in training; {change}")
            self.forget_peak()

    def decoding(self, work: Callable[[Decoder], T], most: int) -> T:
        """What ``work`` makes of the decoder, which has half as many sequences whenever memory runs out.

        A response does not depend on what it is batched with. No batch has more than ``most`` sequences.

        Raises:
            RunError: not even one fits.
        """
        while (done := unless_out_of_memory(lambda: work(self.method.decoder))) is None:
            sizes = self.method.sizes
            size = min(sizes.sequences_per_forward, most)
            if size == 1:
                raise RunError(f"out of memory in decoding with one sequence at a time; {self.remedies}")
            self.method.resize(replace(sizes, sequences_per_forward=size // 2))
            log.warning(f"out of memory in decoding; sequences_per_forward is {size // 2} from now on")
        return done


def smallest(sizes: Sequence[Sizes]) -> Sizes:
    """Sizes that fit wherever one of ``sizes``, planned by processes for what they each have, does."""
    return Sizes(
        min(one.states_per_forward for one in sizes),
        any(one.checkpointing for one in sizes),
        min(one.sequences_per_forward for one in sizes),
        min((one.workspace_bytes for one in sizes if one.workspace_bytes is not None), default=None),
    )
