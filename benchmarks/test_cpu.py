"""The ops on a CPU, against the eager computation and the bare products: time and peak memory.

A round runs every variant once, so that what else the machine does hits all of them; medians are compared.
Only the memory ratio is asserted: it does not depend on the machine's load.
"""

import datetime
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.workloads import OPS, ROWS, VOCAB, WIDTH

ROUNDS = 9
RESULTS = Path(__file__).parent / "results" / "cpu_step_kl.json"
MEMORY_RATIO = 0.1  # promised of the loss: its peak memory against eager's


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Collect the figures of all cases; with --record, write them when the module is done."""
    cases: dict[str, Any] = {}
    yield cases
    if request.config.getoption("--record") and cases:
        machine = {
            "cpu": _cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }
        problem = {"d": WIDTH, "V": VOCAB, "dtype": "float32", "rounds": ROUNDS}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": machine, "problem": problem, "cases": cases}, indent=1) + "\n")


@pytest.mark.parametrize(
    ("op", "case"),
    [("step_kl", "clipped"), ("step_kl", "unclipped"), ("confidence", "32"), ("confidence", "512")],
)
def test_against_eager(benchmark: Any, record: dict[str, Any], op: str, case: str) -> None:
    variants = OPS[op](case)
    seconds: dict[str, list[float]] = {name: [] for name in ("eager", "floor")}

    def run_the_others() -> None:
        for name, times in seconds.items():
            start = time.perf_counter()
            variants[name]()
            times.append(time.perf_counter() - start)

    benchmark.pedantic(variants["ours"], setup=run_the_others, rounds=ROUNDS, warmup_rounds=1)
    # The set-up of the warm-up round is the others' warm-up.
    seconds = {"ours": benchmark.stats.stats.data, **{name: times[1:] for name, times in seconds.items()}}

    quantiles = {
        name: torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist() for name, times in seconds.items()
    }
    median = {name: q[1] for name, q in quantiles.items()}
    peak = {name: _peak_memory(op, name, case) for name in ("ours", "eager")}
    figures = {
        "rows": ROWS if op == "step_kl" else int(case),
        "seconds_q20_q50_q80": quantiles,
        "ours_over_eager": median["ours"] / median["eager"],
        "ours_over_floor": median["ours"] / median["floor"],
        "peak_bytes": peak,
        "peak_ours_over_eager": peak["ours"] / peak["eager"],
    }
    benchmark.extra_info.update(figures)
    record[f"{op} {case}"] = figures
    if op == "step_kl":
        assert peak["ours"] <= MEMORY_RATIO * peak["eager"]


def _peak_memory(op: str, variant: str, case: str) -> int:
    command = [sys.executable, "-m", "benchmarks.workloads", op, variant, case]
    return int(subprocess.check_output(command, cwd=Path(__file__).parents[1], text=True))


def _cpu_name() -> str:
    names = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[1] if names else platform.processor()
