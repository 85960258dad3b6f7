"""What a run shows of its progress."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """One bar over the updates, with the figures that tell whether training works; inner bars for its long parts."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
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
        if self.bar is not None and logs:
            names = {
                "loss": "loss",
                "clip_fraction": "clipped",
                "tries": "tries",
                "pass_rate": "pass",
                "eval_accuracy": "validation",
            }
            self.figures |= {name: f"{logs[key]:.3g}" for key, name in names.items() if key in logs}
            self.bar.set_postfix(self.figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the bar's line, also when training ends with an error."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
