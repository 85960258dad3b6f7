"""What all methods beside d-OPSD are asked: to go on with the same bits, and to be the same on two processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import several
from safetensors.torch import load_file
from test_resume import Lottery, state_of

from dopsd import run
from dopsd.methods import METHODS
from dopsd.prompt_sampler import PromptSampler
from dopsd.report import read_metrics
from dopsd.tasks.sudoku import Sudoku
from dopsd.trainer import Trainer

# Each with what is its own.
OPTIONS = {
    "sft": "",
    "rejection": "--pass_k 2",
    "off_policy": "",
    "diffu_grpo": "--pass_k 4 --kl_weight 0",
    "vrpo": "--pass_k 4 --elbo_draws 2",
}
# A task whose grades depend on the response, and are the same for all responses to the puzzles in EVEN.
LISTED = """
import os
import zlib

from dopsd.tasks.sudoku import Sudoku


class Listed(Sudoku):
    def score(self, row, response):
        return 1.0 if row["puzzle"] in os.environ["EVEN"].split() else zlib.crc32(response.encode()) % 3 / 2
"""


@pytest.fixture
def small_run(small_run: list[str]) -> list[str]:
    """Without an option that not all of them have."""
    at = small_run.index("--pass_k")
    return [*small_run[:at], *small_run[at + 2 :]]


def words_of(method: str, updates: int) -> list[str]:
    """Options of a run by this method, with so many updates of a batch."""
    return ["--method", method, *OPTIONS[method].split(), "--updates_per_batch", str(updates)]


def test_all_are_here() -> None:
    assert {"d_opsd", *OPTIONS} == METHODS.keys()


@pytest.mark.parametrize("method", OPTIONS)
def test_a_resumed_run_ends_with_the_same_bits(
    method: str, make_trainer: Callable[..., Trainer], random_model: Path, tmp_path: Path
) -> None:
    """From between the two updates of a batch of rows, into another batch."""
    argv = ["--model", str(random_model), *words_of(method, 2), "--max_steps", "3", "--save_steps", "1"]
    argv += ["--per_device_train_batch_size", "6", "--lora_dropout", "0.1", "--save_total_limit", "9"]
    whole = make_trainer(*argv, task=Lottery())
    whole.train()
    weights, moments, log = state_of(whole)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 3 and all(losses)
    checkpoint = tmp_path / "copy" / "checkpoint-1"
    shutil.copytree(Path(whole.args.output_dir or "") / checkpoint.name, checkpoint)
    torch.manual_seed(1)
    resumed = make_trainer(*argv, task=Lottery())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    other_weights, other_moments, other_log = state_of(resumed)
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    for first, second in zip(moments, other_moments, strict=True):
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert log == other_log


def metrics(folder: Path) -> list[dict[str, float]]:
    """The numbers of metrics.csv."""
    return read_metrics(folder / "metrics.csv")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_give_what_one_gives(
    small_run: list[str], random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one prompt each, of which one may give nothing to learn: the same log and adapter; and what a run leaves."""
    order = list(PromptSampler(rows=4, chunk=2, times=1, seed=42))
    even = [row["puzzle"] for row in Sudoku().problems("train", 4)][order[1]]
    (tmp_path / "listed.py").write_text(LISTED)
    line = "--max_steps 4 --train_problems 4 --optim sgd --learning_rate 0.1 --max_grad_norm 0 "
    line += "--lora_dropout 0 --lr_scheduler_type constant --eval_problems 1 --validation_problems 1 --seed 42 "
    line += "--eval_strategy no --save_strategy no --use_cpu true --steps 6"
    argv = [*small_run, *line.split(), "--model", str(random_model)]
    argv += ["--task", f"{tmp_path / 'listed.py'}:Listed"]
    one, both = tmp_path / "one", tmp_path / "two"
    more = ["--ddp_backend", "gloo", "--per_device_train_batch_size", "1", "--output_dir"]
    words = {method: [*argv, *words_of(method, 2 if method == "diffu_grpo" else 1)] for method in OPTIONS}
    # vrpo's weights are shared, which takes gathering them for passes without a gradient, and a pass for others' sake.
    shared = {"vrpo": ["--fsdp", "full_shard"]}
    runs = [[*words[method], *shared.get(method, []), *more, str(both / method)] for method in OPTIONS]
    (tmp_path / "runs").write_text("\n".join(map(json.dumps, runs)))
    monkeypatch.setenv("EVEN", even)
    with several("trainings", [str(tmp_path / "runs")], tmp_path, EVEN=even) as processes:
        for method in OPTIONS:
            run.main([*words[method], "--output_dir", str(one / method)])
        for process, printed in processes:
            process.join(600)
            assert process.exitcode == 0, printed.read_text()[-3000:]
    for method in OPTIONS:
        check_same(one / method, both / method, method)
        check_files(one / method, method)


def check_same(one: Path, two: Path, method: str) -> None:
    """Metrics and adapters, to the rounding of sums; where grades tell, one process's prompt has nothing to learn."""
    log, other_log = metrics(one), metrics(two)
    accepted = {row["accepted"] for row in log if "accepted" in row}
    assert (0.5 in accepted) == (method not in ("sft", "off_policy")), (method, accepted)
    for row, other in zip(log, other_log, strict=True):
        assert row.keys() == other.keys() - {"wait_seconds"}
        others = {"tokens"} if method == "vrpo" else set()
        for name in row.keys() - {"rollout_seconds", "learn_seconds"} - others:
            assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-6), (method, name)
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    for name, value in expected.items():
        assert "lora_B" not in name or value.abs().max() > 0  # starts at zero, so it is the sum of the updates
        # Sums of some thousand fp32 terms in another order, over a few updates; vrpo's are weighted by up to 1 / p.
        bound = (1000 if method == "vrpo" else 100) * torch.finfo(torch.float32).eps * float(value.abs().max())
        assert float((found[name] - value).abs().max()) <= bound, (method, name)


def check_files(folder: Path, method: str) -> None:
    """A run's report, card and metrics name the method, and what is not there."""
    report = json.loads((folder / "report.json").read_text())
    assert report["config"]["teaching"]["method"] == method and report["updates"] == 4
    assert "trajectory.png" in report["left_out"] and not (folder / "trajectory.png").exists()
    assert method in report["left_out"]["trajectory.png"] or "matplotlib" in report["left_out"]["trajectory.png"]
    card = (folder / "README.md").read_text()
    assert f"It was trained by `{method}`" in card and "Luo" not in card and "`clip`" not in card
    assert ("`pass_k`" in card) == ("pass_k" in OPTIONS[method])
    names = {name for row in metrics(folder) for name in row}
    assert ("cross_entropy" in names) == (method in ("sft", "rejection", "off_policy"))
    assert ("first_try" in names) == ("pass_k" in OPTIONS[method])
    assert ("masked_accuracy" in names) == (method == "off_policy")
