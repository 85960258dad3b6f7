"""``python -m trainings FILE``: each of a file's training runs, one after another, without evaluations and reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from dopsd import report, run
from dopsd.commands import parse_train
from dopsd.ranks import Ranks


def main(file: str) -> None:
    """The lines of ``file`` are command lines of ``dopsd.train``, as lists."""
    for line in Path(file).read_text().splitlines():
        train(json.loads(line))


def train(argv: Sequence[str]) -> None:
    """What is left is the adapter and the metrics."""
    groups = parse_train(argv)
    output = Path(groups[-1].output_dir or "")
    trainer, _ = run.build(*groups)
    trainer.add_callback(report.Metrics(output))
    with Ranks(timedelta(seconds=60), lambda: ""):
        trainer.train()
        trainer.save_adapter(output)


if __name__ == "__main__":
    main(sys.argv[1])
