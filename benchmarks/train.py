"""The tiny recipe on this machine, against the accuracy that is recorded for CPUs."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import time

from benchmarks import tiny_recipe
from benchmarks.results import FOLDER, Recorder, Row

SEED = 0
REHEARSED = ["--max_steps", "1", "--eval_problems", "4", "--validation_problems", "2", "--eval_tokens_per_step", "2"]
REHEARSED += ["--per_device_train_batch_size", "2", "--pass_k", "1", "--save_strategy", "no", "--eval_strategy", "no"]
KEPT = ("accuracy_before", "accuracy_after", "standard_error_before", "standard_error_after", "seconds")


def measure(recorder: Recorder, until: float, rehearsal: bool) -> bool:
    """Write what the run reached; return whether that is, within two standard errors, what CPUs reach."""
    row: Row = {"part": "train", "seed": SEED, "status": "ok"}
    try:
        report = tiny_recipe.run(SEED, REHEARSED if rehearsal else [], timeout=max(0.0, until - time.time()))
    except subprocess.TimeoutExpired:
        recorder.add([{**row, "status": "out of time"}])
        return True
    except subprocess.CalledProcessError as error:
        recorder.add([{**row, "status": f"failed: dopsd.train ended with {error.returncode}"}])
        return False
    row |= {name: report[name] for name in KEPT}
    row |= recorded()
    row["agrees"] = agrees(row)
    recorder.add([row])
    # What a rehearsal reaches means nothing.
    return rehearsal or row["agrees"]


def recorded() -> Row:
    """The mean over the recorded seeds, and the standard error of one of them."""
    rows = [row for row in json.loads((FOLDER / "tiny_recipe.json").read_text()) if row["name"] == "tiny"]
    return {
        "accuracy_recorded": statistics.mean(row["accuracy_after"] for row in rows),
        "standard_error_recorded": statistics.mean(row["standard_error_after"] for row in rows),
    }


def agrees(row: Row) -> bool:
    """Whether the difference is at most two standard errors of the difference of two runs."""
    error = math.hypot(row["standard_error_after"], row["standard_error_recorded"])
    return abs(row["accuracy_after"] - row["accuracy_recorded"]) <= 2 * error
