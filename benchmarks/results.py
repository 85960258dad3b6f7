"""The benchmarks' result files: ``kernels_cpu`` and ``kernels_gpu``, as JSON (with the machine) and as CSV."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import io
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
PACKAGES = ("torch", "triton", "liger-kernel", "trl")

Row = dict[str, Any]


class Recorder:
    """Keeps rows and writes them as they come, so that a kill loses nothing; a folder of None writes nothing."""

    def __init__(self, folder: Path | None, device: torch.device) -> None:
        self.folder, self.kind = folder, "gpu" if device.type == "cuda" else "cpu"
        self.machine = machine(device)
        self.rows: list[Row] = []

    def add(self, rows: list[Row]) -> None:
        self.rows += [{name: _rounded(value) for name, value in row.items()} for row in rows]
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"kernels_{self.kind}"
        # A row per line, for people and for diffs.
        lines = ",\n  ".join(json.dumps(row) for row in self.rows)
        machine = json.dumps(self.machine)
        _write(path.with_suffix(".json"), f'{{\n "machine": {machine},\n "rows": [\n  {lines}\n ]\n}}\n')
        flat = [{name: value for name, value in row.items() if name != "over"} for row in self.rows]
        columns = list(dict.fromkeys(name for row in flat for name in row))
        others = sorted({name for row in self.rows for name in row.get("over", {})})
        table = io.StringIO()
        writer = csv.DictWriter(table, [*columns, *(f"over {name}" for name in others)], lineterminator="\n")
        writer.writeheader()
        for row, plain in zip(self.rows, flat, strict=True):
            writer.writerow({**plain, **{f"over {name}": ratio for name, ratio in row.get("over", {}).items()}})
        _write(path.with_suffix(".csv"), table.getvalue())


def _rounded(value: Any) -> Any:
    """Keep four digits of a measured number; more are noise."""
    if isinstance(value, dict):
        return {name: _rounded(number) for name, number in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def describe(case: Case, provider: Provider, phase: str, status: str) -> Row:
    """Return the columns that say what a row is about."""
    return {
        "op": case.op,
        "setting": case.setting,
        "data": case.data,
        "rows": case.rows,
        "width": case.width,
        "vocab": case.vocab,
        "dtype": str(case.dtype).removeprefix("torch."),
        "phase": phase,
        "provider": provider.name,
        "variant": provider.variant,
        "gradient_in_forward": provider.gradient_in_forward,
        "status": status,
    }


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
                f"{other['provider']} {other['variant']}".strip(): row["ms"] / other["ms"]
                for other in rows
                if other is not row and other["phase"] == row["phase"] and "ms" in other
            }


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on beside the code: hardware and versions, with the date and the revision."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda or torch.version.hip,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "revision": _output("git", "describe", "--always", "--dirty"),
    }


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
