"""What the teacher sees, and whose weights it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from dopsd.models import STUDENT
from dopsd.sampler import inference
from dopsd.trajectory import Trajectory

RevealScope = Literal["future_blocks", "masked"]
TeacherKind = Literal["fixed", "ema", "live"]

TEACHER = "teacher"


def self_future(
    trajectory: Trajectory,
    steps: Tensor,  # (S,) int64
    *,
    retain_ratio: float,
    scope: RevealScope,
    tail: bool,
    eos_id: int,
    generator: torch.Generator,
) -> Tensor:  # (S, L) bool
    """The positions whose final tokens the teacher is shown at each step (Eq. 8), drawn anew for each.

    Args:
        trajectory: a decoded response.
        steps: the steps to draw for.
        retain_ratio: share of the candidates that is revealed, rounded to the nearest count.
        scope: candidates are the masked positions behind the current block (``future_blocks``) or all masked ones
            (``masked``).
        tail: whether positions behind the first end-of-text token are candidates. A step whose block reaches that
            token has no ``future_blocks`` candidates either way: what follows says nothing.
        eos_id: the end-of-text token.
        generator: the source of the draw, on the CPU.
    """
    positions = torch.arange(len(trajectory.tokens))
    candidates = trajectory.reveal_step >= steps[:, None]
    end = trajectory.text_length(eos_id)
    if not tail:
        candidates = candidates & (positions <= end)
    if scope == "future_blocks":
        block_end = trajectory.block_starts(steps)[:, None] + trajectory.block_length
        candidates = candidates & (positions >= block_end) & (block_end <= end)
    count = (candidates.sum(-1, keepdim=True) * retain_ratio + 0.5).long()
    draw = torch.rand(candidates.shape, generator=generator).masked_fill(~candidates, torch.inf)
    return candidates & (draw.argsort(-1).argsort(-1) < count)


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
    """

    def __init__(self, model: PeftModel, kind: TeacherKind, ema_decay: float, from_adapter: bool) -> None:
        self.model, self.kind, self.ema_decay = model, kind, ema_decay
        self.has_adapter = kind == "ema" or (kind == "fixed" and from_adapter)
        if self.has_adapter and TEACHER not in model.peft_config:
            model.add_adapter(TEACHER, model.peft_config[STUDENT])
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


def adapter_parameters(model: Any, adapter: str) -> dict[str, Tensor]:
    """The parameters of one adapter, by their name without the adapter's."""
    return {
        name.replace(f".{adapter}.", "."): parameter
        for name, parameter in model.named_parameters()
        if f".{adapter}." in name
    }
