"""Resume: a run that was killed goes on with the same bits."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start
from torch import Tensor

from dopsd import run
from dopsd.models import of_adapters
from dopsd.tasks.sudoku import Sudoku
from dopsd.trainer import Trainer

UPDATES = 3


class Lottery(Sudoku):
    """Sudoku in which every other response is right, whatever it says, so that numbers of tries differ."""

    def score(self, row: Mapping[str, str], response: str) -> float:
        return float(zlib.crc32((row["puzzle"] + response).encode()) % 2)


# What no two runs have in common.
TIMES = ("rollout_seconds", "learn_seconds")


def timeless(log: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries of a log without what the clock says."""
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in log]


def outcome(folder: Path) -> dict[str, Any]:
    """What a finished run leaves: files as bytes, and its metrics."""
    kept = ("adapter_model.safetensors", "held_out_before.json", "held_out_after.json")
    with (folder / "metrics.csv").open(newline="") as file:
        return {**{name: (folder / name).read_bytes() for name in kept}, "metrics": timeless(csv.DictReader(file))}


def state_of(trainer: Trainer) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], list[dict[str, Any]]]:
    """Weights (averaged teacher included), optimiser state and log of a finished run."""
    adapters = {name: value.detach() for name, value in of_adapters(trainer.student).items()}
    log = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return adapters, list(trainer.optimizer.state.values()), timeless(log)


# Rows: options, updates in all, and the updates behind which the run is killed.
CASES = {
    "within an epoch": ((), 3, (1, 2)),
    "across epochs, the last batch short": (("--train_problems", "5"), 5, (2, 3, 4)),
    "between slices, across epochs": (("--train_problems", "4", "--updates_per_batch", "2"), 7, (1, 4, 5)),
    "with an averaged teacher": (("--teacher", "ema", "--ema_decay", "0.8"), 3, (2,)),
    "all weights, with an averaged teacher": (("--full_finetune", "true", "--teacher", "ema"), 3, (2,)),
    "with evaluations": (("--eval_strategy", "steps", "--eval_steps", "2", "--max_grad_norm", "0.2"), 3, (1, 2)),
}


@pytest.mark.parametrize(("options", "updates", "kills"), CASES.values(), ids=CASES.keys())
def test_a_checkpoint_is_all_that_is_needed_to_go_on(
    options: tuple[str, ...],
    updates: int,
    kills: tuple[int, ...],
    make_trainer: Callable[..., Trainer],
    random_model: Path,
    tmp_path: Path,
) -> None:
    """From each of these checkpoints a new Trainer reaches the same weights, teacher, optimiser state and log, bit for
    bit, dropout and retries included."""
    argv = ("--model", str(random_model), "--max_steps", str(updates), "--save_steps", "1")
    argv += ("--save_total_limit", "9", "--pass_k", "4", *options)
    whole = make_trainer(*argv, task=Lottery())
    whole.train()
    weights, moments, log = state_of(whole)
    accepted = [entry["accepted"] for entry in log if "accepted" in entry]
    # There is something to learn on both sides of every kill, and not always at the first try.
    assert accepted[0] > 0 and accepted[-1] > 0 and any(entry.get("tries", 1) > 1 for entry in log)
    for kill in kills:
        checkpoint = tmp_path / f"copy-{kill}" / f"checkpoint-{kill}"
        shutil.copytree(Path(whole.args.output_dir or "") / checkpoint.name, checkpoint)
        torch.manual_seed(kill)  # nothing is owed to the state that this process happens to be in
        resumed = make_trainer(*argv, task=Lottery())
        resumed.train(resume_from_checkpoint=str(checkpoint))
        other_weights, other_moments, other_log = state_of(resumed)
        assert resumed.state.global_step == updates
        assert weights.keys() == other_weights.keys()
        for name, value in weights.items():
            assert torch.equal(value, other_weights[name]), (kill, name)
        for first, second in zip(moments, other_moments, strict=True):
            assert all(torch.equal(value, second[key]) for key, value in first.items())
        assert log == other_log


def test_a_killed_run_ends_as_if_it_had_not_been(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL during update 2 or later, then --resume_from_checkpoint true: the same adapter bytes, metrics and
    held-out responses. A checkpoint that a kill left half-written is passed over for the one before. A run that was
    killed behind its last update is not trained again, and one that has finished is left as it is."""
    argv = [*small_run, "--max_steps", str(UPDATES), "--save_steps", "1", "--steps", "8"]
    argv += ["--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end", "true"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    process = start("dopsd.train", [*argv, "--output_dir", str(killed)], tmp_path / "printed")
    try:
        deadline = time.monotonic() + 600
        while not (killed / "checkpoint-1" / "manifest.json").is_file():
            assert process.is_alive() and time.monotonic() < deadline, (tmp_path / "printed").read_text()
            time.sleep(0.005)
        time.sleep(0.05)  # into the next update
    finally:
        process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (killed / "adapter_model.safetensors").exists() and not (killed / "report.json").exists()

    run.main([*argv, "--output_dir", str(whole)])
    run.main([*argv, "--output_dir", str(killed), "--resume_from_checkpoint", "true"])
    expected = outcome(whole)
    assert outcome(killed) == expected and len(expected["metrics"]) >= UPDATES
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, killed)]
    for name in ("accuracy_before", "accuracy_after", "tokens_per_step", "updates"):
        assert reports[0][name] == reports[1][name]

    for name in (
        "adapter_model.safetensors",
        "metrics.csv",
        "held_out_after.json",
        "report.json",
        f"checkpoint-{UPDATES}/trainer_state.json",
    ):
        (killed / name).unlink()
    (killed / f"checkpoint-{UPDATES}" / "optimizer.pt").write_bytes(b"half")
    run.main([*argv, "--output_dir", str(killed), "--resume_from_checkpoint", "true"])
    assert outcome(killed) == expected

    def go_on() -> dict[Path, bytes]:
        run.main([*argv, "--output_dir", str(killed), "--resume_from_checkpoint", "true"])
        return {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}

    monkeypatch.setattr(Trainer, "training_step", None)
    before = go_on()
    monkeypatch.setattr(Trainer, "__init__", None)
    assert go_on() == before and "has finished" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "training_step", None)
    # A kill in the final evaluation, and before that in the final save; another adapter in the place of this one; and
    # figures of another.
    adapter, after = killed / "adapter_model.safetensors", killed / "held_out_after.json"
    (killed / "report.json").unlink()
    after.unlink()
    go_on()
    assert outcome(killed) == expected
    adapter.unlink()
    (killed / "files.part").mkdir()
    (killed / "files.part" / adapter.name).write_bytes(b"half")
    go_on()
    assert outcome(killed) == expected and not (killed / "files.part").exists()
    adapter.write_bytes(b"of another run")
    after.write_text(
        after.read_text().replace('"score": ', '"score": 1').replace('"adapter_sha256": "', '"adapter_sha256": "0')
    )
    go_on()
    assert outcome(killed) == expected
    assert json.loads((killed / "report.json").read_text())["accuracy_after"] == reports[0]["accuracy_after"]
