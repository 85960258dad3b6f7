"""What a benchmark of an op is given."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.results import ABOUT, Row, name_of


@dataclass(frozen=True)
class Case:
    """A problem; its fields are the columns that name it, those that its op has no use for 0 or empty."""

    op: str
    phase: str
    setting: str = ""  # what is asked of the op
    rows: int = 0  # N
    width: int = 0  # d, or of an attention head
    vocab: int = 0  # V
    dtype: torch.dtype = torch.float32
    data: str = "diffuse"  # or "peaked", like a trained model's
    groups: int = 0  # G
    sequences: int = 0  # S of each group
    heads: int = 0
    length: int = 0  # T tokens of a sequence
    prefix: int = 0  # P keys that a group shares
    hidden: int = 0  # width between an MLP's products
    rank: int = 0  # of adapters

    def __str__(self) -> str:
        return name_of(self.about())

    def about(self) -> Row:
        """The columns that name it."""
        part = {"attention": "attention", "lora_layer": "layer"}.get(self.op, "kernels")
        columns = {name: getattr(self, name, "") for name in ABOUT[part] if name != "provider"}
        return {"part": part, **columns, "dtype": str(self.dtype).removeprefix("torch.")}

    def small(self) -> Case:
        """The same with few enough rows, or groups and heads, for fp64."""
        few = {"groups": min(self.groups, 1), "heads": min(self.heads, 2)} if self.op == "attention" else {}
        return replace(self, rows=min(self.rows, 64), **few)
