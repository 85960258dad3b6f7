"""The files of a run: JSON that others can read, written whole or not at all, and numbers that are what they say."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dopsd import files, report, versions
from dopsd.commands import parse_train
from dopsd.tasks.sudoku import Sudoku
from dopsd.trainer import Trainer


def test_plain_is_strict_json() -> None:
    """Infinities and nans become null at any depth; tuples and keys become what JSON has; the rest stays."""
    value = {"a": math.nan, 2: [math.inf, -math.inf, 1.5, (0, "x", None, True)], "b": {"c": {"d": math.nan}}}
    text = json.dumps(files.plain(value), allow_nan=False)
    assert json.loads(text) == {"a": None, "2": [None, None, 1.5, [0, "x", None, True]], "b": {"c": {"d": None}}}


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """Content that can't be written leaves the old file as it was; after success no partial file remains."""
    path = tmp_path / "report.json"
    files.write_json(path, {"x": 1})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        files.write_json(path, {"x": object()})
    assert path.read_bytes() == before
    files.write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_gain_is_paired() -> None:
    """The gain's error is that of the differences: problems right before and after add nothing to it."""
    before, after = [1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0, 0.0]
    numbers = report.compare(before, after)
    assert (numbers["accuracy_before"], numbers["accuracy_after"]) == (0.4, 0.6)
    assert numbers["accuracy_gain"] == pytest.approx(0.2)
    # Differences 0, 0, 1, 0, 0: variance 4/5 over 4, divided by 5.
    assert numbers["standard_error_gain"] == pytest.approx(math.sqrt((0.8 / 4) / 5))
    assert numbers["standard_error_before"] == pytest.approx(math.sqrt((2 * 0.36 + 3 * 0.16) / 4 / 5))
    assert numbers["standard_error_after"] == pytest.approx(math.sqrt((3 * 0.16 + 2 * 0.36) / 4 / 5))
    assert (numbers["fully_correct_before"], numbers["fully_correct_after"]) == (0.4, 0.6)
    one = report.compare([0.0], [1.0])
    assert (one["accuracy_gain"], one["standard_error_gain"]) == (1.0, 0.0)
    with pytest.raises(ValueError):
        report.compare([0.0], [1.0, 1.0])


def test_metrics_hold_the_whole_log(tmp_path: Path) -> None:
    """metrics.csv has every logged row, the last summary apart, with a column for each name; other ranks write none."""
    log = [
        {"step": 1, "loss": 0.5, "epoch": 0.1},
        {"step": 2, "loss": 0.25, "epoch": 0.2, "kl": 1.0},
        {"step": 2, "eval_accuracy": 0.75, "epoch": 0.2},
        {"step": 2, "train_runtime": 3.0, "train_loss": 0.4},
    ]
    callback = report.Metrics(tmp_path)
    callback.on_log(None, SimpleNamespace(is_world_process_zero=False, log_history=log), None)
    assert not (tmp_path / "metrics.csv").exists()
    for length in (1, 4):
        callback.on_log(None, SimpleNamespace(is_world_process_zero=True, log_history=log[:length]), None)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "epoch", "eval_accuracy", "kl", "loss"]
    assert [(row["step"], row["loss"], row["kl"], row["eval_accuracy"]) for row in rows] == [
        ("1", "0.5", "", ""),
        ("2", "0.25", "1.0", ""),
        ("2", "", "", "0.75"),
    ]


def test_the_configuration_is_every_option_as_json(tmp_path: Path) -> None:
    """All groups with every field, ready for strict JSON."""
    groups = parse_train(["--output_dir", str(tmp_path / "run"), "--seed", "3", "--clip", "0.1"])
    config = report.configuration(*groups)
    assert list(config) == ["model", "task", "rollout", "teaching", "training"]
    for name, group in zip(config, groups, strict=True):
        assert config[name].keys() >= {field for field in vars(group) if name != "training"}
    assert (config["training"]["seed"], config["teaching"]["clip"]) == (3, 0.1)
    assert json.loads(json.dumps(files.plain(config), allow_nan=False)) == files.plain(config)


def test_versions_name_what_is_missing() -> None:
    """The installed version of each package that decides a result; None for a package that is not installed."""
    found = versions.versions()
    assert found["torch"] == torch.__version__
    assert set(versions.PACKAGES) < set(found)
    assert all(version is None or version[0].isdigit() for version in found.values())


def test_held_out_responses_are_kept_and_not_decoded_again(
    make_trainer: Callable[..., Trainer], random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call decodes every rate and writes the file, the second reads it: the same scores, no decoding. What
    is kept of another adapter, or damaged, is not read."""

    class Grades(Sudoku):
        def score(self, row: Any, response: str) -> float:
            return int(row["puzzle"][0]) / 4

    trainer = make_trainer("--model", str(random_model), "--eval_tokens_per_step", "8", task=Grades())
    rows = Sudoku().problems("test", 5)
    first = report.held_out(trainer, rows, "after", tmp_path, "a hash")
    assert first == {rate: [int(row["puzzle"][0]) / 4 for row in rows] for rate in ("4", "8")}
    path = tmp_path / "held_out_after.json"
    written = json.loads(path.read_text())
    assert [one["puzzle"] for one in written["tokens_per_step"]["4"]] == [row["puzzle"] for row in rows]
    assert written["adapter_sha256"] == "a hash"
    monkeypatch.setattr(trainer.method.decoder.model, "hidden_states", None)  # decoding would fail now
    assert report.held_out(trainer, rows, "after", tmp_path, "a hash") == first
    for moment, adapter in (("before", None), ("after", "another hash"), ("after", None)):
        with pytest.raises(TypeError):
            report.held_out(trainer, rows, moment, tmp_path, adapter)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TypeError):
        report.held_out(trainer, rows, "after", tmp_path, "a hash")


def test_with_partial_grades_whole_answers_are_shown_too(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Half of the cells right in every grid is no grid right."""
    rest = {"memory": None, "left_out": {}, "collapse": [], "eval_problems": 4, "seconds": 1.0, "best_checkpoint": None}
    rest["config"] = {"training": {"load_best_model_at_end": False}}
    caplog.set_level("INFO")
    for scores, shown in (([0.5] * 4, True), ([1.0, 0.0, 1.0, 0.0], False)):
        caplog.clear()
        rates = {"2": report.compare(scores, [*scores[1:], 1.0])}
        report.show_result({"tokens_per_step": rates, **rest}, tmp_path)
        assert ("fully correct" in caplog.text) == ("0.0 to 25.0" in caplog.text) == shown
