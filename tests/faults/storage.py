"""Disks that are full, and files that are not what was written."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dopsd import checkpoints

from .harness import Bench, Case, Ended, Fault, require, run

# Why nothing more could be written: what the system says of a full disk, of a limit, or how little room was seen.
CAUSES = ("No space left on device", "File too large", " free ")


def full_disk(bench: Bench) -> list[Case]:
    """From each operation of a run on, in turn, the disk is full; later there is room."""
    _, trace, _ = bench.whole("dopsd.train")
    return [
        Case(f"{at} {operation.replace(str(bench.folder), '')}", partial(no_room, bench, at, trace))
        for at, operation in enumerate(trace)
    ]


def no_room(bench: Bench, at: int, trace: list[str], folder: Path) -> None:
    argv, _ = bench.command("dopsd.train", folder)
    ended = run("dopsd.train", *argv, fault=Fault("full", folder, at=at))
    output = folder / "run"
    if ended.status or not (output / "report.json").exists():
        require(str(output) in ended.error, f"no file is named: {ended.error}")
        require(any(cause in ended.error for cause in CAUSES), f"no cause is named: {ended.error}")
    sealed = [line for line in trace[:at] if re.fullmatch(r"os.rename .*checkpoint-\d+/manifest.json", line)]
    if sealed:
        newest = Path(sealed[-1].partition(" ")[2]).parent.name
        run_id = checkpoints.run_id(output)
        faults = {path.name: checkpoints.fault(path, run_id) for path in checkpoints.folders(output)}
        require(newest in faults and faults[newest] is None, f"{newest} is not as it was: {faults}")
    bench.go_on("dopsd.train", folder)


# ---- files that change ----


def missing(path: Path, chance: random.Random) -> None:
    path.unlink()


def empty(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


HARMS = (missing, empty, cut, flipped)


def harmed(row: str, bench: Bench, folder: Path, case: Callable[..., None]) -> list[Case]:
    """Every file of ``folder``, harmed in every way."""
    chance = bench.random(row)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [
        Case(f"{name} {harm.__name__}", partial(case, bench, name, harm, chance.getrandbits(32)))
        for name in names
        for harm in HARMS
    ]


def damaged_checkpoints(bench: Bench) -> list[Case]:
    """Of a run that was killed when it began its third checkpoint, the second is harmed."""
    return harmed("checkpoints", bench, bench.two_checkpoints() / "run" / "checkpoint-2", damaged_checkpoint)


def damaged_checkpoint(
    bench: Bench, name: str, harm: Callable[[Path, random.Random], None], seed: int, folder: Path
) -> None:
    shutil.copytree(bench.two_checkpoints(), folder, dirs_exist_ok=True)
    harm(folder / "run" / "checkpoint-2" / name, random.Random(seed))
    ended = bench.go_on("dopsd.train", folder)
    said = [line for line in ended.printed.splitlines() if line.startswith("checkpoint-2 is skipped: ")]
    require(
        said and (name in said[0] or name == checkpoints.MANIFEST), f"nothing is said of it: {ended.printed[-600:]}"
    )


def damaged_adapters(bench: Bench) -> list[Case]:
    """The adapter of a finished run is harmed, and then evaluated and trained."""
    bench.whole("dopsd.train")
    template = bench.folder / "adapter"
    template.mkdir()
    finished = bench.folder / "dopsd.train" / "run"
    # All that makes it an adapter, and nothing of the run.
    for path in [*finished.glob("adapter_*"), *finished.glob("manifest.json")]:
        shutil.copy(path, template)
    argv = [*bench.train(bench.folder / "from adapter"), "--adapter", template]
    for path, ended in (("evaluated", evaluated_with(bench, template)), ("trained", run("dopsd.train", *argv))):
        assert ended.status == 0, (path, ended.printed)
    return harmed("adapters", bench, template, damaged_adapter)


def evaluated_with(bench: Bench, adapter: Path) -> Ended:
    return run("dopsd.evaluate", *bench.evaluate(adapter.with_suffix(".json")), "--adapter", adapter)


def damaged_adapter(
    bench: Bench, name: str, harm: Callable[[Path, random.Random], None], seed: int, folder: Path
) -> None:
    adapter = folder / "adapter"
    shutil.copytree(bench.folder / "adapter", adapter)
    harm(adapter / name, random.Random(seed))
    output = folder / "output"
    for ended in (
        evaluated_with(bench, adapter),
        run("dopsd.train", *bench.train(output), "--adapter", adapter),
    ):
        if name == "manifest.json" and harm is missing and ended.status == 0:
            continue  # an adapter that another program has written has none
        require(str(adapter) in ended.error and name in ended.error, f"it is not named: {ended.error}")
    require(not output.exists() or name == "manifest.json", "an output folder is left")
