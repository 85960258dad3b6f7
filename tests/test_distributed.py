"""Two processes train as one: the same rows, the same held-out responses, the same adapter."""

from __future__ import annotations

import csv
import json
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from processes import run_two, two
from safetensors.torch import load_file

from dopsd import run
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

# A task in grading whose rows the second process sleeps or ends; FAULTS has for each the number of the row.
FAULTY = """
import json
import os
import signal
import time

from dopsd.errors import RunError
from dopsd.tasks.sudoku import Sudoku


class Faulty(Sudoku):
    faults = json.loads(os.environ["FAULTS"]) if os.environ["RANK"] == "1" else {}
    graded = 0

    def score(self, row, response):
        Faulty.graded += 1
        match self.faults.get(str(self.graded)):
            case "sleep":
                time.sleep(8)
            case "raise":
                raise RunError("this row can't be graded")
            case str(name):
                os.kill(os.getpid(), getattr(signal, name))
        return 1.0
"""
# Faults by the number of the row; a process's rows are two of the held-out ones at each of two rates, then one an
# update. With each the statuses of the two processes (None: it does not end), and the last line of the first.
GONE = "error: nothing has been heard of process 1 of 2 for"
NOTHING_LEFT = "there is no complete checkpoint in {run}; the same command with --resume_from_checkpoint true goes on"
ENDED = "process 1 of 2 ended the run:"
FAULTS: list[tuple[dict[int, str], tuple[int, int | None], list[str]]] = [
    # Longer work than a process may be silent for, then silence in the third update.
    ({1: "sleep", 7: "SIGSTOP"}, (1, None), [GONE, "{run}/checkpoint-2, saved before that, is unharmed"]),
    ({1: "SIGKILL"}, (1, -signal.SIGKILL), [GONE, NOTHING_LEFT]),
    ({6: "raise"}, (1, 1), [f"error: {ENDED} this row can't be graded; {{run}}/checkpoint-1, saved before that"]),
    ({1: "SIGTERM"}, (128 + signal.SIGTERM,) * 2, [f"{ENDED} stopped by SIGTERM; the same command with --resume"]),
]


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
    run.main([*argv, "--output_dir", str(one)])

    log = metrics(one)
    accepted = [row["accepted"] for row in log if "accepted" in row]
    assert len(accepted) == UPDATES and accepted[:3] == [0.5, 0.0, 1.0]
    for row, other in zip(log, metrics(two), strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"rollout_seconds", "learn_seconds"}:
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


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_a_process_does_not_end_alone(small_run: list[str], random_model: Path, tmp_path: Path) -> None:
    """Whatever ends the second of two processes, before training or in an update, ends the first with a sentence that
    names it and says what is left; what only takes it long does not."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    argv = [*small_run, "--model", str(random_model), "--task", f"{tmp_path / 'faulty.py'}:Faulty"]
    line = "--max_steps 3 --use_cpu true --ddp_backend gloo --per_device_train_batch_size 1 --ddp_timeout 6 "
    line += "--save_strategy steps --save_steps 1 --eval_strategy no --output_dir"
    argv += line.split()
    with ExitStack() as stack:  # all at once, because most of their time they wait
        runs = []
        for number, (faults, *_) in enumerate(FAULTS):
            folder = tmp_path / str(number)
            folder.mkdir()
            started = two("dopsd.train", [*argv, str(folder / "run")], folder, FAULTS=json.dumps(faults))
            runs.append((folder / "run", stack.enter_context(started)))
        for (run, processes), (faults, statuses, lines) in zip(runs, FAULTS, strict=True):
            for (process, output), status in zip(processes, statuses, strict=True):
                if status is not None:
                    process.join(60)
                    assert process.exitcode == status, (faults, output.read_text())
            printed = processes[0][1].read_text()
            last = printed.strip().splitlines()[-1]
            assert all(line.format(run=run) in last for line in lines) and "Traceback" not in printed, printed
