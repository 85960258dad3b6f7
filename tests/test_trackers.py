"""What trackers show of a run: read back from what TensorBoard and Trackio wrote, and from what W&B was told."""

from __future__ import annotations

import csv
import importlib
import json
import sqlite3
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT
from test_resume import Lottery
from transformers import TrainerCallback

from dopsd import errors, report, run, trackers
from dopsd.checkpoints import RUN_FILE
from dopsd.commands import parse_train
from dopsd.errors import UsageError
from dopsd.trainer import Trainer

# What was logged, in order: name, update, value.
Logged = list[tuple[str, int, Any]]


class Kill(TrainerCallback):
    """Ends training like a kill, when the third update has been logged and not yet been validated."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.fixture
def wandb_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What runs of Weights & Biases are told: their files have a form of their own."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    rows: list[dict[str, Any]] = []
    told = wandb.Run.log

    def tell(run: Any, data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        rows.append(data)
        told(run, data, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", tell)
    return rows


def in_tensorboard(folder: Path) -> Logged:
    """The events of a folder that are not purged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "tensors": 0})
    events.Reload()
    scalars = [(name, one.step, one.value) for name in events.Tags()["scalars"] for one in events.Scalars(name)]
    texts = [
        (name.removesuffix("/text_summary"), one.step, one.tensor_proto.string_val[0].decode())
        for name in events.Tags()["tensors"]
        for one in events.Tensors(name)
    ]
    return scalars + texts


def in_trackio(folder: Path) -> Logged:
    """All rows of the one run in its database."""
    with sqlite3.connect(folder.parent / "trackio" / "huggingface.db") as database:
        runs, rows = set(), []
        for run, text in database.execute("select run_name, metrics from metrics order by id"):
            runs.add(run)
            rows.append(json.loads(text))
    assert runs == {"run-0123"}
    return [(name, row["train/global_step"], value) for row in rows for name, value in row.items()]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_run_that_goes_on_is_shown_as_one(
    name: str,
    make_trainer: Callable[..., Trainer],
    random_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Killed behind the third update, and gone on with behind the second: every figure once, under its name in its
    group; at each evaluation the first responses, without the middle of what is long. metrics.csv keeps its names."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    library = pytest.importorskip(name)
    if name == "trackio" and Path(library.utils.TRACKIO_DIR) != tmp_path / "trackio":
        pytest.skip("trackio writes where it was told to when it was imported, which another test has done")
    monkeypatch.setattr(trackers, "SHOWN", 2)
    monkeypatch.setattr(errors, "LONGEST", 20)
    rows = request.getfixturevalue("wandb_rows") if name == "wandb" else []
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / RUN_FILE).write_text('{"id": "0123"}')
    options = {"model": random_model, "max_steps": 3, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    argv = [f"--{key}={value}" for key, value in {**options, "report_to": name, "output_dir": folder}.items()]

    def start(*callbacks: TrainerCallback, checkpoint: str | None = None) -> Trainer:
        trainer = make_trainer(*argv, task=Lottery())
        for callback in (report.Metrics(folder), *callbacks):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    with pytest.raises(KeyboardInterrupt):
        start(Kill())
    if name == "wandb":
        importlib.import_module("wandb").finish()  # as the end of the process does
    trainer = start(checkpoint=str(folder / "checkpoint-2"))

    if name == "wandb":
        logged = [(key, row["train/global_step"], value) for row in rows for key, value in row.items()]
    else:
        logged = in_tensorboard(folder) if name == "tensorboard" else in_trackio(folder)
    found: dict[str, list[Any]] = {}
    for key, step, _ in logged:
        found.setdefault(key, []).append(step)
    often = ("train/epoch", "train/global_step", "args", "model_config")  # in each row, or at each start
    repeated = {key: steps for key, steps in found.items() if key not in often and len(set(steps)) < len(steps)}
    assert not repeated

    log = [row for row in trainer.state.log_history if "train_runtime" not in row]
    shown = {(key, step): value for key, step, value in logged}
    renamed = {"pass_rate": "train/rollout/pass_rate", "completion_length": "train/completions/completion_length"}
    renamed |= {"loss": "train/loss", "eval_accuracy": "eval/accuracy", "learn_seconds": "train/time/learn_seconds"}
    for row in log:
        for column, key in renamed.items():
            if column in row and (column != "learn_seconds" or row["step"] < 3):  # what the clock says is not repeated
                assert shown[key, row["step"]] == pytest.approx(row[column], rel=1e-6)
    for key in ("speed/decode_tokens_per_second", "time/seconds_left", "memory/peak_so_far_gib", "loss"):
        assert found[f"train/{key}"] == [1, 2, 3]
    assert shown["train/time/seconds_left", 2] > 0 == shown["train/time/seconds_left", 3]
    speed = shown["train/work/decode_tokens", 1] / shown["train/time/rollout_seconds", 1]
    assert shown["train/speed/decode_tokens_per_second", 1] == pytest.approx(speed, rel=1e-5)
    page = (ROOT / "docs" / "commands.md").read_text()
    columns = {column.removeprefix("eval_") for row in log for column in row}
    own = {key for key in found if key not in often and key.rpartition("/")[2] not in columns}
    assert all(f"`{key}`" in page for key in own if "train_" not in key and "total_flos" not in key), own
    assert found["train/collapse/validation_fall"] == found["train/collapse/fall_limit"] == [2, 3]
    with (folder / "metrics.csv").open(newline="") as file:
        assert {column for row in csv.DictReader(file) for column in row} == {column for row in log for column in row}

    assert found["eval/completions"] == [1, 2, 3]
    decoder = trainer.method.decoder
    rollouts = trainer.decode_rows(trainer.eval_dataset[:2], trainer.rollouts.decoding(), "validate")  # type: ignore
    text = shown["eval/completions", 3]
    text = text if isinstance(text, str) else json.dumps(getattr(text, "data", text), default=str)
    grades = [f"graded {one.score:g}:" if name == "tensorboard" else str(one.score) for one in rollouts]
    for one, grade in zip(rollouts, grades, strict=True):
        assert decoder.shown(one.row) in text and grade in text
        assert one.response[:10] in text and one.response[-10:] in text and one.response not in text
    assert decoder.shown(trainer.eval_dataset[2]) not in text  # type: ignore[index]


def test_one_process_writes(make_trainer: Callable[..., Trainer], random_model: Path) -> None:
    """On another there is no callback of a tracker, transformers' own included."""
    pytest.importorskip("tensorboard")
    trainer = make_trainer("--model", str(random_model), "--report_to", "tensorboard")

    def callbacks() -> list[str]:
        return [type(one).__name__ for one in trainer.callback_handler.callbacks if "TensorBoard" in type(one).__name__]

    assert callbacks() == ["TensorBoard"]
    trainer.remove_callback(trackers.TensorBoard)
    trainer.add_callback(trackers.TensorBoardCallback)
    trainer.is_world_process_zero = lambda: False  # type: ignore[method-assign]
    assert trackers.attach_trackers(trainer) == [] and callbacks() == []


def test_a_tracker_that_is_not_installed_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a mere folder has its name; and so is one that nobody knows."""
    for spec in (None, ModuleSpec("wandb", None)):
        monkeypatch.setattr(trackers, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(UsageError, match=r"report_to='wandb' .*pip install 'dopsd\[wandb\]'"):
            run.run(*parse_train(["--report_to", "wandb"]))
    with pytest.raises(UsageError, match="report_to must be all, none, or of tensorboard, wandb, trackio, but is 'no'"):
        run.run(*parse_train(["--report_to", "no"]))
