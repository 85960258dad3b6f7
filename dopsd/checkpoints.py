"""Checkpoints of a run: which are complete, to which run they belong, and which are deleted.

A manifest, written last, has the name, size and hash of each file, so that whatever a kill, a full disk or a fault of
the disk leaves is told from a checkpoint.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dopsd.errors import RunError
from dopsd.files import first_line, read_json, sha256, sync, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RUN_FILE = "run.json"  # beside checkpoints; its id names the run
STATE_FILE = "trainer_state.json"
ADAPTER_FILE = "adapter_model.safetensors"
PENDING_FILE = "pending.json"  # slices that are still to be trained on

# The files without which some state would silently start anew. What is drawn depends on the seed alone, so the states
# of generators, which each process saves too, are none of them.
NEEDED = (ADAPTER_FILE, STATE_FILE, PENDING_FILE, "optimizer.pt", "scheduler.pt")


def number(folder: Path) -> int:
    """The update behind which a checkpoint was saved."""
    return int(folder.name.rpartition("-")[2])


def folders(output: Path) -> list[Path]:
    """All checkpoints of a run's folder, complete or not, the newest first."""
    found = [path for path in output.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal()]
    return sorted(found, key=number, reverse=True)


def run_id(output: Path) -> str | None:
    """The id of the run in ``output``; None where a Trainer is used without the command."""
    path = output / RUN_FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())["id"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{path} is damaged: it is no JSON object with the run's id") from error


def begin(folder: Path) -> None:
    """An empty folder for a new checkpoint; one of the same update, cut short or gone back from, makes room."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def seal(folder: Path) -> None:
    """Declare what is saved in a folder complete, once all of its files are on disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in [*files, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)
    entries = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    write_json(folder / MANIFEST, {"run": run_id(folder.parent), "files": entries})
    sync(folder.parent)


def fault(folder: Path, run: str | None) -> str | None:
    """Why ``run`` can't go on from a checkpoint, on any number of processes, in a clause; None: it can."""
    if not (folder / MANIFEST).exists():
        return f"it has no {MANIFEST}, so it was not saved to its end"
    try:
        manifest = read_manifest(folder)
    except RunError:
        return f"its {MANIFEST} is damaged"
    if manifest.run != run:
        return "it is of another run"
    for name in NEEDED:
        if name not in manifest.files:
            return f"it was saved without {name}"
    return altered(folder, manifest.files)


class Manifest(NamedTuple):
    """What a folder's manifest says."""

    run: str | None
    files: dict[str, tuple[int, str]]  # size and hash by name


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder that was sealed; RunError if it is damaged."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
        return Manifest(content["run"], files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{folder / MANIFEST} is damaged: it doesn't say which files were saved") from error


def altered(folder: Path, files: Mapping[str, tuple[int, str]]) -> str | None:
    """Which of a manifest's ``files`` is not what was saved, in a clause; None: all are."""
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size} bytes instead of {size}"
        if sha256(path) != digest:
            return f"its {name} is not what was saved"
    return None


def newest(output: Path) -> Path | None:
    """The newest checkpoint that is complete; says which it skips and why. None: none was ever saved to its end.

    Raises:
        RunError: there were some, and none of them is complete any more.
    """
    run = run_id(output)
    faults: dict[str, str] = {}
    for folder in folders(output):
        why = fault(folder, run)
        if why is None:
            for name, reason in faults.items():
                log.warning("%s is skipped: %s", name, reason)
            return folder
        faults[folder.name] = why
    said = "; ".join(f"{name}: {reason}" for name, reason in faults.items())
    if any((output / name / MANIFEST).exists() for name in faults):
        raise RunError(f"no checkpoint in {output} is complete any more: {said}. Without them the run begins anew")
    if faults:
        log.warning("%s: the run begins anew", said)
    return None


def unharmed(output: Path) -> str:
    """What is left, checked just now, for the sentence with which a run ends that can't go on."""
    run = run_id(output)
    left = next((folder for folder in folders(output) if fault(folder, run) is None), None)
    if left is None:
        return f"there is no complete checkpoint in {output}"
    return f"{left}, saved before that, is unharmed, and its adapter can be used"


def has_ended(folder: Path) -> bool:
    """Whether a complete checkpoint is that of the last update."""
    state = read_json(folder / STATE_FILE)
    return state["global_step"] >= state["max_steps"]


@contextmanager
def reading(folder: str | None) -> Iterator[None]:
    """Raise RunError, naming the checkpoint, where a file that has the hash of its manifest is none of its kind."""
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{folder} can't be gone on from: {first_line(error)}") from error


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Keep ``limit`` checkpoints (None or 0: all), among them ``folder``, which was just sealed, and the ``best``."""
    if not limit:
        return
    here = number(folder)
    # Those of later updates are from before the run went back, so they are the oldest.
    others = sorted(folders(folder.parent), key=lambda path: (number(path) <= here, number(path)))
    kept = {folder.name, Path(best or folder).name}
    extra = len(others) - max(limit, len(kept))
    for path in [path for path in others if path.name not in kept][: max(0, extra)]:
        shutil.rmtree(path, ignore_errors=True)
