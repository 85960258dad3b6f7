"""A sample of ``python -m tests.faults``, and what its faults once brought to light."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.harness import Bench, Case, Wrong, reseal
from faults.hostile import hostile
from faults.interrupted import kills, two_starts
from faults.options import absurd
from faults.storage import damaged_adapters, damaged_checkpoints, full_disk

from dopsd import run
from dopsd.trainer import Trainer

Command = Callable[..., tuple[int, str, str]]

# Of each row: how its cases are made, and a part of the names of those that are tried here; none: all are.
SAMPLE: dict[str, tuple[Callable[[Bench], list[Case]], list[str]]] = {
    "killed training": (lambda bench: kills(bench, "dopsd.train", 9), ["kill 4", "tear 5"]),
    "killed evaluation": (lambda bench: kills(bench, "dopsd.evaluate", 6), ["tear 5"]),
    "two starts": (lambda bench: two_starts(bench, 2), ["resumed 0"]),
    "full disk": (full_disk, ["save /dopsd.train/run/checkpoint-2/optimizer.pt"]),
    "damaged checkpoints": (damaged_checkpoints, ["optimizer.pt flipped"]),
    "damaged adapters": (damaged_adapters, ["adapter_model.safetensors flipped"]),
    "hostile files": (hostile, ["checkpoint: pickle as optimizer.pt", "model: layers", "rows: many lines"]),
    "command lines": (lambda bench: absurd(bench, 6), []),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), seed=0)


@pytest.mark.parametrize("row", SAMPLE)
def test_a_fault_is_survived(row: str, bench: Bench, tmp_path: Path) -> None:
    make, names = SAMPLE[row]
    cases = make(bench)
    chosen = [next(case for case in cases if name in case.name) for name in names] or cases
    for number, case in enumerate(chosen):
        folder = tmp_path / str(number)
        folder.mkdir()
        case.run(folder)


def test_what_is_not_survived_is_told(bench: Bench, tmp_path: Path) -> None:
    """Another adapter than that of an undisturbed run, and a run that can't go on."""
    bench.whole("dopsd.train")
    shutil.copytree(bench.folder / "dopsd.train", tmp_path, dirs_exist_ok=True)
    bench.go_on("dopsd.train", tmp_path)
    scores = tmp_path / "run" / "held_out_before.json"
    scores.write_text(scores.read_text().replace('"score": 0', '"score": 1'))
    with pytest.raises(Wrong, match=r"other than undisturbed: held_out_before\.json"):
        bench.go_on("dopsd.train", tmp_path)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(Wrong, match="going on ends with status 1"):
        bench.go_on("dopsd.train", tmp_path)


def test_a_best_checkpoint_that_is_gone_is_said(
    make_trainer: Callable[..., Trainer], random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it was deleted before the run went on: in the end it is named, and the last adapter kept."""
    output = tmp_path / "run"
    argv = ("--model", str(random_model), "--correct_only", "false", "--max_steps", "3", "--save_steps", "1")
    argv += ("--save_total_limit", "9", "--eval_strategy", "steps", "--eval_steps", "1")
    argv += ("--load_best_model_at_end", "true", "--output_dir", str(output))
    make_trainer(*argv).train()
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    best = output / f"checkpoint-{state['best_global_step']}"
    shutil.rmtree(best)
    capsys.readouterr()
    trainer = make_trainer(*argv)
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    assert f"{best}, the best by validation, can't be used" in capsys.readouterr().out
    assert trainer.state.best_model_checkpoint is None


def test_the_tensors_of_a_checkpoint_are_checked_as_an_adapters_are(
    command: Command, bench: Bench, tmp_path: Path
) -> None:
    """Its manifest may be right about a file of another shape, or with a nan."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(bench.two_checkpoints(), tmp_path, dirs_exist_ok=True)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    weights = checkpoint / "teacher" / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(iter(tensors))
    changes: list[tuple[Any, str]] = [(tensors[key][:1], "(1, "), (tensors[key] * torch.nan, "no finite numbers")]
    for value, said in changes:
        save_file({**tensors, key: value.contiguous()}, weights, {"format": "pt"})
        reseal(checkpoint)
        argv = [*bench.train(tmp_path / "run"), "--resume_from_checkpoint", "true"]
        status, _, err = command(run.main, *argv)
        assert status == 2 and key in err and said in err and "resume_from_checkpoint=" in err


def test_a_rate_that_is_the_runs_own_is_decoded_and_reported_once(
    command: Command, bench: Bench, tmp_path: Path
) -> None:
    """The run's own decoding, here by a threshold, is what its own rate is about."""
    argv = [*bench.train(tmp_path / "run"), "--eval_tokens_per_step", "2", "4", "--threshold", "0.0001"]
    argv += ["--max_steps", "1"]
    assert command(run.main, *argv)[0] == 0
    scores = json.loads((tmp_path / "run" / "held_out_before.json").read_text())["tokens_per_step"]
    assert list(scores) == ["4", "2"]
    assert {one["steps"] for one in scores["4"]} == {2}  # a block each, and not 4 tokens
