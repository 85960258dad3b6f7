"""Runs that collapse: the shipped model, whose first update ruins it, with each thing that can be done about that."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from .harness import RESUME, Bench, Case, Fault, require, run, words

ACTIONS = ("stop", "rollback", "ignore")
UPDATES = 3


def collapses(bench: Bench, count: int) -> list[Case]:
    """Each action, with other seeds; the second half of them killed at an operation on a file, and resumed."""
    chance = bench.random("collapse")
    return [
        Case(
            f"{ACTIONS[number % 3]} {number}",
            partial(collapse, ACTIONS[number % 3], number, chance.random() if number >= count // 2 else None),
        )
        for number in range(count)
    ]


def collapse(action: str, seed: int, place: float | None, folder: Path) -> None:
    output = folder / "run"
    options = {"recipe": "tiny", "on_collapse": action, "learning_rate": 3, "correct_only": "false", "seed": seed}
    options |= {"max_steps": UPDATES, "save_steps": 1, "eval_steps": 1, "per_device_train_batch_size": 2, "pass_k": 2}
    options |= {"train_problems": 16, "validation_problems": 24, "eval_problems": 4, "steps": 24, "lora_r": 4}
    options |= {"gen_length": 48, "block_length": 8, "eval_tokens_per_step": 8, "bf16": "false", "report_to": "none"}
    argv = words(options | {"disable_tqdm": "true", "output_dir": output})
    if place is not None:
        # Of about 200 operations those before the first update's checkpoint come first.
        run("dopsd.train", *argv, fault=Fault("kill", folder, at=20 + int(120 * place)))
    resumed = place is not None and (output / "run.json").exists()
    ended = run("dopsd.train", *argv, *(RESUME if resumed else ()))
    require(ended.status == 0, f"ended with {ended.status}: {ended.printed[-600:]}")
    result = json.loads((output / "report.json").read_text())
    events = result["collapse"]
    require(events and events[0]["action"] == action and "collapse at update " in ended.printed, f"said {events}")
    require(result["updates"] == (events[0]["update"] if action == "stop" else UPDATES), f"{result['updates']} updates")
    if action != "ignore":
        require(all(event["back_to"] == 0 for event in events), f"went back to {events}")
    # The best by validation is what is left, whatever was done.
    require(result["best_checkpoint"].endswith("checkpoint-0"), f"left {result['best_checkpoint']}")
    require(result["accuracy_after"] == result["accuracy_before"], f"{result['accuracy_after']} behind a collapse")
