"""What ``python -m dopsd.inspect`` does: read one or two runs, write a page."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dopsd.config import option
from dopsd.errors import require
from dopsd.files import write_text
from dopsd.inspector.page import render
from dopsd.inspector.read import read_run
from dopsd.parser import Parser

log = logging.getLogger(__name__)

PAGE = "inspect.html"


@dataclass
class InspectArguments:
    """What is written."""

    out: str | None = option(None, f"The page; none: {PAGE} in the run's folder.")
    compare: str | None = option(None, "Folder of a second run, which is shown beside the first.")


def parse_inspect(argv: Sequence[str]) -> tuple[Path, InspectArguments]:
    """The run's folder and the options."""
    description = "A run as one HTML page: its figures, and what it learnt step by step."
    parser = Parser(InspectArguments, prog="python -m dopsd.inspect", description=description)
    parser.usage = "%(prog)s RUN [--OPTION VALUE ...]"
    parser.add_argument("run", metavar="RUN", help="The folder of a run, finished or not.")
    arguments, named = parser.parse(argv)
    return Path(named.run), arguments


def main(argv: Sequence[str]) -> None:
    """Parse, read, write."""
    folder, args = parse_inspect(argv)
    out = folder / PAGE if args.out is None else Path(args.out)
    require(out.parent.is_dir(), "out", str(out), "its folder does not exist")
    runs = [read_run(folder)] if args.compare is None else [read_run(folder), read_run(Path(args.compare))]
    write_text(out, render(runs))
    kept = sum(view.sample is not None for run in runs for view in run.views)
    log.info(f"{out}: {out.stat().st_size / 1e6:.1f} MB, with {kept} trajectories that can be stepped through")
    if not kept:
        log.info("no run kept any: --inspect_samples of python -m dopsd.train says how many are")
