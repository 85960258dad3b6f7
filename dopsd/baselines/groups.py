"""Groups: several independent responses to each prompt, which are told apart by their grades."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dopsd.method import B, E, Method
from dopsd.metrics import of_groups
from dopsd.rollout import Decoder, Rollout
from dopsd.tasks import Row


class GroupMethod(Method[E, B]):
    """Learning from groups of ``pass_k`` responses; arguments as of :class:`~dopsd.method.Method`."""

    def rollouts(
        self, decoder: Decoder, rows: Sequence[Row], seeds: Tensor, on_rows: Callable[[int], object]
    ) -> list[Rollout]:
        """``pass_k`` responses to each row, side by side."""
        size, temperature = self.decoding.pass_k, self.decoding.temperature
        return decoder.group(rows, self.decoding.decoding(), seeds, size, temperature, on_rows=on_rows)

    def groups(self, rollouts: Sequence[Rollout]) -> list[Sequence[Rollout]]:
        """The responses to each row."""
        size = self.decoding.pass_k
        return [rollouts[start : start + size] for start in range(0, len(rollouts), size)]

    def figures(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        return of_groups(self.groups(rollouts), self.decoder.eos_id)
