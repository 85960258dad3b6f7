"""Several processes train as one: the same rows, the same held-out responses, the same adapter."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from processes import run_all, several
from safetensors.torch import load_file
from torch import Tensor

from dopsd import run
from dopsd.prompt_sampler import PromptSampler
from dopsd.report import read_metrics
from dopsd.tasks.sudoku import Sudoku

UPDATES = 4
# Numbers of processes, and further options.
SEVERAL = [(3,), (2, "--fsdp", "full_shard")]

# A task that calls the responses to the puzzles named in RIGHT right, whatever they say.
LISTED = """
import os

from dopsd.tasks.sudoku import Sudoku


class Listed(Sudoku):
    def score(self, row, response):
        return float(row["puzzle"] in os.environ["RIGHT"].split())
"""

# A task in grading whose rows the second process sleeps or ends, or from which on it lacks room or computes wrong;
# FAULTS has for each the number of the row.
FAULTY = """
import json
import os
import resource
import signal
import time

import torch

from dopsd.distillation import Distillation
from dopsd.errors import RunError
from dopsd.tasks.sudoku import Sudoku


def spoil(fault):
    loss = Distillation.loss

    def spoiled(self, batch):
        Distillation.loss = loss
        if fault == "memory":
            raise torch.OutOfMemoryError("all is taken")
        output = loss(self, batch)
        return output._replace(loss=output.loss * float("nan"))

    Distillation.loss = spoiled


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
            case "disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            case "memory" | "nan" as fault:
                spoil(fault)
            case str(name):
                os.kill(os.getpid(), getattr(signal, name))
        return 1.0
"""
# Options, and faults by the number of the row; a process's rows are two of the held-out ones at each of two rates, then
# one an update. With each the statuses of the two processes (None: it does not end), and of what the first prints last.
SHARED = "--fsdp full_shard"
GONE = "error: nothing has been heard of process 1 of 2 for"
NOTHING_LEFT = "there is no complete checkpoint in {run}; the same command with --resume_from_checkpoint true goes on"
ENDED = "process 1 of 2 ended the run:"
FAULTS: list[tuple[str, dict[int, str], tuple[int, int | None], list[str]]] = [
    # Longer work than a process may be silent for, then silence in the third update.
    ("", {1: "sleep", 7: "SIGSTOP"}, (1, None), [GONE, "{run}/checkpoint-2, saved before that, is unharmed"]),
    ("", {1: "SIGKILL"}, (1, -signal.SIGKILL), [GONE, NOTHING_LEFT]),
    ("", {6: "raise"}, (1, 1), [f"error: {ENDED} this row can't be graded; {{run}}/checkpoint-1, saved before that"]),
    ("", {1: "SIGTERM"}, (128 + signal.SIGTERM,) * 2, [f"{ENDED} stopped by SIGTERM; the same command with --resume"]),
    ("", {5: "disk"}, (1, 1), [f"error: {ENDED} {{run}}/checkpoint-1", "can't be written", NOTHING_LEFT]),
    # One has no memory left for its micro-batch: where they can, all do with less.
    ("", {5: "memory"}, (0, 0), ["in {run}: the adapter"]),
    (
        SHARED,
        {5: "memory"},
        (1, 1),
        [f"error: {ENDED} out of memory at update 1, with --fsdp; less is taken by", "{run}"],
    ),
    (SHARED, {6: "nan"}, (1, 1), ["error: the loss is nan on process 1 of 2 at update 2; {run}/checkpoint-1, saved"]),
    (SHARED, {6: "SIGKILL"}, (1, -signal.SIGKILL), [GONE, "{run}/checkpoint-1, saved before that, is unharmed"]),
]


def metrics(folder: Path) -> list[dict[str, float]]:
    """The numbers of metrics.csv."""
    return read_metrics(folder / "metrics.csv")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_several_processes_give_the_adapter_of_one(
    small_run: list[str], random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three gloo processes, and two that share the weights, against one: the same batches of six rows, then of the two
    that an epoch has left, of which nothing is accepted, then of another epoch. There are fewer micro-batches in the
    last round than processes.

    AdamW with so large an epsilon that its step is nearly linear in the gradient, which is clipped, and with weight
    decay, which is to act only where something is accepted. What is dropped depends on the micro-batch, and not on who
    computes it. Where weights are shared too, a run that one process goes on with ends with that adapter as well.
    """
    order = list(PromptSampler(rows=8, chunk=6, times=1, seed=42))
    puzzles = [row["puzzle"] for row in Sudoku().problems("train", 8)]
    right = " ".join(puzzles[order[place]] for place in (0, 3, 4))
    (tmp_path / "listed.py").write_text(LISTED)
    line = f"--max_steps {UPDATES} --train_problems 8 --optim adamw_torch --adam_epsilon 0.01 --learning_rate 0.1 "
    line += "--lora_dropout 0.1 --lr_scheduler_type constant --eval_problems 4 --validation_problems 4 "
    line += "--weight_decay 0.1 --seed 42 --eval_strategy steps --eval_steps 2 --use_cpu true --stop_at_eos false "
    line += "--states_per_forward 8 --max_grad_norm 0.05 --save_steps 2 --save_total_limit 9"
    argv = [*small_run, *line.split(), "--model", str(random_model), "--task", f"{tmp_path / 'listed.py'}:Listed"]
    monkeypatch.setenv("RIGHT", right)

    def words(count: int, *more: str) -> list[str]:
        folder = tmp_path / "-".join([str(count), *more])
        return [*argv, "--per_device_train_batch_size", str(6 // count), "--output_dir", str(folder), *more]

    run.main(words(1))
    log, expected = metrics(tmp_path / "1"), load_file(tmp_path / "1" / "adapter_model.safetensors")
    accepted = [row["accepted"] for row in log if "accepted" in row]
    assert len(accepted) == UPDATES and accepted[:2] == [0.5, 0.0] and accepted[2] > 0
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in expected.items())  # B starts at zero
    for count, *more in SEVERAL:
        folder = tmp_path / f"printed-{count}{len(more)}"
        folder.mkdir()
        run_all("dopsd.train", [*words(count, *more), "--ddp_backend", "gloo"], folder, count, RIGHT=right)
        output = tmp_path / "-".join([str(count), *more])
        for row, other in zip(log, metrics(output), strict=True):
            assert row.keys() == other.keys() - {"wait_seconds"}
            idle = {"tokens", "forward_tokens"} if more else set()  # those of passes for the others' sake count too
            for name in row.keys() - {"rollout_seconds", "learn_seconds"} - idle:
                assert other[name] == pytest.approx(row[name], rel=1e-4), (count, name)
        for name in ("held_out_before.json", "held_out_after.json"):
            responses, theirs = (
                json.loads((folder / name).read_text())["tokens_per_step"] for folder in (tmp_path / "1", output)
            )
            assert responses == theirs
            assert {len(each) for each in responses.values()} == {4}
        check_adapter(output, expected)
    report = json.loads((output / "report.json").read_text())
    alone = json.loads((tmp_path / "1" / "report.json").read_text())
    assert report["parameters"] == alone["parameters"] == alone["parameters_per_rank"]
    assert abs(report["parameters_per_rank"] - report["parameters"] / 2) < 0.02 * report["parameters"]  # odd sizes
    (output / "report.json").unlink()
    shutil.rmtree(output / "checkpoint-4")
    run.main([*words(1), "--output_dir", str(output), "--resume_from_checkpoint", "true"])
    check_adapter(output, expected)


def check_adapter(folder: Path, expected: Mapping[str, Tensor]) -> None:
    """It is as ``expected``, but for sums of some thousand fp32 terms in another order, over a few updates."""
    found = load_file(folder / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        bound = 100 * torch.finfo(torch.float32).eps * float(value.abs().max())
        difference = float((found[name] - value).abs().max())
        assert difference <= bound, (folder.name, name, difference, bound)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_a_process_does_not_end_alone(small_run: list[str], random_model: Path, tmp_path: Path) -> None:
    """Whatever ends the second of two processes, before training or in an update, ends the first with a sentence that
    names it and says what is left; what only takes it long, or can be done with less memory, does not."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    argv = [*small_run, "--model", str(random_model), "--task", f"{tmp_path / 'faulty.py'}:Faulty"]
    line = "--max_steps 3 --use_cpu true --ddp_backend gloo --per_device_train_batch_size 1 --ddp_timeout 6 "
    line += "--states_per_forward 8 "
    line += "--save_strategy steps --save_steps 1 --eval_strategy no --output_dir"
    argv += line.split()
    with ExitStack() as stack:  # all at once, because most of their time they wait
        runs = []
        for number, (options, faults, *_) in enumerate(FAULTS):
            folder = tmp_path / str(number)
            folder.mkdir()
            words = [*argv, str(folder / "run"), *options.split()]
            started = several("dopsd.train", words, folder, FAULTS=json.dumps(faults))
            runs.append((folder / "run", stack.enter_context(started)))
        for (run, processes), (_, faults, statuses, lines) in zip(runs, FAULTS, strict=True):
            for (process, output), status in zip(processes, statuses, strict=True):
                if status is not None:
                    process.join(60)
                    assert process.exitcode == status, (faults, output.read_text())
            printed = processes[0][1].read_text()
            last = printed.strip().splitlines()[-1]
            assert all(line.format(run=run) in last for line in lines) and "Traceback" not in printed, printed
