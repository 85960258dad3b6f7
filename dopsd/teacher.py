"""What the teacher sees, and whose weights it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor

from dopsd.errors import must_be, must_be_choices, require
from dopsd.models import STUDENT, adapter_parameters, widen
from dopsd.sampler import inference
from dopsd.step_batch import Example, Reuse
from dopsd.trajectory import NEVER, Trajectory

TeacherContext = Literal["self_future", "reference"]
RevealScope = Literal["future_blocks", "masked", "block", "later_state"]
RevealRounding = Literal["nearest", "down"]
TeacherKind = Literal["fixed", "ema", "live"]

TEACHER = "teacher"


def self_future(
    trajectory: Trajectory,
    steps: Tensor,  # (S,) int64
    *,
    retain_ratio: float,
    scope: RevealScope,
    gap: int | None = None,
    block_causal: bool = False,
    tail: bool,
    rounding: RevealRounding = "nearest",
    eos_id: int,
    generator: torch.Generator,
) -> Tensor:  # (S, L) bool
    """The positions whose final tokens the teacher is shown at each step (Eq. 8), drawn anew for each.

    Args:
        trajectory: a decoded response.
        steps: the steps to draw for.
        retain_ratio: share of the candidates that is revealed.
        scope: candidates are the masked positions behind the current block (``future_blocks``), all masked ones
            (``masked``), those of the current block (``block``), or those that the student's own ``gap`` steps after
            this one reveal (``later_state``). K is never empty with the last two: as many positions of the block as
            this step reveals stay masked with ``block``, and those that it reveals with ``later_state``.
        gap: of ``later_state``; with None candidates are all that is masked when this step is done.
        block_causal: whether the model sees nothing behind the current block; then ``later_state`` stays inside.
        tail: whether positions behind the first end-of-text token are candidates, as far as they were decoded. A step
            with no text behind its block has no ``future_blocks`` candidates either way: what follows says nothing.
        rounding: of the share, to the ``nearest`` count (half up) or ``down``.
        eos_id: the end-of-text token.
        generator: the source of the draw, on the CPU.
    """
    positions = torch.arange(len(trajectory.tokens))
    reveal_step = trajectory.reveal_step
    candidates = (reveal_step >= steps[:, None]) & (reveal_step != NEVER)
    if scope == "later_state":
        candidates = candidates & (reveal_step > steps[:, None])
        if gap is not None:
            candidates = candidates & (reveal_step <= steps[:, None] + gap)
    offset = positions - trajectory.block_starts(steps)[:, None]
    if scope == "block" or (scope == "later_state" and block_causal):
        candidates = candidates & (offset >= 0) & (offset < trajectory.block_length)
    masked = candidates.sum(-1, keepdim=True)
    end = trajectory.text_length(eos_id)
    if not tail:
        candidates = candidates & (positions <= end)
    if scope == "future_blocks":
        behind = offset >= trajectory.block_length
        candidates = candidates & behind & (positions - offset + trajectory.block_length < end)
    share = candidates.sum(-1, keepdim=True).double() * retain_ratio
    count = (share + 0.5 * (rounding == "nearest")).long()
    if scope == "block":
        count = count.minimum(masked - trajectory.commits(steps).sum(-1, keepdim=True))
    draw = torch.rand(candidates.shape, generator=generator).masked_fill(~candidates, torch.inf)
    return candidates & (draw.argsort(-1).argsort(-1) < count)


@dataclass(frozen=True, kw_only=True)
class TeacherView:
    """Which steps of a trajectory are trained on, and what the teacher sees at each.

    Field meanings are those of the command-line options of the same names. ``block_causal`` is no option: whether the
    model sees nothing behind a block; None where that is not known yet, and what depends on it is not checked.

    Raises:
        UsageError: a field has a value that is not accepted.
    """

    teacher_context: TeacherContext
    retain_ratio: float
    reveal_scope: RevealScope
    reveal_tail: bool
    skip_last_block: bool
    skip_tail: bool = False
    reveal_rounding: RevealRounding = "nearest"
    reuse: Reuse = "none"
    reveal_gap: int | None = 1
    block_causal: bool | None = False

    def __post_init__(self) -> None:
        must_be_choices(self)
        must_be(0 <= self.retain_ratio <= 1, "retain_ratio", self.retain_ratio, "in [0, 1]")
        gap, scope = self.reveal_gap, self.reveal_scope
        must_be(gap is None or gap >= 1, "reveal_gap", gap, "at least 1, or none")
        require(gap in (1, None) or scope == "later_state", "reveal_gap", gap, "it goes with reveal_scope=later_state")
        own_draws = scope in ("block", "later_state")
        if self.block_causal is False:
            hint = (
                "a block then has one draw, but each of its states is shown what it still masks: reuse=none or prompt"
            )
            require(not own_draws or self.reuse != "block", "reveal_scope", scope, hint)
        elif self.block_causal:
            hint = "with a block-causal model all before a block can be reused: reuse=block, which is exact, or none"
            require(self.reuse != "prompt", "reuse", self.reuse, hint)
            hint = (
                "a block-causal model sees nothing behind the current block, so a teacher that is shown tokens there "
            )
            hint += "is shown nothing: reveal_scope=block or later_state (--recipe block_causal)"
            require(own_draws or self.teacher_context == "reference", "reveal_scope", scope, hint)

    def example(
        self,
        trajectory: Trajectory,
        teacher_prompt_ids: Tensor,  # (P',) int64
        *,
        eos_id: int,
        seed: int,
    ) -> Example:
        """What is trained on of a trajectory; drawn from ``seed`` alone.

        Args:
            trajectory: the student's response.
            teacher_prompt_ids: the teacher's prompt, on the CPU.
            eos_id: the end-of-text token.
            seed: of what is revealed.
        """
        steps = torch.arange(trajectory.num_steps)
        if self.skip_last_block:
            steps = steps[trajectory.block_starts(steps) + trajectory.block_length < len(trajectory.tokens)]
        if self.skip_tail:
            text = trajectory.reveal_step[: trajectory.text_length(eos_id) + 1]
            steps = steps[steps <= text.max()]
        if self.teacher_context == "reference":
            nothing = torch.zeros(len(steps), len(trajectory.tokens), dtype=torch.bool)
            return Example(trajectory, steps, nothing, teacher_prompt_ids)
        reveal = self_future(
            trajectory,
            steps,
            retain_ratio=self.retain_ratio,
            scope=self.reveal_scope,
            gap=self.reveal_gap,
            block_causal=bool(self.block_causal),
            tail=self.reveal_tail,
            rounding=self.reveal_rounding,
            eos_id=eos_id,
            generator=torch.Generator().manual_seed(seed),
        )
        example = Example(trajectory, steps, reveal, teacher_prompt_ids)
        if self.reuse == "block" and not self.block_causal and len(steps):
            # One draw for a block, that of its first state, whose later positions are then the same in all its states.
            still_masked = trajectory.reveal_step >= steps[:, None]
            example = replace(example, reveal=reveal[example.anchors()] & still_masked)
        return example


class TeacherWeights:
    """The teacher's side of a network that student and teacher share.

    Args:
        model: the student, with its adapter named ``default``.
        kind: ``fixed``, the weights at the start of the run; ``ema``, their exponential moving average; ``live``, the
            student's own.
        ema_decay: share of the average that is kept at each update.
        from_adapter: whether the run starts from an adapter that was trained before.

    A fixed teacher over a fresh adapter is the base model with adapters off. Where the run starts from an adapter, or
    averages, the teacher's weights are a second, frozen adapter named ``teacher``.

    Raises:
        UsageError: there is no such ``kind``.
    """

    def __init__(self, model: PeftModel, kind: TeacherKind, ema_decay: float, from_adapter: bool) -> None:
        must_be(kind in get_args(TeacherKind), "teacher", kind, f"one of {get_args(TeacherKind)}")
        self.model, self.kind, self.ema_decay = model, kind, ema_decay
        self.has_adapter = kind == "ema" or (kind == "fixed" and from_adapter)
        if self.has_adapter and TEACHER not in model.peft_config:
            model.add_adapter(TEACHER, model.peft_config[STUDENT])
            widen(model)
            self.blend(0.0)
        if self.has_adapter:
            model.set_adapter(STUDENT)

    @contextmanager
    def active(self) -> Iterator[None]:
        """The shared network computes as the teacher inside: its weights, no dropout, no gradients."""
        with inference(self.model):
            if self.kind == "live":
                yield
            elif self.has_adapter:
                self.model.set_adapter(TEACHER)
                try:
                    yield
                finally:
                    self.model.set_adapter(STUDENT)
            else:
                with self.model.disable_adapter():
                    yield

    def after_update(self) -> None:
        """Move an averaged teacher towards the student; call once after each optimiser step."""
        if self.kind == "ema":
            self.blend(self.ema_decay)

    @torch.no_grad()
    def blend(self, keep: float) -> None:
        """teacher = keep * teacher + (1 - keep) * student, over the adapters."""
        student = adapter_parameters(self.model, STUDENT)
        for name, value in adapter_parameters(self.model, TEACHER).items():
            value.requires_grad_(False)
            value.lerp_(student[name], 1 - keep)
