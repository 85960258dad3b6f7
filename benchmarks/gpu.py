"""All evidence that needs a GPU, in one command and within a time, what tells most first.

    python -m benchmarks.gpu --out DIR --minutes 8
    python -m benchmarks.gpu --out DIR --only tests         # in a call of its own
    python -m benchmarks.gpu --out DIR --rehearse           # every line of it with small sizes, on a CPU

It needs this repository and torch, triton, transformers, peft, accelerate and numpy; what else is missing costs its own
rows only. DIR gets ``environment.txt``, a log per part and one JSON file (see `benchmarks.results`), whose rows are
written as they are measured. Copy that file to ``benchmarks/results`` and run ``python -m benchmarks.report``.

Each part runs in a process of its own, which ends when its GPU is lost; the part then goes on in a new one, without
what ended the last. A part out of time is ended with all processes that it has started. The exit status is 0 if all
that ran passed, 1 if not, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import kernels, measure
from benchmarks.measure import DEVICE, Unusable
from benchmarks.ops import Attention, Case, Confidence, Products, Provider, StepKL, cases
from benchmarks.results import FOLDER, ROOT, Recorder, Row, machine, new_path

_STOP_SECONDS = 10  # for a process to end by itself after its time
COMMAND = [sys.executable, "-m", "benchmarks.gpu"]  # of a part's process
_AGAIN = 75  # exit status of a part that has lost its GPU
HEADLINE = ("floor", "eager", "ours triton")

# What a part is given: where its rows go, when nothing new may start, whether it is a rehearsal. It returns whether all
# that it ran worked.
Measure = Callable[[Recorder, float, bool], bool]


def timed(of: tuple[type, ...], among: Callable[[str], bool]) -> Measure:
    """A part that times the cases of some ops, with the providers of some names."""

    def part(recorder: Recorder, until: float, rehearse: bool) -> bool:
        return measure_cases(
            recorder, until, rehearse, [case for case in cases(DEVICE, rehearse) if type(case) in of], among
        )

    return part


def measure_cases(
    recorder: Recorder, until: float, rehearse: bool, chosen: Sequence[Case], among: Callable[[str], bool]
) -> bool:
    """Time cases as long as there is time; rows that are there already are not measured again, nor is what failed.

    A case's first provider, what others are compared with, is timed with every part of them.
    """
    limits, fine = kernels.ceilings(rehearse), True
    with contextlib.nullcontext() if rehearse else measure.fresh_process() as process:
        for case in chosen:
            first, *others = case.providers()
            wanted = [first, *(provider for provider in others if among(provider.name))]
            names = {row["provider"] for row in announce(recorder, case, wanted, until)}
            wanted = [provider for provider in wanted if provider.name in names or (provider is first and names)]
            if not wanted or time.time() > until:
                continue
            rounds = (2, 2) if rehearse else (5, 25)
            try:
                rows, _ = kernels.measure_case(case, wanted, limits, process, 1.0, rounds)
            except Unusable as lost:
                # Who has not failed can be tried again, without who has.
                recorder.withdraw([{**case.about(), "provider": name} for name in names])
                recorder.add(lost.rows)
                raise
            recorder.add([row for row in rows if row["provider"] in names])
            ours = [row["status"] for row in rows if row["provider"].startswith("ours")]
            fine &= not any(status.startswith("failed") for status in ours)
    return fine


def announce(recorder: Recorder, case: Case, providers: Sequence[Provider], until: float) -> list[Row]:
    """Write what is about to be measured, or that there is no time to; return the rows that are new."""
    rows = kernels.announced(case, providers)
    if time.time() <= until:
        return recorder.announce(rows)
    late = [row for row in rows if recorder.row(row) is None]
    recorder.add([{**row, "status": "out of time"} if row["status"] == "ok" else row for row in late])
    return []


def step(recorder: Recorder, until: float, rehearse: bool) -> bool:
    """An update of a model of LLaDA-8B's shape with random weights, against plain code."""
    from benchmarks import step as module

    return module.measure(recorder, until, rehearse)


def tests(recorder: Recorder, until: float, rehearse: bool) -> bool:
    """`pytest -m gpu`, spread over processes where pytest-xdist is installed; this one's child owns the file."""
    if importlib.util.find_spec("pytest") is None:
        recorder.add(
            [{"part": "tests", "name": "all", "status": "skipped: pytest is not installed: pip install pytest"}]
        )
        return True
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "--color=no",
        "--continue-on-collection-errors",
        "-m",
        "gpu",
    ]
    command += ["tests", "-p", "benchmarks.outcomes", f"--until={until}", f"--outcomes={recorder.path}"]
    if importlib.util.find_spec("xdist") is not None and not rehearse:
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--max-worker-restart=64"]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status == _AGAIN:
        raise Unusable("a test has cost its process the GPU")
    return status in (0, 5)  # 5: none was left to run


def train(recorder: Recorder, until: float, rehearse: bool) -> bool:
    """The tiny recipe, against what CPUs reach with the same options: within two standard errors of the difference."""
    from benchmarks import reuse, tiny_recipe

    row: Row = {"part": "train", "seed": 0, "status": "ok"}
    if not recorder.announce([row]):
        return True
    options = [*reuse.OPTIONS, *(REHEARSED if rehearse else [])]
    try:
        report = tiny_recipe.run(0, options, timeout=max(0.0, until - time.time()))
    except subprocess.TimeoutExpired:
        recorder.add([{**row, "status": "out of time"}])
        return True
    except subprocess.CalledProcessError as error:
        recorder.add([{**row, "status": f"failed: dopsd.train ended with {error.returncode}"}])
        return False
    kept = ("accuracy_before", "accuracy_after", "standard_error_before", "standard_error_after", "seconds")
    row |= {name: report[name] for name in kept}
    recorded = [old for old in json.loads((FOLDER / "reuse.json").read_text()) if old.get("reuse") == "none"]
    row["accuracy_recorded"] = statistics.mean(old["accuracy_after"] for old in recorded)
    row["standard_error_recorded"] = statistics.mean(old["standard_error_after"] for old in recorded)
    deviation = math.hypot(row["standard_error_after"], row["standard_error_recorded"])
    row["agrees"] = abs(row["accuracy_after"] - row["accuracy_recorded"]) <= 2 * deviation
    recorder.add([row])
    return rehearse or row["agrees"]  # what a rehearsal reaches means nothing


REHEARSED = ["--max_steps", "1", "--eval_problems", "4", "--validation_problems", "2", "--pass_k", "1"]
REHEARSED += ["--per_device_train_batch_size", "2"]


@dataclass(frozen=True)
class Part:
    """What is measured, and its share of the time that is left against those of the parts that follow."""

    share: float
    measure: Measure


PARTS = {
    "loss": Part(12, timed((StepKL, Products), lambda name: name in HEADLINE or "out" in name)),
    "step": Part(38, step),
    "confidence": Part(8, timed((Confidence,), lambda name: name != "ours torch")),
    "attention": Part(8, timed((Attention,), lambda name: name == "ours triton")),
    "peers": Part(14, timed((StepKL, Confidence, Attention), lambda name: name not in HEADLINE)),
    "tests": Part(30, tests),
    "train": Part(40, train),
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
        return 0 if PARTS[name].measure(Recorder(path, rehearse), until, rehearse) else 1
    except Unusable as lost:
        print(f"The GPU is lost: {lost}", file=sys.stderr, flush=True)
        os._exit(_AGAIN)  # an orderly end may hang, or fail


def not_run(rows: Sequence[Row]) -> list[str]:
    """What of a run's file was not measured, by part and reason."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if row["status"] != "ok":
            who = f"{row.get('provider', row.get('name', 'all'))} {row.get('variant', '')}".strip()
            found.setdefault((row["part"], row["status"]), {})[who] = None
    return [
        f"{part}: {', '.join(who) if len(who) <= 5 else f'{len(who)} of them'}: {status}"
        for (part, status), who in found.items()
    ]


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
    environment = json.dumps(machine(), indent=1) + "\n"
    if shutil.which("nvidia-smi"):
        environment += subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    (out / "environment.txt").write_text(environment)
    print(environment)
    passed = True
    left = [name for name in PARTS if name in args.only]
    while left:
        shares = sum(PARTS[name].share for name in left)
        name = left.pop(0)
        remaining = max(0.0, deadline - time.time())
        passed &= run_part(name, path, out, args.rehearse, remaining * PARTS[name].share / shares)
    print("\n".join(["", "Not run:", *not_run(json.loads(path.read_text())["rows"])]))
    print(f"{path}: {'all that ran passed' if passed else 'something failed'}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
