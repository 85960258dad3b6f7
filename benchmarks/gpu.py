"""All evidence that needs a GPU, in one command and within a time.

    python -m benchmarks.gpu --out DIR --minutes 8
    python -m benchmarks.gpu --out DIR --rehearse         # every line of it with small sizes, on a CPU

It needs this repository and installed packages, no network. What the GPU can do at most is measured first, then:

    tests       pytest -m gpu
    kernels     the kernel benchmarks
    step        an update of a model of LLaDA-8B's shape with random weights, against plain code
    train       the tiny recipe, against the accuracy that is recorded for CPUs

Each part has a share of the time that is left, and a process of its own. DIR gets ``environment.txt``, a log per part
and one JSON file (see `benchmarks.results`), whose rows are written as they are measured. Copy that file to
``benchmarks/results`` and run ``python -m benchmarks.report``. The exit status is 0 if all that ran passed, 1 if not,
and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.problems import DEVICE
from benchmarks.results import ROOT, Recorder, machine, new_path, validate

_STOP_SECONDS = 15  # for a process to end after it is interrupted, and between a part's last start and its time's end
_LATE_SECONDS = 30  # by which what a part has started may outlast its time, if there is more

_LISTED = 5  # names; more are counted

_PYTEST = ("pytest", "-q", "-rs", "--color=no", "-p", "benchmarks.until", "--until={until}")


@dataclass(frozen=True)
class Part:
    """A command and what it gets.

    Args:
        share: of the time that is left, against the shares of the parts that follow.
        module: with its arguments, what Python runs; {results} and {until} are filled in.
        rehearsal: whether it is told of a rehearsal by an option.
        needs: modules without which it is not run, with what to install for them.
    """

    share: float
    module: tuple[str, ...]
    rehearsal: bool = True
    needs: tuple[tuple[str, str], ...] = ()

    def command(self, results: Path, until: float, rehearse: bool) -> list[str]:
        """The command line."""
        filled = [word.format(results=results, until=until) for word in self.module]
        return [sys.executable, "-m", *filled, *(["--rehearse"] if rehearse and self.rehearsal else [])]

    def missing(self) -> list[str]:
        """What is to be installed before it can run."""
        return [install for module, install in self.needs if importlib.util.find_spec(module) is None]


def _measured(name: str) -> tuple[str, ...]:
    return ("benchmarks.part", name, "--results", "{results}", "--until", "{until}")


_TESTED = tuple((name.replace("-", "_"), f"pip install {name}") for name in ("pytest", "pytest-benchmark"))
PARTS = {
    "ceilings": Part(5, _measured("ceilings")),
    "tests": Part(
        25,
        (*_PYTEST, "--outcomes={results}", "-m", "gpu"),
        rehearsal=False,
        needs=(*_TESTED, ("hypothesis", "pip install hypothesis")),
    ),
    "kernels": Part(38, (*_PYTEST, "benchmarks", "--benchmark-only", "--record", "--results={results}"), needs=_TESTED),
    "step": Part(30, _measured("step")),
    "train": Part(15, _measured("train")),
}


def run(command: list[str], log: Path, seconds: float) -> bool:
    """Run a command, interrupting it when its time is over; return whether it succeeded."""
    print(f"+ {' '.join(command)}", flush=True)
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            status: int | str = process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            status = "out of time"
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    print("\n".join(log.read_text().splitlines()[-15:]))
    print(f"= {status}", flush=True)
    return status == 0


def not_run(path: Path) -> list[str]:
    """What of a run's file was not measured, by part and reason."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in json.loads(path.read_text())["rows"]:
        if row["status"] != "ok":
            who = f"{row.get('provider', row.get('name', 'all'))} {row.get('variant', '')}".strip()
            found.setdefault((row["part"], row["status"]), {})[who] = None
    return [
        f"{part}: {', '.join(who) if len(who) <= _LISTED else f'{len(who)} of them'}: {status}"
        for (part, status), who in found.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--minutes", type=float, default=8.0, help="when to have stopped")
    parts = [name for name in PARTS if name != "ceilings"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="these parts, beside the ceilings")
    parser.add_argument("--rehearse", action="store_true", help="small sizes; the figures mean nothing")
    args = parser.parse_args(argv)
    if DEVICE.type != "cuda" and not args.rehearse:
        print("There is no GPU here: torch.cuda.is_available() is false.", file=sys.stderr)
        return 2
    deadline = time.time() + 60 * args.minutes - _STOP_SECONDS
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = new_path(out, machine(DEVICE))
    content = Recorder(path, DEVICE, args.rehearse).content
    environment = json.dumps(content["machine"], indent=1) + "\n"
    if shutil.which("nvidia-smi"):
        environment += subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    (out / "environment.txt").write_text(environment)
    print(environment)

    left = {name: part for name, part in PARTS.items() if name in ("ceilings", *args.only)}
    passed, absent = True, []
    while left:
        name, part = next(iter(left.items()))
        shares = sum(each.share for each in left.values())
        del left[name]
        if part.missing():
            absent.append(f"{name}: {', '.join(part.missing())}")
            continue
        remaining = max(0.0, deadline - time.time())
        seconds = remaining * part.share / shares
        # A part stops by itself, with all that it has measured; if it hangs it is stopped.
        until = time.time() + max(seconds - _STOP_SECONDS, seconds / 2)
        command = part.command(path, until, args.rehearse)
        passed &= run(command, out / f"{name}.txt", min(seconds + _LATE_SECONDS, remaining))
    validate(json.loads(path.read_text()))
    print("\n".join(["", "Not run:", *absent, *not_run(path)]))
    print(f"{path}: {'all that ran passed' if passed else 'something failed'}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
