"""Everything that needs a GPU, in one command and within a time: its tests, then the kernel benchmarks.

    python -m benchmarks.gpu --out DIR --minutes 8

leaves in DIR ``environment.txt``, ``tests.txt``, ``benchmarks.txt`` and the files ``kernels_gpu.json`` and ``.csv``,
whose rows are written as they are measured. Copy these two to ``benchmarks/results`` and run
``python -m benchmarks.report``. The exit status is 0 if all passed, 1 if not, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.problems import DEVICE
from benchmarks.results import ROOT, machine

_STOP_SECONDS = 15  # for pytest to write its summary after it is interrupted


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


def main(argv: list[str] | None = None) -> int:
    """Run the tests and the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for reports and results")
    parser.add_argument("--minutes", type=float, default=8.0, help="when to have stopped")
    args = parser.parse_args(argv)
    if DEVICE.type != "cuda":
        print("There is no GPU here: torch.cuda.is_available() is false.", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * args.minutes - _STOP_SECONDS
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = json.dumps(machine(DEVICE), indent=1) + "\n"
    if shutil.which("nvidia-smi"):
        environment += subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    (out / "environment.txt").write_text(environment)
    print(environment)

    pytest = [sys.executable, "-m", "pytest", "-q", "-rs", "--color=no"]
    # A third of the time at most, so that tests that hang leave something for the benchmarks.
    tested = run([*pytest, "-m", "gpu"], out / "tests.txt", (deadline - time.monotonic()) / 3)
    command = [*pytest, "benchmarks", "--benchmark-only", "--record", "--results", str(out)]
    measured = run(command, out / "benchmarks.txt", deadline - time.monotonic())
    return 0 if tested and measured else 1


if __name__ == "__main__":
    raise SystemExit(main())
