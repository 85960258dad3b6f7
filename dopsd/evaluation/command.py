"""What ``python -m dopsd.evaluate`` prints, and what ``dopsd.evaluate`` returns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dopsd.evaluation import compare
from dopsd.evaluation.options import parse_evaluate
from dopsd.evaluation.results import columns, markdown
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


@dataclass(frozen=True)
class Results:
    """What an evaluation found; a notebook shows the table.

    Args:
        content: what the file of ``output`` holds: every response with its grade, by setting and measure, in
            ``results``; versions, options, seed.
    """

    content: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """Of the first setting, decoded greedily."""
        return self.content["results"][0]["accuracy"]

    def __str__(self) -> str:
        return markdown(self.content["results"], [])

    def _repr_markdown_(self) -> str:
        return str(self)
