"""The benchmarks' result files: one JSON file per run, its rows written as they are measured, and their schema.

A run's file has three fields: ``rehearsal`` (whether sizes were small and figures mean nothing), ``machine`` (what the
figures depend on beside the code) and ``rows``. `COLUMNS` says what a row's columns mean, `ABOUT` which of them name
what was measured: no two rows of a file agree in these. Files under ``benchmarks/results`` are only ever added.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.problems import Case
from benchmarks.providers import Provider

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "numpy",
    "liger-kernel",
    "trl",
    "flash-attn",
    "bitsandbytes",
)
# What nvidia-smi is asked for, at the start of a run and under load.
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu")

Row = dict[str, Any]
Content = dict[str, Any]

# ------------------------------------------------------------------------------------------------------------
# Schema
# ------------------------------------------------------------------------------------------------------------

_NUMBER = (int, float)
_MAYBE_INT = (int, type(None))

# Column -> accepted types and meaning.
COLUMNS: dict[str, tuple[tuple[type, ...], str]] = {
    "part": ((str,), "ceilings, tests, kernels, attention, step or train"),
    "status": ((str,), "ok, out of memory, out of time, or skipped: or failed: with the reason"),
    # Of what is timed.
    "rounds": ((int,), "how often it was timed"),
    "ms": (_NUMBER, "median time in milliseconds"),
    "ms_q20": (_NUMBER, "20 % quantile of the time"),
    "ms_q80": (_NUMBER, "80 % quantile of the time"),
    "peak_bytes": (
        _MAYBE_INT,
        "most memory beyond what existed before, of a step before all its phases; null where it was not measured",
    ),
    "total_bytes": (_MAYBE_INT, "most memory in use, weights and optimiser included; null where it was not measured"),
    "flops": (_NUMBER, "arithmetic that the result needs, whatever was done; nothing that is computed again"),
    "bytes": (_NUMBER, "memory traffic that it needs: every input and output once"),
    "of_ceiling": (
        _NUMBER,
        "flops or bytes, over time, over what the same run measured as the ceiling; the larger",
    ),
    "over": ((dict,), "ratio of the time to that of every other provider of the same problem"),
    # Of what it is about.
    "name": ((str,), "of a ceiling (copy or matmul), or of a test"),
    "clocks": ((dict,), "clocks, power and temperature right after it, as nvidia-smi has them"),
    "seconds": (_NUMBER, "wall-clock time of a test or a training run"),
    "op": ((str,), "step_kl or confidence"),
    "setting": ((str,), "reverse_kl, clipped or confidence"),
    "data": ((str,), "kind of rows: diffuse or peaked"),
    "rows": ((int,), "N, rows of hidden states"),
    "width": ((int,), "d, or the width of an attention head"),
    "vocab": ((int,), "V"),
    "dtype": ((str,), "of the operands"),
    "phase": (
        (str,),
        "accuracy, forward, backward, both; of a step: rollout, teacher, student, optimiser, update (the last three)",
    ),
    "provider": ((str,), "who computed it"),
    "variant": ((str,), "with which options"),
    "gradient_in_forward": ((bool,), "whether its backward only multiplies"),
    "loss_error": (_NUMBER, "relative error of the loss against fp64"),
    "gradient_error": (_NUMBER, "relative error of the hidden states' gradient against fp64"),
    "probability_error": (_NUMBER, "relative error of the confidence against fp64"),
    "groups": ((int,), "G, prefixes"),
    "sequences": ((int,), "S, sequences of a prefix"),
    "heads": ((int,), "H"),
    "prefix": ((int,), "P, keys that a group shares; of a step, tokens of the prompt"),
    "length": ((int,), "T, tokens of a sequence; of a step, L, tokens of the response"),
    "states": ((int,), "denoising states of the step; of a rollout, the steps that were decoded"),
    "states_per_forward": ((int,), "states of a micro-batch; of a rollout, sequences"),
    "tokens": ((int,), "tokens that the network was fed in this phase"),
    "parameters": ((int,), "of the model without its adapter"),
    "trained": ((int,), "parameters of the adapter"),
    "seed": ((int,), "of a training run"),
    "accuracy_before": (_NUMBER, "held-out accuracy before training"),
    "accuracy_after": (_NUMBER, "held-out accuracy after training"),
    "standard_error_before": (_NUMBER, "its standard error"),
    "standard_error_after": (_NUMBER, "its standard error"),
    "accuracy_recorded": (_NUMBER, "mean accuracy after training over the seeds of tiny_recipe.json"),
    "standard_error_recorded": (_NUMBER, "standard error of one of those runs"),
    "agrees": ((bool,), "whether the two differ by at most two standard errors of their difference"),
}
# Part -> the columns that name a row; every row of the part has them all.
ABOUT: dict[str, tuple[str, ...]] = {
    "ceilings": ("name", "dtype"),
    "tests": ("name",),
    "kernels": ("op", "setting", "data", "rows", "width", "vocab", "dtype", "phase", "provider", "variant"),
    "attention": ("groups", "sequences", "heads", "length", "prefix", "width", "dtype", "phase", "provider"),
    "step": ("provider", "variant", "states_per_forward", "phase", "prefix", "length", "states", "dtype"),
    "train": ("seed",),
}
_STATUS = re.compile(r"ok|out of memory|out of time|(skipped|failed): (?s:.+)")
_MACHINE = ("kind", "device", "driver", "cuda", "threads", "python", "versions", "date", "revision")


def identity(row: Row) -> tuple[Any, ...]:
    """What a row is about: equal in two runs for what can be compared."""
    return (row["part"], *(row[name] for name in ABOUT[row["part"]]))


def validate(content: Content) -> None:
    """Raise ValueError, with one sentence, for what is not a run's file."""
    if not isinstance(content, dict) or content.keys() != {"rehearsal", "machine", "rows"}:
        raise ValueError("a run's file has the fields rehearsal, machine and rows")
    if not isinstance(content["rehearsal"], bool):
        raise ValueError(f"rehearsal={content['rehearsal']!r} is neither true nor false")
    missing = [name for name in _MACHINE if name not in content["machine"]]
    if missing or content["machine"]["kind"] not in ("cpu", "gpu"):
        raise ValueError(f"machine lacks {', '.join(missing) or 'a kind, cpu or gpu'}")
    seen = set()
    for number, row in enumerate(content["rows"]):
        fault = _fault(row)
        if fault is None and identity(row) in seen:
            fault = f"is the second about {identity(row)}"
        if fault is not None:
            raise ValueError(f"row {number} {fault}")
        seen.add(identity(row))


def _fault(row: Row) -> str | None:
    if row.get("part") not in ABOUT:
        return f"has part={row.get('part')!r}, which is none of {', '.join(ABOUT)}"
    for name in ("status", *ABOUT[row["part"]]):
        if name not in row:
            return f"has no {name}"
    for name, value in row.items():
        if name not in COLUMNS:
            return f"has a column {name}, which the schema does not know"
        types = COLUMNS[name][0]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            return f"has {name}={value!r}"
    if not _STATUS.fullmatch(row["status"]):
        return f"has status={row['status']!r}"
    if "ms" in row:
        if any(name not in row for name in ("rounds", "ms_q20", "ms_q80")):
            return "has a time without its spread"
        if not 0 <= row["ms_q20"] <= row["ms"] <= row["ms_q80"]:
            return "has a median outside its quantiles"
    return None


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


def load(path: Path) -> Content:
    """Return a run's file, which must be valid and no rehearsal: figures come from nowhere else."""
    try:
        content: Content = json.loads(path.read_text())
        validate(content)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if content["rehearsal"]:
        raise ValueError(f"{path.name} is a rehearsal: its sizes are small and its figures mean nothing")
    return content


def new_path(folder: Path, machine: dict[str, Any]) -> Path:
    """Return a path in ``folder`` that is not taken yet, named by device and date."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    name, number = f"{device}_{machine['date']}", 1
    path = folder / f"{name}.json"
    while path.exists():
        number += 1
        path = folder / f"{name}_{number}.json"
    return path


class Recorder:
    """A run's file: rows are written as they come, so that a kill loses nothing. A path of None writes nothing.

    A file that is there already is added to, by one process at a time.
    """

    def __init__(self, path: Path | None, device: torch.device, rehearsal: bool = False) -> None:
        self.path = path
        if path is not None and path.is_file():
            self.content: Content = json.loads(path.read_text())
        else:
            self.content = {"rehearsal": rehearsal, "machine": machine(device), "rows": []}
            self._write()

    @property
    def rows(self) -> list[Row]:
        """All rows so far."""
        rows: list[Row] = self.content["rows"]
        return rows

    def add(self, rows: list[Row]) -> None:
        """Write rows, those with a need for arithmetic or traffic with their share of this run's ceilings."""
        for row in rows:
            needs = [row[need] / ceiling for need, ceiling in self.ceilings().items() if need in row]
            share = {"of_ceiling": 1000 * max(needs) / row["ms"]} if needs and "ms" in row else {}
            self.rows.append({name: _rounded(value) for name, value in {**row, **share}.items()})
        self._write()

    def ceilings(self) -> dict[str, float]:
        """Return the most ``flops`` and ``bytes`` per second that this run has measured."""
        found = {}
        for row in self.rows:
            if row["part"] == "ceilings" and "ms" in row:
                need = "bytes" if "bytes" in row else "flops"
                found[need] = 1000 * row[need] / row["ms"]
        return found

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A row per line, for people and for diffs.
        lines = ",\n  ".join(json.dumps(row) for row in self.rows)
        head = ",\n ".join(f'"{name}": {json.dumps(self.content[name])}' for name in ("rehearsal", "machine"))
        rows = f"[\n  {lines}\n ]" if lines else "[]"
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(f'{{\n {head},\n "rows": {rows}\n}}\n')
        partial.replace(self.path)


def _rounded(value: Any) -> Any:
    """Keep four digits of a measured number; more are noise."""
    if isinstance(value, dict):
        return {name: _rounded(number) for name, number in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


# ------------------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------------------


def describe(case: Case, provider: Provider, phase: str, status: str) -> Row:
    """Return the columns that say what a kernel's row is about."""
    return {
        "part": "kernels",
        "op": case.op,
        "setting": case.setting,
        "data": case.data,
        "rows": case.rows,
        "width": case.width,
        "vocab": case.vocab,
        "dtype": dtype_name(case.dtype),
        "phase": phase,
        "provider": provider.name,
        "variant": provider.variant,
        "gradient_in_forward": provider.gradient_in_forward,
        "status": status,
    }


def needs(case: Case, phase: str) -> Row:
    """Return what a phase of a kernel needs: its products of all rows with the weight, which is read once."""
    products = {"confidence": {"forward": 1}, "step_kl": {"forward": 2, "backward": 1, "both": 3}}[case.op][phase]
    one = 2 * case.rows * case.width * case.vocab
    operands = (case.vocab + products * case.rows) * case.width * case.dtype.itemsize
    return {"flops": products * one, "bytes": operands}


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without the module's."""
    return str(dtype).removeprefix("torch.")


def figures(seconds: list[float], peak_bytes: int | None) -> Row:
    """Return a row's measured columns: median time with the 20 % and 80 % quantiles, and peak extra memory."""
    low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 2
    return {
        "rounds": len(seconds),
        "ms_q20": 1000 * low,
        "ms": 1000 * statistics.median(seconds),
        "ms_q80": 1000 * high,
        "peak_bytes": peak_bytes,
    }


def compare(rows: list[Row]) -> None:
    """Add to the rows of one case ``over``: the ratio of their time to every other provider's in the same phase."""
    for row in rows:
        if "ms" in row:
            row["over"] = {
                f"{other['provider']} {other.get('variant', '')}".strip(): row["ms"] / other["ms"]
                for other in rows
                if other is not row and other["phase"] == row["phase"] and "ms" in other
            }


# ------------------------------------------------------------------------------------------------------------
# The machine
# ------------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on beside the code: hardware and versions, with the date and the revision."""
    cuda = device.type == "cuda"
    return {
        "kind": "gpu" if cuda else "cpu",
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "driver": query_gpu("driver_version").get("driver_version") if cuda else None,
        "clocks": query_gpu(*CLOCKS) if cuda else {},
        "cuda": torch.version.cuda or torch.version.hip,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "revision": _output("git", "describe", "--always", "--dirty"),
    }


def query_gpu(*fields: str) -> dict[str, str]:
    """Return what nvidia-smi says of the first GPU; nothing where there is no nvidia-smi."""
    line = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    values = [] if line is None else [value.strip() for value in line.split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip().partition("\n")[0] or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return names[1] if names else platform.processor()
