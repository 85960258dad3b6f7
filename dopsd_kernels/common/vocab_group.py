"""A vocabulary that is sharded over the processes of a group."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class VocabGroup(NamedTuple):
    """One process' place in a group of which every member holds consecutive rows of the weight, in rank order.

    The tensors that are reduced have a few entries per row. Without a group, every reduction is the identity.
    """

    group: dist.ProcessGroup | None
    first_column: int  # of this process
    vocab: int  # of all processes
    widest: int  # columns of the process that has most
    size: int = 1

    @classmethod
    def of(cls, name: str | None, vocab: int, device: torch.device) -> "VocabGroup":
        """Return this process' place, given the group's name (None: no group) and how many columns it holds."""
        if name is None:
            return cls(None, 0, vocab, vocab)
        group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
        size = dist.get_world_size(group)
        widths = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(size)]
        dist.all_gather(widths, torch.tensor([vocab], device=device), group=group)
        columns = torch.cat(widths).tolist()
        return cls(group, sum(columns[: dist.get_rank(group)]), sum(columns), max(columns), size)

    def gather(self, x: Tensor) -> Tensor:  # (n, ...) -> (size n, ...)
        """Return all processes' tensors, one after the other; they must have one shape."""
        if self.group is None:
            return x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self.group)
        return torch.cat(parts)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the processes; `x` may be overwritten."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x
