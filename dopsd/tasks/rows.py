"""Rows of a task from a local file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of ``path`` (csv, json, jsonl or parquet) as strings, with ``columns`` matched regardless of case.

    Raises:
        ValueError: unknown file type, missing column, empty value or no rows at all; the sentence names the file.
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
            names = pyarrow.csv.open_csv(path).schema.names
            features = datasets.Features({name: datasets.Value("string") for name in names})
        table = datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", features=features)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error)
        raise ValueError(f"{path}: can't be read as {path.suffix[1:]} with at least one row: {reason}") from error
    by_name = {name.lower(): name for name in table.column_names}
    missing = [name for name in columns if name not in by_name]
    if missing:
        raise ValueError(f"{path}: missing column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    rows = [{name: str(row[by_name[name]] or "") for name in columns} for row in table]
    for number, row in enumerate(rows):
        for name, value in row.items():
            if not value:
                raise ValueError(f"{path}: row {number} has no value for {name}")
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows
