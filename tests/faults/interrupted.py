"""Processes that are killed, and two that want the same folder."""

from __future__ import annotations

import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from signal import SIGKILL, SIGXFSZ

from .harness import RESUME, Bench, Case, Fault, require, run

HELD = re.compile(r"is in use by process \d+ on ")


def kills(bench: Bench, module: str, count: int) -> list[Case]:
    """Kills of a run: a third at any time; the others at an operation on a file, of every part of the run, half of
    them amid writing one. Every fourth is killed twice."""
    chance = bench.random(module)
    _, trace, seconds = bench.whole(module)
    moments = ["time", "kill", "tear"]
    return [
        Case(
            f"{moment} {number}",
            partial(killed, bench, module, moment, number / count, len(trace), seconds, chance.getrandbits(32)),
        )
        for number in range(count)
        for moment in [moments[number % 3]]
    ]


def killed(
    bench: Bench, module: str, moment: str, share: float, operations: int, seconds: float, seed: int, folder: Path
) -> None:
    chance = random.Random(seed)
    argv, _ = bench.command(module, folder)
    for again in range(1 + (seed % 4 == 0)):
        if again:
            share = chance.random()
        # The kills of a row are spread over the run, each somewhere within its own part.
        place = min(1.0, share + chance.random() / 40)
        fault = None
        if moment != "time":
            kind = "tear" if moment == "tear" else "kill"
            fault = Fault(kind, folder, at=int(place * operations), size=chance.choice((0, 100, 3000)))
        resumed = module == "dopsd.train" and (folder / "run" / "run.json").exists()
        kill_after = place * seconds if moment == "time" else None
        ended = run(module, *argv, *(RESUME if resumed else ()), fault=fault, kill_after=kill_after)
        # One that began late, with less left to do, may have ended by itself.
        require(ended.status in (0, -SIGKILL, -SIGXFSZ), f"ended with {ended.status}: {ended.printed[-600:]}")
    bench.go_on(module, folder)


def two_starts(bench: Bench, count: int) -> list[Case]:
    """Two processes at once: that take a new folder, and that go on in one."""
    chance = bench.random("two starts")
    bench.whole("dopsd.train")
    return [
        Case(f"{'new' if number % 2 else 'resumed'} {number}", partial(two, bench, number % 2 == 0, chance.random()))
        for number in range(count)
    ]


def two(bench: Bench, resumed: bool, place: float, folder: Path) -> None:
    argv, _ = bench.command("dopsd.train", folder)
    if resumed:
        trace = bench.whole("dopsd.train")[1]
        run("dopsd.train", *argv, fault=Fault("kill", folder, at=int((0.2 + place / 2) * len(trace))))

    def one(late: float) -> tuple[int, str]:
        time.sleep(late)
        ended = run("dopsd.train", *argv, *(RESUME if resumed else ()))
        return ended.status, ended.printed if ended.status == 0 else ended.error

    with ThreadPoolExecutor(2) as pool:
        ends = sorted(pool.map(one, (0.0, place / 10)))
    require([status for status, _ in ends] == [0, 1], f"they end with {ends}")
    require(HELD.search(ends[1][1]), f"the holder is not named: {ends[1][1]}")
    bench.go_on("dopsd.train", folder)
