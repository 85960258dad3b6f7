"""What the tiny recipe gains, over seeds and against its ablations.

    python -m benchmarks.tiny_recipe --seeds 0 1 2 3 4 --out benchmarks/results/tiny_recipe.json

runs the shipped recipe once per seed, each as ``python -m dopsd.train`` with nothing but the seed changed, and adds one
row per run to the file. ``--name NAME -- --option value`` adds rows of a variant.
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
from typing import Any

KEPT = (
    "accuracy_before",
    "accuracy_after",
    "accuracy_gain",
    "standard_error_before",
    "standard_error_after",
    "standard_error_gain",
    "tokens_per_step",
    "eval_problems",
    "updates",
    "seconds",
    "threads",
    "device",
    "versions",
)
# Of the log: means over updates.
LOGGED = ("kl", "drift", "states", "tokens", "rollout_seconds", "distill_seconds")


def run(seed: int, options: list[str], timeout: float | None = None) -> dict[str, Any]:
    """One training run: its report, shortened, and means of its log.

    Raises:
        subprocess.TimeoutExpired: after ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "dopsd.train",
            "--seed",
            str(seed),
            "--output_dir",
            str(output),
            *options,
        ]
        subprocess.run(command, check=True, timeout=timeout)
        report = json.loads((output / "report.json").read_text())
        with (output / "metrics.csv").open(newline="") as file:
            logged = list(csv.DictReader(file))
    means = {}
    for name in LOGGED:
        values = [float(row[name]) for row in logged if row.get(name)]
        if values:
            means[name] = statistics.mean(values)
    return {**{name: report[name] for name in KEPT}, "update_means": means}


def main() -> None:
    """Run every seed and append the rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--name", default="tiny", help="what to call the rows")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows are added to it")
    parser.add_argument("options", nargs="*", help="options of dopsd.train, behind --")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out.is_file() else []
    for seed in args.seeds:
        rows.append({"name": args.name, "seed": seed, "options": args.options, **run(seed, args.options)})
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    gains = [100 * row["accuracy_gain"] for row in rows if row["name"] == args.name]
    print(f"{args.name}: gains {', '.join(f'{gain:+.1f}' for gain in gains)}; mean {sum(gains) / len(gains):+.1f}")


if __name__ == "__main__":
    main()
