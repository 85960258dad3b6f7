"""What reuse of activations saves and costs on the tiny model: in training, over seeds, and in decoding.

    python -m benchmarks.reuse --seeds 0 1 2 3 4

runs the tiny recipe with each ``--reuse`` once per seed, and decodes held-out problems with the shipped model and each
``--cache``. It adds a row per run to ``benchmarks/results/reuse.json`` and goes on where it was stopped. The kinds of a
seed follow each other, so that a machine that becomes slower does so for all of them. ``python -m benchmarks.report``
then makes the tables and the plot of ``docs/performance.md`` again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

from benchmarks import tiny_recipe
from benchmarks.results import FOLDER
from dopsd.cache import Cache, todays
from dopsd.step_batch import Reuse

FILE = FOLDER / "reuse.json"
# The recipe's own rate only, and no validation: they would take as long as the training that is compared.
OPTIONS = ["--eval_tokens_per_step", "2", "--eval_strategy", "no", "--save_strategy", "no"]


RATES = (2, 1)  # tokens per step
PROBLEMS = 512


def decode(cache: str) -> list[dict[str, Any]]:
    """Accuracy and seconds of greedy decoding with a cache, at each rate."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.json"
        options = {"cache": cache, "eval_problems": PROBLEMS, "output": output}
        command = [sys.executable, "-m", "dopsd.evaluate", "--tokens_per_step", *map(str, RATES)]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        subprocess.run(command, check=True)
        results = json.loads(output.read_text())["results"]
    kept = ("tokens_per_step", "problems", "accuracy", "standard_error", "seconds")
    return [{"cache": cache, **{name: one[name] for name in kept}} for one in results]


def main() -> None:
    """Run what the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=FILE, help="JSON file; rows are added to it")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out.is_file() else []

    def add(more: list[dict[str, Any]]) -> None:
        rows.extend(more)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")

    done = {(row["seed"], row["reuse"]) for row in rows if "reuse" in row}
    for seed in args.seeds:
        for reuse in get_args(Reuse):
            if (seed, reuse) not in done:
                options = ["--reuse", reuse, *OPTIONS]
                add([{"seed": seed, "reuse": reuse, "options": options, **tiny_recipe.run(seed, options)}])
    for cache in get_args(Cache):
        if not any(todays(row.get("cache")) == cache for row in rows):
            add(decode(cache))


if __name__ == "__main__":
    main()
