"""``python -m dopsd.evaluate``: accuracy of a model or adapter, and what its own future is worth to it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from dopsd import cli
from dopsd.config import parse_evaluate
from dopsd.evaluation import compare
from dopsd.evaluation.results import columns
from dopsd.evaluation.run import check_output, evaluate
from dopsd.tables import show


def main(argv: Sequence[str]) -> None:
    """Parse, decode every setting and print a table; or compare two files of results."""
    start = time.monotonic()
    args = parse_evaluate(argv)
    if args.compare is not None:
        output = None if args.output is None else Path(args.output)
        if output is not None:
            check_output(output, args)
        compare.main(*compare.files_of(args.compare), output)
        return
    content = evaluate(args)
    if content is not None:
        show(columns(content["results"]), "accuracy (%)", [f"{time.monotonic() - start:.0f} s"])


if __name__ == "__main__":
    cli.run(main)
