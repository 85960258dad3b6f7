"""What a process has of a run between two updates, beside what transformers saves of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from dopsd.checkpoints import pending_name, reading
from dopsd.distillation import Sizes
from dopsd.files import read_json
from dopsd.metrics import Figures
from dopsd.step_batch import Example


class Pending(NamedTuple):
    """One process's part of a checkpoint.

    Args:
        accepted_count: trajectories of the current batch that train, over all processes.
        slices: the examples of the current batch, for each update that it still is to have.
        sizes: those that the run has come to.
        metrics: of updates that are not logged yet.
    """

    accepted_count: int
    slices: list[list[Example]]
    sizes: Sizes
    metrics: list[Figures]

    def save(self, folder: Path, process: int) -> None:
        """Write the file of ``process``."""
        slices = [[example.to_json() for example in examples] for examples in self.slices]
        fields = {**self._asdict(), "slices": slices, "sizes": asdict(self.sizes)}
        (folder / pending_name(process)).write_text(json.dumps(fields))

    @classmethod
    def load(cls, folder: Path, process: int) -> Pending:
        """The inverse of :meth:`save`; RunError if the file is none of its kind."""
        fields = read_json(folder / pending_name(process))
        with reading(str(folder)):
            slices = [[Example.from_json(example) for example in examples] for examples in fields["slices"]]
            metrics = [Figures(*figures) for figures in fields["metrics"]]
            return cls(fields["accepted_count"], slices, Sizes(**fields["sizes"]), metrics)
