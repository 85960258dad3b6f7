"""What TensorBoard, Weights & Biases and Trackio show of a run (``--report_to``).

transformers' own callbacks write to them. What is here is what these are given: the columns of ``metrics.csv`` in
groups, figures that only people who watch a run need, and responses; and that a run which goes on goes on there too.
"""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from dopsd.checkpoints import run_id
from dopsd.errors import must_be, require, without_middle
from dopsd.files import write_text
from dopsd.memory.meter import process_peak
from dopsd.metrics import rows_of
from dopsd.rollout import Rollout
from dopsd.units import GIB

# Columns by group; a column without one stays as it is. transformers puts "train/" or, for "eval_", "eval/" before it.
GROUPS = {
    "rollout": ("pass_rate", "first_try", "tries", "accepted", "rollouts", "reward", "reward_std"),
    "completions": ("completion_length",),
    "work": ("states", "tokens", "forward_tokens", "decode_tokens"),
    "time": ("rollout_seconds", "learn_seconds", "wait_seconds"),
    "memory": ("peak_gib", "predicted_peak_gib"),
}
GROUP_OF = {column: group for group, columns in GROUPS.items() for column in columns}

# Validation responses that are shown: the first so many, which are the same problems each time.
SHOWN = 8
COMPLETIONS = "eval/completions"


class Response(NamedTuple):
    """A row of the table of responses, texts without the middle of very long ones."""

    step: int
    prompt: str
    completion: str
    grade: float


class Tracker(TrainerCallback):
    """The half of a tracker's callback that stands before transformers' own; only the first process has one.

    Args:
        trainer: a :class:`dopsd.trainer.Trainer`.
    """

    def __init__(self, trainer: transformers.Trainer) -> None:
        super().__init__()
        self.trainer: Any = trainer
        self.start = time.monotonic(), 0  # and the updates by then

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.monotonic(), self.trainer.state.global_step
        super().on_train_begin(*args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        if self.is_news():
            logs = kwargs.pop("logs")
            super().on_log(*args, logs={**grouped(logs), **self.watched(logs)}, **kwargs)

    def is_news(self) -> bool:
        """Whether the last row of the Trainer's log has not been logged by an earlier start."""
        return True

    def watched(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """Speed, time left and memory, where an update was logged, and how far what was measured is from a collapse."""
        state = self.trainer.state
        found = {f"collapse/{name}": value for name, value in self.trainer.guard.figures(state.log_history).items()}
        if "loss" not in logs:
            return found
        if logs.get("rollout_seconds"):
            found["speed/decode_tokens_per_second"] = logs["decode_tokens"] / logs["rollout_seconds"]
        if logs.get("learn_seconds"):
            tokens = logs["tokens"] + logs["forward_tokens"]
            found["speed/learn_tokens_per_second"] = tokens / logs["learn_seconds"]
        began, first = self.start
        left = (state.max_steps - state.global_step) / max(state.global_step - first, 1)
        found["time/seconds_left"] = left * (time.monotonic() - began)
        if "peak_gib" not in logs and (peak := process_peak(self.trainer.args.device)) is not None:
            found["memory/peak_so_far_gib"] = peak / GIB
        return found

    def show(self, rollouts: Sequence[Rollout]) -> None:
        """Show validation responses, behind the figures of their evaluation."""
        step, shown = self.trainer.state.global_step, self.trainer.method.decoder.shown
        if rollouts and self.is_news():
            self.write(
                [
                    Response(step, without_middle(shown(one.row)), without_middle(one.response), one.score)
                    for one in rollouts[:SHOWN]
                ]
            )

    def write(self, responses: Sequence[Response]) -> None:
        """Write at least one response."""
        raise NotImplementedError


def grouped(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Figures by the names that trackers have for them."""
    return {f"{GROUP_OF[name]}/{name}" if name in GROUP_OF else name: value for name, value in logs.items()}


class TensorBoard(Tracker, TensorBoardCallback):
    """Event files in one place of the run's folder, whichever start wrote them."""

    def __init__(self, trainer: transformers.Trainer) -> None:
        super().__init__(trainer)
        self.logging_dir = self.logging_dir or str(Path(trainer.args.output_dir or ".") / "tensorboard")

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a start that was killed has logged behind the checkpoint, or, without a log, all, is taken back: it comes
        # again.
        state = self.trainer.state
        first = state.global_step + bool(state.log_history)
        self.tb_writer = SummaryWriter(self.logging_dir, purge_step=first)
        super().on_train_begin(*args, **kwargs)

    def write(self, responses: Sequence[Response]) -> None:
        parts = [
            f"{code(one.prompt)}\n\nwas completed, graded {one.grade:g}:\n\n{code(one.completion)}" for one in responses
        ]
        self.tb_writer.add_text(COMPLETIONS, "\n\n---\n\n".join(parts), responses[0].step)
        self.tb_writer.flush()


def code(text: str) -> str:
    """``text`` as Markdown that shows it as it is."""
    return textwrap.indent(text, "    ", lambda line: True)


class Tables(Tracker):
    """What Weights & Biases and Trackio have in common: tables, and that nothing that is logged can be taken back."""

    library: Any
    logged = 0  # rows of metrics.csv, by earlier starts

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.record().is_file():
            self.logged = int(self.record().read_text())
        # By its name Trackio finds a run that goes on.
        name = "-".join(filter(None, (self.folder().resolve().name, run_id(self.folder()))))
        self.trainer.args.run_name = self.trainer.args.run_name or name
        super().on_train_begin(*args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        super().on_log(*args, **kwargs)
        if self.is_news():
            write_text(self.record(), f"{self.rows()}\n")

    def folder(self) -> Path:
        """The run's."""
        return Path(self.trainer.args.output_dir or ".")

    def record(self) -> Path:
        """The file that says how many rows have been logged; ``metrics.csv`` has those of the last start."""
        return self.folder() / f"{self.library.__name__}.rows"

    def rows(self) -> int:
        """How many rows there are."""
        return len(rows_of(self.trainer.state.log_history))

    def is_news(self) -> bool:
        return self.rows() > self.logged

    def write(self, responses: Sequence[Response]) -> None:
        import pandas

        table = self.library.Table(dataframe=pandas.DataFrame(responses))
        self.library.log({COMPLETIONS: table, "train/global_step": responses[0].step})


class Wandb(Tables, WandbCallback):
    """A run of Weights & Biases with the id of ours."""

    def __init__(self, trainer: transformers.Trainer) -> None:
        super().__init__(trainer)
        self.library = self._wandb

    def setup(self, args: Any, *rest: Any, **kwargs: Any) -> None:
        self.owned = self._wandb.run is None  # else the caller's
        if self.owned:
            project = os.getenv("WANDB_PROJECT", "huggingface")
            run = os.getenv("WANDB_RUN_ID", run_id(self.folder()))
            self._wandb.init(project=project, name=args.run_name, id=run, resume="allow")
        super().setup(args, *rest, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_end(*args, **kwargs)
        if self.owned:  # so that another run of this process is not logged there too
            self._wandb.finish()
            self._initialized = False


class Trackio(Tables, TrackioCallback):
    """A run of Trackio."""

    def __init__(self, trainer: transformers.Trainer) -> None:
        super().__init__(trainer)
        self.library = self._trackio


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def require_trackers(names: Sequence[str]) -> None:
    """Raise UsageError unless transformers knows each of ``names``, and those that are known here are installed."""
    for name in names:
        must_be(name in INTEGRATION_TO_CALLBACK, "report_to", name, f"all, none, or of {', '.join(TRACKERS)}")
        spec = find_spec(name) if name in TRACKERS else None
        # A folder is no package: Weights & Biases leaves one of its name where a run was started.
        installed = name not in TRACKERS or (spec is not None and spec.origin is not None)
        require(installed, "report_to", name, f"it needs {name}: pip install 'dopsd[{name}]'")


def attach_trackers(trainer: transformers.Trainer) -> list[Tracker]:
    """Put those that are asked for in the places of transformers' callbacks; none but on the first process."""
    names = [name for name in trainer.args.report_to or () if name in TRACKERS]
    for name in names:
        trainer.remove_callback(INTEGRATION_TO_CALLBACK[name])
    trackers = [TRACKERS[name](trainer) for name in names if trainer.is_world_process_zero()]
    for tracker in trackers:
        trainer.add_callback(tracker)
    return trackers
