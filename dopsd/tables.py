"""Rows of cells as a table: for people to read, or as Markdown."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import JustifyMethod

log = logging.getLogger(__name__)

# Columns that hold words, which stand to the left; all others hold numbers.
WORDS = ("", "task", "measure", "reuse", "weights", "checkpointing")

FILE_WIDTH = 120  # of tables that no terminal is there to bound


def show(rows: Sequence[Mapping[str, str]], title: str, notes: Sequence[str] = ()) -> None:
    """Log rows of cells, each a value by column, as a table, and notes below it; without rich, it is Markdown."""
    if find_spec("rich") is None:
        log.info("\n".join([title, markdown_table(rows), *notes]))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in rows[0]:
        justify: JustifyMethod = "left" if name in WORDS else "right"
        drawn.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        drawn.add_row(*row.values())
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    with console.capture() as text:
        console.print(drawn)
        for note in notes:
            console.print(note, highlight=False, markup=False, soft_wrap=True)
    log.info(text.get().rstrip("\n"))


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of cells as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
