"""Command lines that make no sense."""

from __future__ import annotations

import os
from argparse import SUPPRESS
from functools import partial
from pathlib import Path

from dopsd.commands import TRAINING
from dopsd.evaluation.options import EvaluationArguments
from dopsd.memory.options import PlanArguments
from dopsd.parser import Parser

from .harness import Bench, Case, require, run

SECONDS = 10.0
GROUPS = {
    "dopsd.train": TRAINING,
    "dopsd.evaluate": (EvaluationArguments,),
    "dopsd.plan": (PlanArguments, *TRAINING),
}
VALUES = (
    *("nan", "inf", "-inf", "1e400", "-1", "0", "-0.0", "0.5", "1e3", "1_000", "0x10", "999999999999", "9" * 5000),
    *("", " ", "\n", "-", "--", ",", "*", "%s", "~", "..", "x" * 100_000, "ünïcödé 🜁", "\udcff", "$(touch ran)"),
    *("true", "false", "none", "None", "{}", "[]", "[1, 2", '{"a": NaN}', "null", "auto", "tiny"),
    *("/dev/null", "/dev/zero", "folder", "file", "absent", "absent/file.json", "file/file.json", "folder/a.json"),
)
# Options that take more than a few bytes from elsewhere, or leave these processes.
LEFT_ALONE = {"help", SUPPRESS, "push_to_hub", "deepspeed", "fsdp", "ddp_backend", "report_to", "local_rank", "debug"}


def absurd(bench: Bench, count: int) -> list[Case]:
    """One to three options, drawn from all, with values drawn from the above; the rest as in a run that works."""
    chance = bench.random("command lines")
    names = {
        module: sorted({action.dest for action in Parser(*groups)._actions} - LEFT_ALONE)
        for module, groups in GROUPS.items()
    }
    cases = []
    for number in range(count):
        module = chance.choice(("dopsd.train", "dopsd.train", "dopsd.train", "dopsd.evaluate", "dopsd.plan"))
        words: list[str] = []
        given = chance.sample(names[module], chance.randint(1, 3))
        for name in given:
            misspelt = name[:-1] if chance.random() < 0.05 else name
            words += [f"--{misspelt}", *chance.choices(VALUES, k=chance.choice((0, 1, 1, 1, 1, 1, 1, 1, 2)))]
        said = " ".join(word[:40] for word in words)
        cases.append(Case(f"{number} {module} {said!r}", partial(refused_or_run, bench, module, words, given)))
    return cases


def refused_or_run(bench: Bench, module: str, words: list[str], given: list[str], folder: Path) -> None:
    (folder / "folder").mkdir()
    for name in ("file", "folder/a.json"):
        (folder / name).write_text("of another's\n")
    before = listed(folder)
    base = {
        "dopsd.train": bench.train(folder / "run"),
        "dopsd.evaluate": bench.evaluate(folder / "result.json"),
        "dopsd.plan": ["--model_config", str(bench.model)],
    }
    ended = run(module, *base[module], *words, fault=partial(os.chdir, folder), kill_after=4 * SECONDS)
    changed = {path: size for path, size in listed(folder).items() if before.get(path) != size}
    require(before.keys() <= listed(folder).keys(), "a file is gone")
    if ended.status == -9:
        require(changed, f"{ended.busy:.0f} seconds, and nothing has begun: {ended.printed[-300:]}")
    elif ended.status:
        named = [*given, *(word for word in words if word.strip())]
        require(any(name in ended.error for name in named), f"no option is named: {ended.error[:600]}")
        require(not changed, f"{list(changed)[:5]} written, and then: {ended.error[:600]}")


def listed(folder: Path) -> dict[str, int]:
    """Every file below a folder, with its size."""
    return {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
