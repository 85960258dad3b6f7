"""What a run has between two updates, the same on all processes, beside what transformers saves of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from dopsd.checkpoints import PENDING_FILE, reading
from dopsd.files import read_json
from dopsd.method import Serialisable, Sizes
from dopsd.metrics import Figures


class Pending(NamedTuple):
    """A part of a checkpoint.

    Args:
        batch_size: what the losses of the current batch are divided by.
        slices: the examples of the current batch, for each update that it still is to have.
        sizes: those that the run has come to.
        metrics: of updates that are not logged yet, over all processes.
    """

    batch_size: float
    slices: list[list[Serialisable]]
    sizes: Sizes
    metrics: list[Figures]

    def save(self, folder: Path) -> None:
        """Write the file."""
        slices = [[example.to_json() for example in examples] for examples in self.slices]
        fields = {**self._asdict(), "slices": slices, "sizes": asdict(self.sizes)}
        (folder / PENDING_FILE).write_text(json.dumps(fields))

    @classmethod
    def load(cls, folder: Path, example_type: type[Any]) -> Pending:
        """The inverse of :meth:`save`, of examples of this type; RunError if the file is none of its kind."""
        fields = read_json(folder / PENDING_FILE)
        with reading(str(folder)):
            slices = [[example_type.from_json(example) for example in examples] for examples in fields["slices"]]
            metrics = [Figures(*figures) for figures in fields["metrics"]]
            return cls(fields["batch_size"], slices, Sizes(**fields["sizes"]), metrics)
