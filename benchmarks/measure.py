"""One timer and one measure of memory for everything that is compared here.

What is compared runs in rounds, each of which runs everything once: what else the machine does then hits all alike. An
op's rounds have a large copy and a large product of random matrices too, its ceilings: what the machine does at most
while it is as warm, or as busy with other things, as it is for the rows that are divided by them.
"""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.case import Case
from benchmarks.ops import OPS, run
from benchmarks.results import CLOCKS, DEVICE, Row, query_gpu

_CYCLES = 2e9  # of a GPU in a second, about


class Unusable(RuntimeError):
    """The GPU's context is lost: whatever this process runs on it from now on fails."""

    rows: Sequence[Row] = ()  # of what has lost it


@dataclass
class Trial:
    """Something to run, and what became of it: seconds on the device, and on a GPU those of the host to issue it."""

    run: Callable[[], object]
    status: str = "ok"
    times: list[tuple[float, float | None]] = field(default_factory=list)
    peak_bytes: int | None = None

    def attempt(self, action: Callable[[], object]) -> None:
        """Do something unless it has failed before; raise `Unusable` if nothing can run after it in this process."""
        if self.status != "ok":
            return
        try:
            action()
            return
        except torch.OutOfMemoryError:
            self.status = "out of memory"
        except Exception as error:
            self.status = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if unusable(error):
                raise Unusable(self.status) from error
        gc.collect()
        torch.cuda.empty_cache()

    def figures(self) -> Row:
        """Its columns: median times, their 20 % and 80 % quantiles, and the peak of its memory."""
        times = [1000 * device for device, _ in self.times]
        low, *_, high = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 2
        row: Row = {"rounds": len(times), "ms_q20": low, "ms": statistics.median(times), "ms_q80": high}
        host = [1000 * host for _, host in self.times if host is not None]
        return {**row, **({"host_ms": statistics.median(host)} if host else {}), "peak_bytes": self.peak_bytes}


def unusable(error: BaseException | None = None) -> bool:
    """Whether the GPU's context is lost, after this error if it is known."""
    if isinstance(error, torch.AcceleratorError):
        return True
    try:
        torch.cuda.synchronize() if DEVICE.type == "cuda" else None
    except RuntimeError:
        return True
    return False


@functools.cache
def _cache_flush() -> torch.Tensor:
    size = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return torch.empty(2 * max(size, 64 << 20), dtype=torch.int8, device=DEVICE)


def timed(run: Callable[[], object], host: float = 0.002) -> tuple[float, float | None]:
    """Time a run whose issuing takes about ``host`` seconds: by the wall clock on a CPU, else by the GPU's events.

    A GPU has a cold L2 cache, and enough work before the run that all of it has been issued when it starts.
    """
    if DEVICE.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, None
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush = _cache_flush()
    torch.cuda.synchronize()
    flush.zero_()
    torch.cuda._sleep(int(_CYCLES * min(2 * host + 0.001, 0.1)))
    first.record()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000, host


def interleave(trials: Sequence[Trial], seconds: float, low: int, high: int) -> None:
    """Time trials in rounds: for so many seconds, but ``low`` rounds at least and ``high`` at most."""
    begin = time.perf_counter()
    for number in range(high):
        for trial in trials:
            # Whoever takes this long is not measured any better by more rounds.
            if len(trial.times) < 2 or sum(device for device, _ in trial.times) < seconds / 2:
                host = (trial.times[-1][1] if trial.times else None) or 0.002
                trial.attempt(lambda: trial.times.append(timed(trial.run, host)))  # noqa: B023
        spent = time.perf_counter() - begin
        if number + 1 >= low and spent * (number + 2) / (number + 1) > seconds:
            break


def peak_memory(run: Callable[[], object]) -> int:
    """The bytes that PyTorch has allocated at most while something runs, beyond what exists before."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def kept_memory(forward: Callable[[], torch.Tensor | None], inputs: Sequence[torch.Tensor]) -> int | None:
    """The bytes of all storages that autograd keeps of a forward pass beside its inputs'; None if there is no graph."""
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x.detach()  # a node that holds its own result would never be freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = forward()
    if out is None:
        return None
    for x in inputs:
        kept.pop(x.untyped_storage()._cdata, None)
    return sum(kept.values())


def ceilings(dtype: torch.dtype, rehearsal: bool) -> dict[str, tuple[float, Trial]]:
    """A large product's flops and a large copy's bytes in that dtype, and the trials that do them."""
    cuda = DEVICE.type == "cuda" and not rehearsal
    size, count = (8192, 1 << 30) if cuda else (64, 1 << 10) if rehearsal else (1024, 1 << 24)
    # Random: a product of zeros draws less power, and runs at higher clocks.
    generator = torch.Generator(DEVICE).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=DEVICE).to(dtype) for _ in range(2))
    product, source = torch.empty_like(a), torch.zeros(count, dtype=dtype, device=DEVICE)
    target = torch.empty_like(source)
    return {
        "flops": (2.0 * size**3, Trial(lambda: torch.mm(a, b, out=product))),
        "bytes": (2.0 * source.nbytes, Trial(lambda: target.copy_(source))),
    }


def rates(limits: dict[str, tuple[float, Trial]]) -> dict[str, float]:
    """What the ceilings' trials have reached, per second."""
    return {need: 1000 * amount / trial.figures()["ms"] for need, (amount, trial) in limits.items()}


def of_ceiling(row: Row, ceiling: dict[str, float]) -> Row:
    """The columns that say what share of the ceilings a row with its needs and its time has reached."""
    share = max(row[need] / rate for need, rate in ceiling.items() if need in row)
    return {"ceiling": ceiling, "of_ceiling": 1000 * share / row["ms"]}


def announced(case: Case, providers: Sequence[str]) -> list[Row]:
    """The rows of a case before anything of them is known, those of who cannot run with the reason."""
    rows = []
    for name in providers:
        reason = OPS[case.op].providers[name].missing(DEVICE)
        rows.append({**case.about(), "provider": name, "status": "ok" if reason is None else f"skipped: {reason}"})
    return rows


@functools.lru_cache(1)
def _exact(case: Case) -> tuple[Case, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """A case with few rows, its tensors, and what is right, in fp64."""
    small, op = case.small(), OPS[case.op]
    tensors = op.tensors(small, DEVICE)
    exact = run(small, op.exact, [x.detach().double().requires_grad_(x.requires_grad) for x in tensors])
    return small, tensors, exact


def error(case: Case, provider: str) -> Row:
    """The relative error of a provider's results against fp64, on few rows; nothing if it does not compute the op."""
    small, tensors, exact = _exact(case)
    found = run(small, OPS[case.op].providers[provider].forward, tensors)
    if not found:
        return {}
    pairs = zip(found, exact, strict=True)
    return {"error": max(float((got.double() - want).norm() / want.norm()) for got, want in pairs)}


def measure_case(
    case: Case, providers: Sequence[str], rehearsal: bool, rounds: tuple[float, int, int]
) -> tuple[list[Row], list[Trial]]:
    """Measure providers of a case, in the rounds of `interleave`; a row and a trial of each.

    Raises:
        Unusable: a provider has cost this process its GPU; with the rows of those that failed.
    """
    rows, op = announced(case, providers), OPS[case.op]
    tensors, limits = op.tensors(case, DEVICE), ceilings(case.dtype, rehearsal)
    trials = [
        Trial(functools.partial(run, case, op.providers[row["provider"]].forward, tensors), status=row["status"])
        for row in rows
    ]
    try:
        for row, trial in zip(rows, trials, strict=True):
            trial.attempt(lambda: row.update(error(case, row["provider"])))  # noqa: B023
            trial.attempt(trial.run)  # pays one-time costs
            trial.attempt(lambda: setattr(trial, "peak_bytes", peak_memory(trial.run)))  # noqa: B023
            if case.phase == "both":
                forward = functools.partial(op.providers[row["provider"]].forward, case, *tensors)
                trial.attempt(lambda: row.update(kept_bytes=kept_memory(forward, tensors)))  # noqa: B023
        interleave([*(trial for _, trial in limits.values()), *trials], *rounds)
    except Unusable as lost:
        failed = [{**row, "status": trial.status} for row, trial in zip(rows, trials, strict=True)]
        lost.rows = [row for row in failed if row["status"].startswith("failed")]
        raise
    clocks = {"clocks": query_gpu(*CLOCKS)} if DEVICE.type == "cuda" else {}
    for row, trial in zip(rows, trials, strict=True):
        row["status"] = trial.status
        if trial.status == "ok":
            row |= {**trial.figures(), **clocks, **op.needs(case)}
            row |= of_ceiling(row, rates(limits))
    ran = [row for row in rows if "ms" in row]
    for row in ran:
        row["over"] = {other["provider"]: row["ms"] / other["ms"] for other in ran if other is not row}
    return rows, trials
