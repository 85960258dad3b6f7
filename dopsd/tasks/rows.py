"""Rows of a task from a local file or from the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dopsd.errors import RunError

READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


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
    """
    import datasets
    import pyarrow.csv

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix not in READERS:
        raise ValueError(f"{path}: a task file ends in one of {', '.join(READERS)}")
    if not path.read_bytes().strip():
        raise ValueError(f"{path}: no rows")
    features = None
    try:
        if path.suffix == ".csv":
            # Every column is read as text: a puzzle such as 0140432014020000 would otherwise become an integer.
            lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
            names = pyarrow.csv.open_csv(path, parse_options=lines).schema.names
            features = datasets.Features({name: datasets.Value("string") for name in names})
        table = datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", features=features)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error)
        raise ValueError(f"{path}: can't be read as {path.suffix[1:]} with at least one row: {reason}") from error
    rows = text_rows(table, columns, str(path))
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
        RunError: it can't be reached, or has no such split.
        ValueError: missing column or empty value.
    """
    import datasets

    try:
        table = datasets.load_dataset(dataset, name, split=split)
    except Exception as error:  # whatever the hub's client and its transport may raise
        raise RunError(
            f"{dataset}, split {split}, can't be had from the hub ({type(error).__name__}: {error}); local files are "
            "given by --train_file, --validation_file and --test_file"
        ) from error
    return text_rows(table, columns, f"{dataset}, {split}")


def text_rows(table: Any, columns: Sequence[str], source: str) -> list[Mapping[str, str]]:
    """The rows of a ``datasets.Dataset`` as strings; errors name the ``source``."""
    by_name = {name.lower(): name for name in table.column_names}
    missing = [name for name in columns if name not in by_name]
    if missing:
        raise ValueError(f"{source}: missing column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    values = ({name: row[by_name[name]] for name in columns} for row in table)
    rows = [{name: "" if value is None else str(value) for name, value in row.items()} for row in values]
    for number, row in enumerate(rows):
        for name, value in row.items():
            if not value:
                raise ValueError(f"{source}: row {number} has no value for {name}")
    if not rows:
        raise ValueError(f"{source}: no rows")
    return list(rows)
