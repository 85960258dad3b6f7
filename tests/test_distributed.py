"""Two processes train as one: the same rows, the same held-out responses, the same adapter."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from processes import run_two
from safetensors.torch import load_file

from dopsd import train
from dopsd.prompt_sampler import PromptSampler
from dopsd.tasks.sudoku import Sudoku

UPDATES = 4

# A task that calls the responses to the puzzles named in RIGHT right, whatever they say.
LISTED = """
import os

from dopsd.tasks.sudoku import Sudoku


class Listed(Sudoku):
    def score(self, row, response):
        return float(row["puzzle"] in os.environ["RIGHT"].split())
"""


def metrics(folder: Path) -> list[dict[str, float]]:
    """The numbers of metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_give_the_adapter_of_one(
    small_run: list[str], random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two gloo processes with one prompt each against one process with two: the same global batches into a second
    epoch, among them one for which one process accepts nothing and one for which none does. It ends in time.

    SGD, because its step is linear in the gradient, with weight decay, which is to act only where something is
    accepted; without dropout, which each process draws for itself.
    """
    order = list(PromptSampler(rows=6, chunk=2, times=1, seed=42))
    puzzles = [row["puzzle"] for row in Sudoku().problems("train", 6)]
    right = " ".join(puzzles[order[place]] for place in (0, 4, 5))
    (tmp_path / "listed.py").write_text(LISTED)
    line = f"--max_steps {UPDATES} --train_problems 6 --optim sgd --learning_rate 0.1 --max_grad_norm 0 "
    line += "--lora_dropout 0 --lr_scheduler_type constant --eval_problems 3 --validation_problems 3 "
    line += "--weight_decay 0.1 --seed 42 --eval_strategy steps --eval_steps 2 --use_cpu true --stop_at_eos false"
    argv = [*small_run, *line.split(), "--model", str(random_model), "--task", f"{tmp_path / 'listed.py'}:Listed"]
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["--ddp_backend", "gloo", "--per_device_train_batch_size", "1", "--output_dir", str(two)]
    run_two("dopsd.train", [*argv, *words], tmp_path, RIGHT=right)
    monkeypatch.setenv("RIGHT", right)
    train.main([*argv, "--output_dir", str(one)])

    log = metrics(one)
    accepted = [row["accepted"] for row in log if "accepted" in row]
    assert len(accepted) == UPDATES and accepted[:3] == [0.5, 0.0, 1.0]
    for row, other in zip(log, metrics(two), strict=True):
        assert row.keys() == other.keys()
        # Means over K weigh processes alike, however many rows each has, and states, tokens and times are a process's.
        apart = {"kl", "overlap_top20", "clip_fraction", "states", "tokens", "rollout_seconds", "distill_seconds"}
        for name in row.keys() - apart:
            assert other[name] == pytest.approx(row[name], rel=1e-4), name
    for name in ("held_out_before.json", "held_out_after.json"):
        responses, theirs = (json.loads((folder / name).read_text())["tokens_per_step"] for folder in (one, two))
        assert responses == theirs
        assert {len(each) for each in responses.values()} == {3}

    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if "lora_B" in name:  # starts at zero, so it is the sum of the updates
            assert value.abs().max() > 0
        # Sums of some thousand fp32 terms in another order, over a few updates.
        bound = 100 * torch.finfo(torch.float32).eps * float(value.abs().max())
        difference = float((found[name] - value).abs().max())
        assert difference <= bound, (name, difference, bound)
