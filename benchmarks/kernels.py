"""Times the ops' cases: every provider that can run, in the same rounds, with its memory and its error.

The rounds have a large copy and a large product of random matrices too: what the machine does at most while it is as
warm, or as busy with other things, as it is for the rows that are divided by it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import torch

from benchmarks import measure, results
from benchmarks.measure import DEVICE, Clock, Trial, Unusable
from benchmarks.ops import Case, Provider
from benchmarks.results import Row

Ceiling = tuple[str, float, Callable[[], object]]  # flops or bytes, how many, what does them


def ceilings(rehearsal: bool) -> list[Ceiling]:
    """What the machine can do at most: the product's flops, and the copy's bytes."""
    cuda = DEVICE.type == "cuda" and not rehearsal
    size, count = (8192, 1 << 30) if cuda else (64, 1 << 10) if rehearsal else (1024, 1 << 24)
    dtype = torch.bfloat16 if cuda else torch.float32
    # Random: a product of zeros draws less power, and runs at higher clocks.
    generator = torch.Generator(DEVICE).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=DEVICE).to(dtype) for _ in range(2))
    product, source = torch.empty_like(a), torch.zeros(count, dtype=dtype, device=DEVICE)
    target = torch.empty_like(source)
    return [
        ("flops", 2.0 * size**3, lambda: torch.mm(a, b, out=product)),
        ("bytes", 2.0 * source.nbytes, lambda: target.copy_(source)),
    ]


def ceiling(rehearsal: bool) -> Row:
    """The ceilings as they are now, in flops and bytes per second; what they need of memory is given back."""
    limits = ceilings(rehearsal)
    bounds = [Trial(run) for _, _, run in limits]
    measure.interleave(bounds, Clock(DEVICE), 0.0, 3, 3)
    return _rates(limits, bounds)


def _rates(limits: Sequence[Ceiling], bounds: Sequence[Trial]) -> Row:
    return {
        need: 1000 * amount / results.figures(bound)["ms"]
        for (need, amount, _), bound in zip(limits, bounds, strict=True)
    }


def announced(case: Case, providers: Sequence[Provider]) -> list[Row]:
    """The rows of a case before anything of them is known, those of who cannot run with the reason."""
    rows = []
    for provider in providers:
        reason = provider.missing(DEVICE)
        status = "ok" if reason is None else f"skipped: {reason}"
        rows.append({**case.about(), "provider": provider.name, "status": status})
    return rows


def measure_case(
    case: Case,
    providers: Sequence[Provider],
    limits: Sequence[Ceiling],
    process: Executor | None = None,
    seconds: float = 4.0,
    rounds: tuple[int, int] = (3, 15),
) -> tuple[list[Row], list[Trial]]:
    """Measure all providers of a case; return the row and the trial of each.

    Args:
        limits: see `ceilings`.
        process: of `measure.fresh_process`, for memory on a CPU.
        seconds, rounds: of the rounds, how long and how many.

    Raises:
        Unusable: a provider has cost this process its GPU; with the rows of those that failed.
    """
    rows, tensors, clock = announced(case, providers), case.tensors(DEVICE), Clock(DEVICE)
    trials = [
        Trial(functools.partial(provider.run, case, tensors), row["status"])
        for provider, row in zip(providers, rows, strict=True)
    ]
    bounds = [Trial(run) for _, _, run in limits]
    try:
        for provider, row, trial in zip(providers, rows, trials, strict=True):
            trial.attempt(lambda: row.update(error(case, provider)))  # noqa: B023
            trial.attempt(trial.run)
            trial.attempt(lambda: setattr(trial, "peak_bytes", peak_memory(case, provider, trial, process)))  # noqa: B023
        measure.interleave([*bounds, *trials], clock, seconds, *rounds)
    except Unusable as lost:
        for row, trial in zip(rows, trials, strict=True):
            row["status"] = trial.status
        lost.rows = [row for row in rows if row["status"].startswith("failed")]
        raise
    clocks = {"clocks": results.query_gpu(*results.CLOCKS)} if DEVICE.type == "cuda" else {}
    rates = _rates(limits, bounds)
    for row, trial in zip(rows, trials, strict=True):
        row["status"] = trial.status
        if trial.status == "ok":
            row |= {**results.figures(trial), **clocks, **case.needs(), "ceiling": rates}
            row |= results.of_ceiling(row)
    for row in rows:
        if "ms" in row:
            others = [other for other in rows if other is not row and "ms" in other]
            row["over"] = {other["provider"]: row["ms"] / other["ms"] for other in others}
    return rows, trials


def error(case: Case, provider: Provider) -> Row:
    """The relative error of a provider's results against fp64, on few rows; nothing if it does not compute the op."""
    small: Any = case.small()
    tensors = small.tensors(DEVICE)
    found = provider.run(small, tensors)
    if found is None:
        return {}
    exact = small.exact(tensors)
    errors = [float((got.double() - want).norm() / want.norm()) for got, want in zip(found, exact, strict=True)]
    return {"error": max(errors)}


def peak_memory(case: Case, provider: Provider, trial: Trial, process: Executor | None) -> int | None:
    """The most memory of a run beyond what exists before it; None where there is no way to measure it."""
    if DEVICE.type == "cuda":
        return measure.gpu_peak(trial.run)
    return None if process is None else process.submit(_cpu_peak, case, provider.name).result()


_problem: dict[Case, Any] = {}


def _cpu_peak(case: Case, name: str) -> int:
    if case not in _problem:
        _problem.clear()
        _problem[case] = case.tensors(DEVICE)
    provider = next(provider for provider in case.providers() if provider.name == name)
    provider.run(case, _problem[case])  # pays one-time costs
    return measure.cpu_peak(lambda: provider.run(case, _problem[case]))
