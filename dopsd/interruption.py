"""Ctrl-C and SIGTERM: the update under way ends and is saved; a second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback

from dopsd.errors import Interrupted
from dopsd.ranks import SIGNALS, gather


class Interruption(TrainerCallback):
    """What is done about a signal, between entering and leaving this.

    While updates are made, the run ends behind the one under way, with a checkpoint; before and after that nothing is
    lost by stopping where it is. ``advice`` says how to go on.
    """

    def __init__(self, advice: str = "nothing was written: the same command starts again") -> None:
        self.received: signal.Signals | None = None
        self.updating = False
        self.saved = -1  # the update behind which the last checkpoint was saved
        self.advice = advice
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # signals are no other thread's business
            self.before = {number: signal.signal(number, self.receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self.before.items():
            if signal.getsignal(number) == self.receive:  # a process of several that leaves with an error ignores them
                signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        if not self.updating:
            self.stop()
        # Not print, which this may have interrupted.
        os.write(
            2, f"\n{self.received.name}: the update under way ends and is saved; once more stops at once\n".encode()
        )

    def stop(self, behind: str = "") -> None:
        """End the run with the signal's status, if there was one."""
        if self.received is not None:
            raise Interrupted(f"stopped by {self.received.name}{behind}; {self.advice}", 128 + self.received)

    def agreed(self) -> bool:
        """Whether any process got a signal; all call it at the same places."""
        number = max(gather(int(self.received or 0)))
        if number:
            self.received = signal.Signals(number)
        return number > 0

    # ---- what the Trainer calls ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.updating = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.updating = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.agreed()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.agreed()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = state.global_step
        control.should_training_stop |= self.agreed()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Also called when training stops within an epoch, which is then not evaluated as its end would be."""
        if not self.agreed():
            return
        control.should_training_stop = True
        control.should_save = self.saved < state.global_step
        if state.global_step < state.max_steps and not float(state.epoch).is_integer():
            control.should_evaluate = control.should_log = False
