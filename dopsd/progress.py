"""What a run shows of its progress."""

from __future__ import annotations

import logging
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from dopsd.console import draws_bars

log = logging.getLogger(__name__)

# What a run shows of its log, and as what.
FIGURES = {
    "loss": "loss",
    "clip_fraction": "clipped",
    "tries": "tries",
    "pass_rate": "pass",
    "eval_accuracy": "validation",
}


class ProgressBar(TrainerCallback):
    """One bar over the updates, with the figures that tell whether training works; inner bars for its long parts.

    Where no bars are drawn, a line each time that there are figures.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown and draws_bars()
        self.bar: tqdm | None = None
        self.figures: dict[str, str] = {}

    def inner(self) -> dict[str, Any]:
        """Options of a bar for a part: of an update, or of what comes before and after training."""
        return {"leave": False, "position": int(self.bar is not None), "disable": not self.shown, "delay": 3.0}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.shown:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="update")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        figures = {name: f"{logs[key]:.3g}" for key, name in FIGURES.items() if logs and key in logs}
        if self.bar is not None:
            self.figures |= figures
            self.bar.set_postfix(self.figures)
        elif figures and state.is_world_process_zero:
            said = ", ".join(f"{name} {figure}" for name, figure in figures.items())
            log.info("update %d of %d: %s", state.global_step, state.max_steps, said)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the bar's line, also when training ends with an error."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
