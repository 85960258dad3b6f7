"""``python -m dopsd.train``: what a run leaves behind, and that its adapter is one that others can load."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import dopsd.assets
from dopsd import run
from dopsd.evaluation import command as evaluate
from dopsd.models import load_adapter
from dopsd.models.llada import LLaDAModelLM
from dopsd.plots import DPI, INCHES
from dopsd.tasks.sudoku import Sudoku

ROOT = Path(run.__file__).parents[1]
TINY = Path(dopsd.assets.__file__).parent / "tiny"
OPTIONS = (
    "--max_steps 2 --per_device_train_batch_size 2 --train_problems 16 --validation_problems 4 --eval_problems 6 "
    "--gen_length 48 --block_length 8 --steps 24 --pass_k 2 --lora_r 4 --bf16 false --eval_strategy steps "
    "--eval_steps 1 --eval_tokens_per_step 8 --seed 7 --clip 0.5 --report_to none "
    "--load_best_model_at_end false --figure_width column"
)


def strict(text: str) -> Any:
    """JSON without the infinities and nans that Python's own reader lets pass."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A small run of the command, in a process of its own."""
    output = tmp_path_factory.mktemp("command") / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "dopsd.train", *OPTIONS.split(), "--output_dir", str(output)],
        env=environment,
        cwd=output.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return output, done


@pytest.fixture
def output(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """The run's folder."""
    return finished[0]


def test_the_report_says_what_was_run_and_what_came_of_it(output: Path) -> None:
    """Strict JSON; accuracies, gains and standard errors are those of the responses in the held-out files, graded again
    here; configuration, versions and seed are the run's."""
    result = strict((output / "report.json").read_text())
    assert result["eval_problems"] == 6 and result["updates"] == 2 and result["seed"] == 7
    assert result["seconds"] > 0 and result["device"] == "cpu" and result["threads"] == 1
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"].keys() >= {"python", "transformers", "peft", "accelerate", "triton"}
    config = result["config"]
    assert (config["model"]["lora_r"], config["rollout"]["steps"], config["teaching"]["clip"]) == (4, 24, 0.5)
    assert (config["training"]["max_steps"], config["task"]["eval_problems"]) == (2, 6)
    kept = strict((output / "run.json").read_text())
    assert len(kept.pop("id")) == 32 and kept == config

    files = {moment: strict((output / f"held_out_{moment}.json").read_text()) for moment in ("before", "after")}
    adapter = hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert result["adapter_sha256"] == files["after"]["adapter_sha256"] == adapter
    assert files["before"]["adapter_sha256"] is None
    held_out = {moment: file["tokens_per_step"] for moment, file in files.items()}
    rows = Sudoku().problems("test", 6)
    assert list(result["tokens_per_step"]) == list(held_out["before"]) == list(held_out["after"]) == ["2", "8"]
    for rate, numbers in result["tokens_per_step"].items():
        scores = {}
        for moment, responses in held_out.items():
            assert [(one["puzzle"], one["solution"]) for one in responses[rate]] == [
                (row["puzzle"], row["solution"]) for row in rows
            ]
            scores[moment] = [float(one["response"].split("=")[1:] == [one["solution"]]) for one in responses[rate]]
            assert [one["score"] for one in responses[rate]] == scores[moment]
        gains = [after - before for before, after in zip(scores["before"], scores["after"], strict=True)]
        for name, values in (("before", scores["before"]), ("after", scores["after"]), ("gain", gains)):
            mean = sum(values) / 6
            error = math.sqrt(sum((value - mean) ** 2 for value in values) / 5 / 6)
            assert numbers[f"accuracy_{name}"] == pytest.approx(mean, abs=1e-12)
            assert numbers[f"standard_error_{name}"] == pytest.approx(error, abs=1e-12)
    own = result["tokens_per_step"]["2"]
    assert {name: result[name] for name in own} == own
    assert 0 < own["accuracy_before"] <= 1  # the shipped model solves some, so the grades above are not all zeros


def test_metrics_have_a_row_for_every_update_and_evaluation(output: Path) -> None:
    """metrics.csv: steps 1 and 2 with a loss each, and with a validation accuracy each."""
    with (output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["loss"]] == ["1", "2"]
    assert [row["step"] for row in rows if row["eval_accuracy"]] == ["1", "2"]
    assert len(rows) == 4
    for row in rows:
        assert all(math.isfinite(float(value)) for value in row.values() if value)
    names = {"loss", "kl", "clip_fraction", "overlap_top20", "tries", "pass_rate", "accepted", "completion_length"}
    assert names <= rows[0].keys()
    assert not any("collapse" in name for name in rows[0])


@pytest.mark.parametrize("name", ["curves.png", "trajectory.png"])
def test_pictures_are_pictures(output: Path, name: str) -> None:
    """A PNG of the width that was asked for, with more than one colour."""
    imread = pytest.importorskip("matplotlib.image").imread
    assert (output / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(output / name)
    assert pixels.shape[0] > 100 and pixels.shape[1] == int(INCHES["column"] * DPI) and pixels.min() < pixels.max()


def test_what_is_printed(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """What runs, the result as a table and where everything is; no traceback, no warning about training itself."""
    output, done = finished
    text = " ".join(done.stdout.split())
    for word in ("tiny on sudoku", "2 updates of 2 prompts", "6 held-out problems", "held-out accuracy", "before"):
        assert word in text
    assert str(output) in "".join(done.stdout.split())
    # No terminal is there: a plain line an update, and no bar.
    for update in (1, 2):
        assert f"\nupdate {update} of 2: loss " in done.stdout and f"\nupdate {update} of 2: validation " in done.stdout
    assert done.stderr == ""
    assert not list(output.glob("*.part"))


def test_the_card_says_what_the_report_does(output: Path) -> None:
    """README.md is this run's; neither it nor the adapter's config says where the model that ships lies here."""
    text, result = (output / "README.md").read_text(), strict((output / "report.json").read_text())
    for rate, row in result["tokens_per_step"].items():
        assert f"| {rate} | {100 * row['accuracy_before']:.1f} (" in text
    assert "`tiny`, the small model that ships" in text and "![Training curves](curves.png)" in text
    config = (output / "adapter_config.json").read_text()
    assert strict(config)["base_model_name_or_path"] == "tiny"
    assert str(TINY.parent) not in text + config


def test_the_adapter_loads_with_evaluate(output: Path, tmp_path: Path) -> None:
    """dopsd.evaluate with and without --adapter gives the report's responses before and after, to the character. With
    it, no more needs to be said."""
    options = {"before": ["--eval_problems", "6", "--tokens_per_step", "2"], "after": ["--adapter", str(output)]}
    for moment, argv in options.items():
        path = tmp_path / f"{moment}.json"
        evaluate.main([*argv, "--output", str(path)])
        (result,) = strict(path.read_text())["results"]
        held_out = strict((output / f"held_out_{moment}.json").read_text())
        assert result["responses"] == held_out["tokens_per_step"]["2"]
        assert result["accuracy"] == strict((output / "report.json").read_text())[f"accuracy_{moment}"]


def test_the_adapter_is_a_plain_peft_adapter(output: Path) -> None:
    """PeftModel.from_pretrained loads it over the base model: the same states as this project's loader, and after
    merging too; they differ from the base's, because training moved the adapter."""
    ids = torch.randint(2, 25, (2, 40), generator=torch.Generator().manual_seed(0))
    base = LLaDAModelLM.from_pretrained(TINY).eval()
    with torch.no_grad():
        plain = base.hidden_states(ids)
        peft = PeftModel.from_pretrained(LLaDAModelLM.from_pretrained(TINY), str(output)).eval()
        theirs = peft.get_base_model().hidden_states(ids)
        load_adapter(base, str(output), trainable=False)
        base.eval()
        ours = base.hidden_states(ids)
        merged = peft.merge_and_unload().hidden_states(ids)
    assert torch.equal(ours, theirs)
    moved = float((ours - plain).abs().max())
    assert moved > 1e-3
    assert float((merged - ours).abs().max()) < 0.01 * moved
