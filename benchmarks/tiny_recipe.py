"""What the tiny recipe gains, over seeds.

    python -m benchmarks.tiny_recipe --seeds 0 1 2 3 4 --out benchmarks/results/tiny_recipe.json

runs the shipped recipe once per seed, each as ``python -m dopsd.train`` with nothing but the seed changed, and adds one
row per run to the file.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.results import Row
from dopsd.files import write_json

_OF_EVALUATION = ("accuracy_before", "accuracy_after", "accuracy_gain")
_ERRORS = ("standard_error_before", "standard_error_after", "standard_error_gain")
KEPT = (*_OF_EVALUATION, *_ERRORS, "tokens_per_step", "eval_problems", "updates")
KEPT += ("seconds", "threads", "device", "versions")
# Of the log: means over updates.
LOGGED = ("kl", "drift", "states", "tokens", "rollout_seconds", "learn_seconds")


def run(seed: int, options: list[str], timeout: float | None = None) -> Row:
    """One training run: its report, shortened, and means of its log; TimeoutExpired after ``timeout`` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, "-m", "dopsd.train", "--seed", str(seed), "--output_dir", str(output), *options]
        subprocess.run(command, check=True, timeout=timeout)
        report = json.loads((output / "report.json").read_text())
        with (output / "metrics.csv").open(newline="") as file:
            logged = list(csv.DictReader(file))
    values = {name: [float(row[name]) for row in logged if row.get(name)] for name in LOGGED}
    means = {name: statistics.mean(found) for name, found in values.items() if found}
    return {**{name: report[name] for name in KEPT}, "update_means": means}


def main() -> None:
    """Run every seed and append the rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows are added to it")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out.is_file() else []
    for seed in args.seeds:
        rows.append({"name": "tiny", "seed": seed, **run(seed, [])})
        write_json(args.out, rows)
        print(f"seed {seed}: {100 * rows[-1]['accuracy_gain']:+.1f}", flush=True)


if __name__ == "__main__":
    main()
