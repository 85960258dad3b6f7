"""What reuse of activations costs and saves: the tiny recipe with each kind of reuse, over seeds.

    python -m benchmarks.reuse --seeds 0 1 2 3 4

adds a row per kind and seed to ``benchmarks/results/reuse.json`` and goes on where it was stopped. The kinds of a seed
follow each other, so that a machine that becomes slower does so for all of them. ``python -m benchmarks.report`` then
makes the table and the plot of ``docs/performance.md`` again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

from benchmarks import tiny_recipe
from benchmarks.results import FOLDER
from dopsd.step_batch import Reuse

FILE = FOLDER / "reuse.json"
# The recipe's own rate only, and no validation: they would take as long as the training that is compared.
OPTIONS = ["--eval_tokens_per_step", "2", "--eval_strategy", "no", "--save_strategy", "no"]


def main() -> None:
    """Run what the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=FILE, help="JSON file; rows are added to it")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out.is_file() else []
    done = {(row["seed"], row["reuse"]) for row in rows}
    for seed in args.seeds:
        for reuse in get_args(Reuse):
            if (seed, reuse) not in done:
                options = ["--reuse", reuse, *OPTIONS]
                rows.append({"seed": seed, "reuse": reuse, "options": options, **tiny_recipe.run(seed, options)})
                args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
