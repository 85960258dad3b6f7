"""Launch configurations: the data of configs.json, chosen by kernel, architecture and problem size.

The file maps each kernel to a list of entries. An entry applies to the architectures it names, up to its limits
of rows, width and vocabulary (absent: no limit); the first that applies is used. Sizes are binned by these limits,
so that a kernel is compiled for a few configurations and never tuned at run time. `python -m benchmarks.tune`
measures candidates on a GPU and writes the same file.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("configs.json")

# Options of every launch. Products are fused with sums, whatever Triton's default is: it changes with its versions.
LAUNCH: dict[str, Any] = {"enable_fp_fusion": True}

# Bytes of shared memory that one program can have, and the architectures that share each family's entries.
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
_FAMILY = {
    **{name: name for name in SHARED_MEMORY},
    **dict.fromkeys(("sm_86", "sm_89", "sm_121"), "sm_120"),
    "sm_87": "sm_80",
    "sm_103": "sm_100",
    "gfx950": "gfx942",
}


@functools.cache
def family(device: torch.device) -> str | None:
    """Return the architecture whose entries `device` uses; None if there is none."""
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return _FAMILY.get(properties.gcnArchName.split(":")[0])
    return _FAMILY.get(f"sm_{properties.major}{properties.minor}")


def read(path: Path = PATH) -> dict[str, list[dict[str, Any]]]:
    """Return the entries of every kernel."""
    entries: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
    return entries


@functools.cache
def choose(kernel: str, device: torch.device, rows: int = 0, width: int = 0, vocab: int = 0) -> dict[str, int]:
    """Return the constants and launch options of the first entry that applies.

    On a CPU, where only Triton's interpreter runs, these are the entries of "interpret": small blocks, so that
    small problems have several.
    """
    arch = family(device) or "interpret"
    for entry in _entries[kernel]:
        sizes = (("rows", rows), ("width", width), ("vocab", vocab))
        if arch in entry["arch"] and all(size <= entry.get(name, size) for name, size in sizes):
            config: dict[str, int] = entry["config"]
            return config
    raise LookupError(
        f"{PATH.name} has no entry of {kernel} for {arch}, {rows} rows, width {width}, vocabulary {vocab}."
    )


_entries = read()


@contextmanager
def use(entries: dict[str, list[dict[str, Any]]]) -> Iterator[None]:
    """Choose among other entries inside, those of every kernel."""
    global _entries
    before, _entries = _entries, entries
    choose.cache_clear()
    try:
        yield
    finally:
        _entries = before
        choose.cache_clear()
