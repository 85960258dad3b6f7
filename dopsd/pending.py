"""What a process has of a run between two updates, beside what transformers saves of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from dopsd.checkpoints import pending_name, reading
from dopsd.files import read_json
from dopsd.method import Serialisable, Sizes
from dopsd.metrics import Figures


class Pending(NamedTuple):
    """One process's part of a checkpoint.

    Args:
        batch_size: what the losses of the current batch are divided by, over all processes.
        slices: the examples of the current batch, for each update that it still is to have.
        sizes: those that the run has come to.
        metrics: of updates that are not logged yet.
    """

    batch_size: float
    slices: list[list[Serialisable]]
    sizes: Sizes
    metrics: list[Figures]

    def save(self, folder: Path, process: int) -> None:
        """Write the file of ``process``."""
        slices = [[example.to_json() for example in examples] for examples in self.slices]
        fields = {**self._asdict(), "slices": slices, "sizes": asdict(self.sizes)}
        (folder / pending_name(process)).write_text(json.dumps(fields))

    @classmethod
    def load(cls, folder: Path, process: int, example_type: type[Any]) -> Pending:
        """The inverse of :meth:`save`, of examples of this type; RunError if the file is none of its kind."""
        fields = read_json(folder / pending_name(process))
        with reading(str(folder)):
            slices = [[example_type.from_json(example) for example in examples] for examples in fields["slices"]]
            metrics = [Figures(*figures) for figures in fields["metrics"]]
            return cls(fields["batch_size"], slices, Sizes(**fields["sizes"]), metrics)
