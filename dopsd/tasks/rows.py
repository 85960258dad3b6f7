"""Rows of a task from a local file or from the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from dopsd.errors import RunError
from dopsd.limits import limited_memory

# Characters of a file's rows, and bytes of it: more is no file of problems.
MOST = 1 << 28
# Bytes that a row takes beside its text, and rows: these can be far shorter than what they become.
ROW = 256
MOST_ROWS = 1 << 20


def csv_rows(path: Path) -> list[Mapping[str, Any]]:
    """Rows of text: a puzzle such as 0140432014020000 does not become a number."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows: list[Mapping[str, Any]] = list(islice(csv.DictReader(file, strict=True), MOST_ROWS + 1))
    for number, row in enumerate(rows):
        if None in row:
            raise ValueError(f"row {number} has more values than the {len(row) - 1} columns")
    return rows


def json_rows(path: Path) -> list[Mapping[str, Any]]:
    """A list of objects, or an object a line."""
    text = path.read_text(encoding="utf-8-sig")
    is_list = text.lstrip().startswith("[")
    if not is_list and text.count("\n") > MOST_ROWS:
        raise ValueError(f"it has more than {MOST_ROWS} lines")
    rows = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object")
    return rows


def parquet_rows(path: Path) -> list[Mapping[str, Any]]:
    """Rows of a table."""
    if find_spec("pyarrow") is None:
        raise RunError(
            f"{path}: parquet files are read with pyarrow, which is not installed: pip install 'dopsd[train]'"
        )
    import pyarrow.parquet

    with path.open("rb") as file:  # by its path, the folders it lies in could be read as columns
        table = pyarrow.parquet.ParquetFile(file)
        parts = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
        chunks = [part.column(number).total_uncompressed_size for part in parts for number in range(part.num_columns)]
        # A value is no larger than its column is in the file; repeated, it may be there once.
        largest = max(chunks, default=0)
        if largest > MOST:
            raise ValueError(f"it unpacks to more than {MOST >> 20} MiB")
        rows: list[Mapping[str, Any]] = []
        size = 0
        for batch in table.iter_batches(max(1, min(1024, MOST // max(1, largest) // 4)), use_threads=False):
            size += batch.nbytes + ROW * len(batch)
            if size > MOST:
                raise ValueError(f"it unpacks to more than {MOST >> 20} MiB")
            rows += batch.to_pylist()
        return rows


READERS = {".csv": csv_rows, ".json": json_rows, ".jsonl": json_rows, ".parquet": parquet_rows}


def read_rows(
    path: Path, columns: Sequence[str], check: Callable[[Mapping[str, str]], None] | None = None
) -> list[Mapping[str, str]]:
    """The rows of ``path`` (csv, json, jsonl or parquet) as strings, with ``columns`` matched regardless of case.

    Args:
        path: a local file.
        columns: those to keep.
        check: raises ValueError, in a clause that says why, for a row that can't be used.

    Raises:
        ValueError: unknown file type, missing column, empty value, unusable row or no rows; it names the file.
        FileNotFoundError: no such file.
        RunError: what reads such files is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix not in READERS:
        raise ValueError(f"{path}: a task file ends in one of {', '.join(READERS)}")
    try:
        if path.stat().st_size > MOST:
            raise ValueError(f"it has more than {MOST >> 20} MiB")
        with limited_memory(f"{path}: reading it"):
            found = READERS[path.suffix](path)
        if len(found) > MOST_ROWS:
            raise ValueError(f"it has more than {MOST_ROWS} rows")
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path}: can't be read as {path.suffix[1:]}: {error}") from error
    rows = text_rows(found, dict.fromkeys(name for row in found for name in row), columns, str(path))
    for number, row in enumerate(rows):
        try:
            if check is not None:
                check(row)
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}") from error
    return rows


def hub_rows(dataset: str, name: str | None, split: str, columns: Sequence[str]) -> list[Mapping[str, str]]:
    """The rows of a split of a dataset on the hub, or in the local cache of it, as strings.

    Raises:
        RunError: it can't be reached, has no such split, or what reads it is not installed.
        ValueError: missing column or empty value.
    """
    instead = "local files are given by --train_file, --validation_file and --test_file"
    if find_spec("datasets") is None:
        missing = "is read with the datasets package, which is not installed: pip install 'dopsd[train]'"
        raise RunError(f"{dataset}, split {split}, on the hub, {missing}; {instead}")
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(dataset, name, split=split)
    except Exception as error:  # whatever the hub's client and its transport may raise
        raise RunError(
            f"{dataset}, split {split}, can't be had from the hub ({type(error).__name__}: {error}); {instead}"
        ) from error
    return text_rows(table, table.column_names, columns, f"{dataset}, {split}")


def text_rows(
    rows: Iterable[Mapping[str, Any]], names: Iterable[str], columns: Sequence[str], source: str
) -> list[Mapping[str, str]]:
    """The ``columns`` of rows that have such ``names``, as strings; errors name the ``source``."""
    names = list(names)
    if not names:
        raise ValueError(f"{source}: no rows")
    by_name = {name.lower(): name for name in names}
    missing = [name for name in columns if name not in by_name]
    if missing:
        raise ValueError(f"{source}: missing column {', '.join(missing)}; it has {', '.join(names)}")
    values = [{name: row.get(by_name[name]) for name in columns} for row in rows]
    text = [{name: "" if value is None else str(value) for name, value in row.items()} for row in values]
    for number, row in enumerate(text):
        for name, value in row.items():
            if not value:
                raise ValueError(f"{source}: row {number} has no value for {name}")
    if not text:
        raise ValueError(f"{source}: no rows")
    return list(text)
