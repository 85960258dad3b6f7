"""The benchmarks' result files: one JSON file per run, its rows written as they are measured.

A run's file has three fields: ``rehearsal`` (whether sizes were small and figures mean nothing), ``machine`` (what the
figures depend on beside the code) and ``rows``. `COLUMNS` says what a row's columns mean, `ABOUT` which of them name
what was measured: no two rows of a file agree in these. Files under ``benchmarks/results`` are only ever added.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dopsd.files import write_json
from dopsd.versions import versions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "results"
PEERS = ("liger-kernel", "trl", "flash-attn", "bitsandbytes")
# What nvidia-smi is asked for.
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu")

Row = dict[str, Any]
Content = dict[str, Any]

COLUMNS = {
    "part": "kernels, attention, layer, step, tests or train",
    "status": "ok, out of memory, out of time, or skipped: or failed: with the reason",
    "rounds": "how often it was timed",
    "ms": "median time in milliseconds: of the GPU alone where there is one, else by the wall clock",
    "ms_q20": "20 % quantile of the time",
    "ms_q80": "80 % quantile of the time",
    "host_ms": "median time that the host needed to issue it to a GPU",
    "over": "ratio of the time to that of each other provider in the same rounds",
    "peak_bytes": "most memory beyond what existed before, of a step before all its phases; null where not measured",
    "kept_bytes": "what is kept for the backward pass beside the inputs",
    "total_bytes": "most memory in use, weights and optimiser included; null where it was not measured",
    "flops": "arithmetic that the result needs, whatever was done; nothing that is computed again",
    "bytes": "memory traffic that it needs: every input and output once",
    "ceiling": "flops and bytes per second of a large product and a large copy, timed in the same rounds",
    "of_ceiling": "flops or bytes, over time, over the ceiling; the larger",
    "clocks": "clocks, power and temperature right after it, as nvidia-smi has them",
    "error": "relative error against fp64, the largest over loss and gradients, or of the probability",
    "op": "step_kl, token_logprob, confidence or products",
    "setting": "with which options",
    "data": "kind of rows: diffuse or peaked",
    "rows": "N, rows of hidden states",
    "width": "d, or the width of an attention head",
    "vocab": "V",
    "dtype": "of the operands",
    "phase": "forward or both; of a step: rollout, teacher, student, optimiser, update (the last three)",
    "provider": "who computed it",
    "variant": "of a step, with which options",
    "hidden": "width between an MLP's products",
    "rank": "of adapters",
    "groups": "G, prefixes",
    "sequences": "S, sequences of a prefix",
    "heads": "H",
    "prefix": "P, keys that a group shares; of a step, tokens of the prompt",
    "length": "T, tokens of a sequence; of a step, L, tokens of the response",
    "states": "denoising states of the step; of a rollout, the steps that were decoded",
    "states_per_forward": "states of a micro-batch; of a rollout, sequences",
    "tokens": "tokens that the network was fed in this phase",
    "parameters": "of the model without its adapter",
    "trained": "parameters of the adapter",
    "name": "of a test",
    "seconds": "wall-clock time of a test or a training run",
    "seed": "of a training run",
    "accuracy_before": "held-out accuracy before training",
    "accuracy_after": "held-out accuracy after training",
    "standard_error_before": "its standard error",
    "standard_error_after": "its standard error",
    "accuracy_recorded": "mean accuracy after the same training on CPUs, over seeds",
    "standard_error_recorded": "standard error of one of those runs",
    "agrees": "whether the two differ by at most two standard errors of their difference",
}
# Part -> the columns that name a row; every row of the part has them all.
ABOUT: dict[str, tuple[str, ...]] = {
    "kernels": ("op", "setting", "data", "rows", "width", "vocab", "dtype", "phase", "provider", "variant"),
    "attention": ("groups", "sequences", "heads", "length", "prefix", "width", "dtype", "phase", "provider"),
    "layer": ("sequences", "length", "width", "heads", "hidden", "rank", "dtype", "phase", "provider"),
    "step": ("provider", "variant", "states_per_forward", "phase", "prefix", "length", "states", "dtype"),
    "tests": ("name",),
    "train": ("seed",),
}
_STATUS = re.compile(r"ok|out of memory|out of time|(skipped|failed): (?s:.+)")


def identity(row: Row) -> tuple[Any, ...]:
    """What a row is about: equal in two runs for what can be compared."""
    return (row["part"], *(row[name] for name in ABOUT[row["part"]]))


def cases(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by case: those that differ in the provider alone."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        names = [name for name in ABOUT[row["part"]] if name not in ("provider", "variant")]
        found.setdefault((row["part"], *(row[name] for name in names)), []).append(row)
    return list(found.values())


def name_of(row: Row) -> str:
    """What a row is about, in a few words; of an op, its case."""
    if row["part"] == "attention":
        return f"attention {row['phase']}, T = {row['length']}, P = {row['prefix']}"
    if row["part"] == "layer":
        return f"layer {row['phase']}, {row['dtype']}, N = {row['sequences']} x {row['length']}"
    if row["part"] != "kernels":
        return f"{row['part']} {row.get('phase', '')}".strip()
    peaked = ", peaked" if row["data"] == "peaked" else ""
    return f"{row['op']} {row['setting'].replace('_', ' ')}{peaked}, N = {row['rows']}"


def load(path: Path) -> Content:
    """Return a run's file, which must be valid and no rehearsal: figures come from nowhere else.

    Raises:
        ValueError: naming the file, and what is wrong with it.
    """
    content: Content = json.loads(path.read_text())
    if content.keys() != {"rehearsal", "machine", "rows"}:
        raise ValueError(f"{path.name}: a run's file has the fields rehearsal, machine and rows")
    if content["rehearsal"]:
        raise ValueError(f"{path.name} is a rehearsal: its sizes are small and its figures mean nothing")
    rows = [row for row in content["rows"] if row["part"] != "ceilings"]  # of older files, in no row's rounds
    for number, row in enumerate(rows):
        if wrong := _fault(row):
            raise ValueError(f"{path.name}: row {number} {wrong}")
    if len({identity(row) for row in rows}) < len(rows):
        raise ValueError(f"{path.name}: two rows are about the same")
    return {**content, "rows": rows}


def _fault(row: Row) -> str | None:
    if row.get("part") not in ABOUT:
        return f"has part={row.get('part')!r}, which is none of {', '.join(ABOUT)}"
    for name in ("status", *ABOUT[row["part"]]):
        if name not in row:
            return f"has no {name}"
    if not _STATUS.fullmatch(row["status"]):
        return f"has status={row['status']!r}"
    return None


def new_path(folder: Path) -> Path:
    """Return a path in ``folder`` that is not taken yet, named by device and date."""
    about = machine()
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    name, number = f"{device}_{about['date']}", 1
    while (path := folder / f"{name}{'' if number == 1 else f'_{number}'}.json").exists():
        number += 1
    return path


class Recorder:
    """A run's file, which one process at a time adds to: rows are written as they come. A path of None writes nothing.

    What is about to be measured is announced. If the process ends before the figures, that is what its rows say, and
    whoever goes on with the file knows what not to try again.
    """

    def __init__(self, path: Path | None, rehearsal: bool = False) -> None:
        self.path = path
        known = path is not None and path.is_file()
        self.content: Content = (
            json.loads(path.read_text()) if known else {"rehearsal": rehearsal, "machine": machine(), "rows": []}
        )
        self.by_identity: dict[tuple[Any, ...], Row] = {identity(row): row for row in self.content["rows"]}
        if not known:
            self._write()

    @property
    def rows(self) -> list[Row]:
        """All rows so far."""
        return list(self.by_identity.values())

    def new(self, rows: Sequence[Row]) -> list[Row]:
        """Those of rows about what the file does not have yet."""
        return [row for row in rows if identity(row) not in self.by_identity]

    def announce(self, rows: Sequence[Row]) -> None:
        """Write that these are being measured."""
        ended = {"status": "failed: the process ended in it"}
        self.add([{**row, **(ended if row["status"] == "ok" else {})} for row in rows])

    def withdraw(self, rows: Sequence[Row]) -> None:
        """Forget what was announced: it can be tried again."""
        for row in rows:
            del self.by_identity[identity(row)]
        self._write()

    def add(self, rows: Sequence[Row]) -> None:
        """Write rows, in place of what was announced; ValueError for a column that `COLUMNS` lacks, or no valid row."""
        for row in rows:
            wrong = next((f"has a column {name}, which is unknown" for name in row if name not in COLUMNS), _fault(row))
            if wrong is not None:
                raise ValueError(f"a row {wrong}: {row}")
            self.by_identity[identity(row)] = {name: _rounded(value) for name, value in row.items()}
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {**self.content, "rows": self.rows})


def _rounded(value: Any) -> Any:
    """Keep four digits of a measured number; more are noise."""
    if isinstance(value, dict):
        return {name: _rounded(number) for name, number in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code: hardware and versions, with the date and the revision."""
    cuda = DEVICE.type == "cuda"
    return {
        "kind": "gpu" if cuda else "cpu",
        "device": torch.cuda.get_device_name(DEVICE) if cuda else _cpu_name(),
        "driver": query_gpu("driver_version").get("driver_version"),
        "clocks": query_gpu(*CLOCKS),
        "cuda": torch.version.cuda or torch.version.hip,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(*PEERS),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "revision": _first_line("git", "describe", "--always", "--dirty"),
    }


def query_gpu(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; nothing where there is no nvidia-smi."""
    line = _first_line("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader") or ""
    values = [value.strip() for value in line.split(",")]
    return dict(zip(fields, values, strict=True)) if line and len(values) == len(fields) else {}


def _first_line(*command: str) -> str | None:
    try:
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return None
    return printed.strip().partition("\n")[0] or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return names[1] if names else platform.processor()
