"""What reuse of activations saves and costs on the tiny model: in training, over seeds, and in decoding.

    python -m benchmarks.reuse --seeds 0 1 2 3 4

runs the tiny recipe with each ``--reuse`` once per seed, and decodes held-out problems with the shipped model and each
``--cache``. It adds a row per run to ``benchmarks/results/reuse.json`` and goes on where it was stopped. The kinds of a
seed follow each other, so that a machine that becomes slower does so for all of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

from benchmarks import tiny_recipe
from benchmarks.results import FOLDER, Row
from dopsd.cache import Cache
from dopsd.files import write_json
from dopsd.step_batch import Reuse

FILE = FOLDER / "reuse.json"
# The recipe's own rate only, and no validation: they would take as long as the training that is compared.
OPTIONS = ["--eval_tokens_per_step", "2", "--eval_strategy", "no", "--save_strategy", "no"]


def decode(cache: str) -> list[Row]:
    """Accuracy and seconds of greedy decoding of 512 problems with a cache, at two tokens per step and at one."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.json"
        options = ["--tokens_per_step", "2", "1", "--eval_problems", "512", "--cache", cache, "--output", str(output)]
        subprocess.run([sys.executable, "-m", "dopsd.evaluate", *options], check=True)
        results = json.loads(output.read_text())["results"]
    kept = ("tokens_per_step", "problems", "accuracy", "standard_error", "seconds")
    return [{"cache": cache, **{name: one[name] for name in kept}} for one in results]


def main() -> None:
    """Run what the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    rows: list[Row] = json.loads(FILE.read_text()) if FILE.is_file() else []
    done = {(row.get("seed"), row.get("reuse"), row.get("cache")) for row in rows}
    for seed in args.seeds:
        for reuse in get_args(Reuse):
            if (seed, reuse, None) not in done:
                options = ["--reuse", reuse, *OPTIONS]
                rows.append({"seed": seed, "reuse": reuse, "options": options, **tiny_recipe.run(seed, options)})
                write_json(FILE, rows)
    for cache in get_args(Cache):
        if (None, None, cache) not in done:
            rows += decode(cache)
            write_json(FILE, rows)


if __name__ == "__main__":
    main()
