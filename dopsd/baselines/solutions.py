"""Worked solutions of a task's rows, as responses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dopsd.errors import RunError
from dopsd.rollout import Decoder
from dopsd.tasks import Row


def solution_ids(decoder: Decoder, row: Row) -> Tensor | None:
    """(N,) int64 on the CPU, the tokens of a row's solution behind the decoder's prefill; none if it has none.

    Raises:
        RunError: it does not begin with the prefill.
    """
    text = decoder.task.solution(row)
    if text is None:
        return None
    if not text.startswith(decoder.prefill):
        raise RunError(
            f"prefill={decoder.prefill!r}: solutions are learnt from behind it, and one begins with {text[:40]!r}"
        )
    return decoder.tokenize(text.removeprefix(decoder.prefill)).cpu()


def check_solutions(decoder: Decoder, rows: Sequence[Row], gen_length: int, method: str) -> None:
    """Raise :class:`~dopsd.errors.RunError` unless each row has a solution, of at most ``gen_length`` tokens."""
    found = [solution_ids(decoder, row) for row in rows]
    missing = [number for number, ids in enumerate(found) if ids is None]
    if missing:
        raise RunError(
            f"method={method} learns from solutions, and the task {type(decoder.task).__name__} has none of "
            f"{len(missing)} of {len(rows)} rows, the first of them row {missing[0]}: its solution() is None"
        )
    lengths = [len(ids) for ids in found if ids is not None]
    long = [number for number, length in enumerate(lengths) if length > gen_length]
    if long:
        raise RunError(
            f"{len(long)} of {len(rows)} solutions are longer than gen_length={gen_length}: row {long[0]}'s has "
            f"{lengths[long[0]]} tokens, and the longest {max(lengths)}; solutions are never cut"
        )


def solution_tokens(decoder: Decoder, row: Row, gen_length: int) -> Tensor:
    """(L,) int64 on the CPU, a checked row's solution with end-of-text behind it."""
    ids = solution_ids(decoder, row)
    assert ids is not None
    return torch.nn.functional.pad(ids, (0, gen_length - len(ids)), value=decoder.eos_id)
