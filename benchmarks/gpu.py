"""All evidence that needs a GPU, in one command and within a time, what tells most first.

    python -m benchmarks.gpu --out DIR --minutes 8
    python -m benchmarks.gpu --out DIR --only tests         # in a call of its own
    python -m benchmarks.gpu --out DIR --rehearse           # every line of it with small sizes, on a CPU

It needs this repository and torch, triton, transformers, peft, accelerate and numpy; what else is missing costs its own
rows only. DIR gets a log per part and one JSON file (see `benchmarks.results`), whose rows are written as they are
measured. Copy that file to ``benchmarks/results`` and run ``python -m benchmarks.report``.

Each part runs in a process of its own, which ends when its GPU is lost; the part then goes on in a new one, without
what ended the last. A part out of time is ended with all processes that it has started. The exit status is 0 if all
that ran passed, 1 if not, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.measure import Unusable, announced, measure_case
from benchmarks.ops import cases, providers
from benchmarks.report import absent, count
from benchmarks.reproduction import TWO, grades, recipe_runs
from benchmarks.results import DEVICE, ROOT, Recorder, Row, machine, new_path

_STOP_SECONDS = 10  # for a process to end by itself after its time
COMMAND = [sys.executable, "-m", "benchmarks.gpu"]  # of a part's process
_AGAIN = 75  # exit status of a part that has lost its GPU
HEADLINE = ("floor", "eager", "ours triton")
# Beside the options of the runs that it is compared with.
REHEARSED = ["--max_steps", "1", "--eval_problems", "4", "--validation_problems", "2", "--pass_k", "1"]
REHEARSED += ["--per_device_train_batch_size", "2"]

# What a part does, given where its rows go, when nothing new may start, and whether it is a rehearsal. It returns
# whether all of ours that it ran worked.
Measure = Callable[[Recorder, float, bool], bool]


def measure_ops(
    ops: Sequence[str], among: Callable[[str], bool], recorder: Recorder, until: float, rehearse: bool
) -> bool:
    """Time some ops' cases with providers of some names, as long as there is time; what the file has is not repeated.

    A case's first provider, what others are compared with, is timed with every part of them.
    """
    fine, rounds = True, (0.0, 2, 2) if rehearse else (1.0, 5, 25)
    for case in (case for case in cases(DEVICE, rehearse) if case.op in ops):
        first, *others = providers(case)
        new = recorder.new(announced(case, [first, *filter(among, others)]))
        if time.time() > until:
            recorder.add([{**row, "status": "out of time"} if row["status"] == "ok" else row for row in new])
            continue
        if not new:
            continue
        recorder.announce(new)
        names = [row["provider"] for row in new]
        try:
            rows, _ = measure_case(case, list(dict.fromkeys([first, *names])), rehearse, rounds)
        except Unusable as lost:
            recorder.withdraw(new)  # who has not failed can be tried again, without who has
            recorder.add(lost.rows)
            raise
        recorder.add([row for row in rows if row["provider"] in names])
        fine &= not any(row["status"].startswith("failed") and row["provider"].startswith("ours") for row in rows)
    return fine


def step(recorder: Recorder, until: float, rehearse: bool) -> bool:
    """An update of a model of LLaDA-8B's shape with random weights, against plain code."""
    from benchmarks import step as module  # with all of the trainer

    return module.measure(recorder, until, rehearse)


def tests(recorder: Recorder, until: float, rehearse: bool) -> bool:
    """`pytest -m gpu`, spread over processes where pytest-xdist is installed; this one's child owns the file."""
    if importlib.util.find_spec("pytest") is None:
        status = "skipped: pytest is not installed: pip install pytest"
        recorder.add([{"part": "tests", "name": "all", "status": status}])
        return True
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "-rs", "--color=no"]
    command += ["--continue-on-collection-errors", "-p", "benchmarks.outcomes"]
    command += [f"--until={until}", f"--outcomes={recorder.path}"]
    if importlib.util.find_spec("xdist") is not None and not rehearse:
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--max-worker-restart=64"]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status == _AGAIN:
        raise Unusable("a test has cost its process the GPU")
    return status in (0, 5)  # 5: none was left to run


def train(recorder: Recorder, until: float, rehearse: bool) -> bool:
    """The tiny recipe, against what CPUs reach with it: within two standard errors of the difference."""
    row: Row = {"part": "train", "seed": 0, "status": "ok"}
    if not recorder.new([row]):
        return True
    recorder.announce([row])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, "-m", "dopsd.train", "--seed", "0", "--output_dir", str(output)]
        try:
            left = max(0.0, until - time.time())
            subprocess.run([*command, *(REHEARSED if rehearse else [])], check=True, timeout=left)
        except subprocess.TimeoutExpired:
            recorder.add([{**row, "status": "out of time"}])
            return True
        except subprocess.CalledProcessError as error:
            recorder.add([{**row, "status": f"failed: dopsd.train ended with {error.returncode}"}])
            return False
        report = json.loads((output / "report.json").read_text())
    recorder.add([row := judged(row, report)])
    return rehearse or row["agrees"] is not False  # what a rehearsal reaches means nothing


def judged(row: Row, report: Row) -> Row:
    """What a run of the recipe reached, and whether that agrees with the recorded ones; None if there are none."""
    kept = ("accuracy_before", "accuracy_after", "standard_error_before", "standard_error_after", "seconds")
    row = {**row, **{name: report[name] for name in kept}, "agrees": None}
    recorded = [grades(old, TWO) / 100 for old in recipe_runs()]
    if recorded:
        row["accuracy_recorded"] = statistics.mean(float(some.mean()) for some in recorded)
        row["standard_error_recorded"] = statistics.mean(float(some.std()) / len(some) ** 0.5 for some in recorded)
        deviation = math.hypot(row["standard_error_after"], row["standard_error_recorded"])
        row["agrees"] = abs(row["accuracy_after"] - row["accuracy_recorded"]) <= 2 * deviation
    return row


def _ops(*ops: str, among: Callable[[str], bool]) -> Measure:
    return functools.partial(measure_ops, ops, among)


# What is measured, and its share of the time that is left against those of the parts that follow.
PARTS: dict[str, tuple[float, Measure]] = {
    "loss": (
        14,
        _ops("step_kl", "token_logprob", "products", "lora_layer", among=lambda x: x in HEADLINE or "out" in x),
    ),
    "step": (38, step),
    "confidence": (8, _ops("confidence", among=lambda name: name != "ours torch")),
    "attention": (8, _ops("attention", among=lambda name: name == "ours triton")),
    "peers": (
        14,
        _ops(
            "step_kl", "token_logprob", "confidence", "attention", "lora_layer", among=lambda who: who not in HEADLINE
        ),
    ),
    "tests": (30, tests),
    "train": (40, train),
}


def run(command: list[str], log: Path, seconds: float) -> int | str:
    """Run a command for so long at most, and end all processes that it has started; return its exit status."""
    print(f"+ {' '.join(command)}", flush=True)
    with log.open("a") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        status: int | str = "out of time"
        try:
            status = process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)
                process.wait(_STOP_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has left behind, too
            process.wait()
    print("\n".join(log.read_text().splitlines()[-15:]))
    print(f"= {status}", flush=True)
    return status


def run_part(name: str, path: Path, out: Path, rehearse: bool, seconds: float) -> bool:
    """Run a part, in one process after the other while each loses its GPU; return whether it succeeded."""
    end, fine = time.time() + seconds, True
    while True:
        until = end - min(_STOP_SECONDS, seconds / 4)
        command = [*COMMAND, "--part", name, "--out", str(path), "--until", str(until)]
        before = path.read_text()
        status = run([*command, *(["--rehearse"] if rehearse else [])], out / f"{name}.txt", end - time.time())
        if status in (0, 1, 2, "out of time"):
            return fine and status == 0
        fine = False  # it has ended otherwise; what it was in when it did is written
        if time.time() > until or path.read_text() == before:
            return False


def part(name: str, path: Path, until: float, rehearse: bool) -> int:
    """What a part's process does."""
    if rehearse:
        torch.compiler.set_stance("force_eager")  # a rehearsal has no time for compilers
    try:
        return 0 if PARTS[name][1](Recorder(path, rehearse), until, rehearse) else 1
    except Unusable as lost:
        print(f"The GPU is lost: {lost}", file=sys.stderr, flush=True)
        os._exit(_AGAIN)  # an orderly end may hang, or fail


def main(argv: list[str] | None = None) -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--minutes", type=float, default=8.0, help="when to have stopped")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    parser.add_argument("--rehearse", action="store_true", help="small sizes; the figures mean nothing")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part is not None:
        return part(args.part, args.out, args.until, args.rehearse)
    if DEVICE.type != "cuda" and not args.rehearse:
        print("There is no GPU here: torch.cuda.is_available() is false.", file=sys.stderr)
        return 2
    deadline = time.time() + 60 * args.minutes - _STOP_SECONDS
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = new_path(out)
    Recorder(path, args.rehearse)
    print(json.dumps(machine(), indent=1), flush=True)
    passed, left = True, [name for name in PARTS if name in args.only]
    while left:
        share = PARTS[left[0]][0] / sum(PARTS[name][0] for name in left)
        passed &= run_part(left.pop(0), path, out, args.rehearse, share * max(0.0, deadline - time.time()))
    rows = Recorder(path).rows
    print("\n".join(["", "Not run:", *absent(row for row in rows if row["part"] != "tests")]))
    print(f"Tests: {count(row for row in rows if row['part'] == 'tests') or 'none'}.")
    print(f"{path}: {'all that ran passed' if passed else 'something failed'}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
