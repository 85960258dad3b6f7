"""``python -m tests.faults``: makes the table of docs/reliability.md."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

from dopsd.files import write_text
from dopsd.tables import markdown_table

from .collapsing import collapses
from .harness import Bench, Case, Wrong
from .hostile import hostile
from .interrupted import kills, two_starts
from .options import absurd
from .storage import damaged_adapters, damaged_checkpoints, full_disk

BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"
NOT = "- Not survived: "


class Row(NamedTuple):
    """A kind of fault."""

    said: str
    cases: Callable[[Bench], list[Case]]


# A new kind of fault is one more row.
ROWS = {
    "killed training": Row(
        "SIGKILL at any time, ahead of an operation on a file, or amid writing one; then resumed",
        lambda bench: kills(bench, "dopsd.train", 40),
    ),
    "killed evaluation": Row("likewise; then the same command", lambda bench: kills(bench, "dopsd.evaluate", 18)),
    "two starts": Row("two processes take or resume one folder at a time", lambda bench: two_starts(bench, 8)),
    "full disk": Row(
        "nothing more can be written from an operation of a training run on, each in turn; then there is room",
        full_disk,
    ),
    "damaged checkpoints": Row(
        "a file of the newest checkpoint, each in turn, is missing, empty, cut in half or has a bit flipped; resumed",
        damaged_checkpoints,
    ),
    "damaged adapters": Row("a file of an adapter likewise; evaluated, and trained from", damaged_adapters),
    "hostile files": Row("files that run code, or take all time or memory; 10 seconds and 1 GiB are allowed", hostile),
    "collapse": Row(
        "an update ruins the model: stop, go back or ignore that; half of them killed too; the best adapter is left",
        lambda bench: collapses(bench, 12),
    ),
    "command lines": Row("options drawn at random with values that make no sense", lambda bench: absurd(bench, 100)),
}


def survived(case: Case, folder: Path) -> str | None:
    """What was wrong; None: nothing."""
    folder.mkdir(parents=True)
    try:
        case.run(folder)
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    shutil.rmtree(folder)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=ROWS, metavar="ROW", help=f"one of: {', '.join(ROWS)}")
    parser.add_argument("--out", type=Path, help=f"a page, whose rows between {BEGIN} and {END} are replaced")
    args = parser.parse_args()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.faults.warm"])
    failed = False
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        bench = Bench(Path(temporary), args.seed)
        for name, row in ROWS.items():
            if args.only not in (None, name):
                continue
            start = time.monotonic()
            cases = row.cases(bench)
            folders = [bench.folder / "cases" / f"{name}-{number}" for number in range(len(cases))]
            tried = {pool.submit(survived, *pair): pair[0] for pair in zip(cases, folders, strict=True)}
            wrong: list[str] = []
            for done, future in enumerate(as_completed(tried), 1):
                why = future.result()
                if why is not None:
                    wrong.append(f"{name}, {tried[future].name}: {' '.join(why.split())}")
                    print(f"\r{wrong[-1]}", file=sys.stderr)
                good = done - len(wrong)
                print(f"\r{name}: {good} of {done} survived, {len(cases)} to try ", end="", file=sys.stderr)
            failed |= bool(wrong)
            cells = {
                "fault": name,
                "what is done": row.said,
                "survived / tried": f"{len(cases) - len(wrong)} / {len(cases)}",
                "seed": str(args.seed),
                "seconds": f"{time.monotonic() - start:.0f}",
                "made": f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, torch {torch.__version__}",
            }
            print(f"in {cells['seconds']} s", file=sys.stderr)
            print(markdown_table([cells]))
            if args.out is not None:
                put(cells, wrong, args.out)
    raise SystemExit(failed)


def put(cells: dict[str, str], wrong: list[str], page: Path) -> None:
    """A row of the page's table, in the place of the one of its name, and what was not survived below the table."""
    before, _, rest = page.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    heading, ruler, line = markdown_table([cells]).splitlines()
    lines = {name: old for old in table.splitlines() for name in ROWS if old.startswith(f"| {name} |")}
    lines[cells["fault"]] = line
    faults = [
        old for old in table.splitlines() if old.startswith(NOT) and not old.startswith(f"{NOT}{cells['fault']},")
    ]
    faults += [f"{NOT}{why[:300]}" for why in wrong]
    content = [heading, ruler, *(lines[name] for name in ROWS if name in lines), "", *faults]
    write_text(page, "\n".join([before + BEGIN, "", *content, END]) + after)


if __name__ == "__main__":
    main()
