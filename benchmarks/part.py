"""One part of `benchmarks.gpu`, in a process of its own: a fault on the GPU, or memory that is kept, ends with it.

python -m benchmarks.part step --results FILE --until UNIX_SECONDS [--rehearse]
"""

from __future__ import annotations

import argparse
import importlib
import math
from pathlib import Path

from benchmarks.problems import DEVICE
from benchmarks.results import Recorder

PARTS = {
    "ceilings": "benchmarks.ceilings",
    "step": "benchmarks.step",
    "train": "benchmarks.train",
}


def main(argv: list[str] | None = None) -> int:
    """Run a part's ``measure``; exit status 0 if what it ran worked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--results", type=Path, required=True, help="a run's file, to which rows are added")
    parser.add_argument("--until", type=float, default=math.inf, help="Unix time after which nothing new starts")
    parser.add_argument("--rehearse", action="store_true", help="small sizes and few rounds")
    args = parser.parse_args(argv)
    measure = importlib.import_module(PARTS[args.part]).measure
    recorder = Recorder(args.results, DEVICE, args.rehearse)
    return 0 if measure(recorder, args.until, args.rehearse) else 1


if __name__ == "__main__":
    raise SystemExit(main())
