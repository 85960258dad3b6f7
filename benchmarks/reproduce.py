"""Makes the paper's tables again on the tiny model: one file for each run that they need.

    python -m benchmarks.reproduce --dry_run                # what is missing, and how long that takes
    python -m benchmarks.reproduce --tables 1 5 --jobs 2    # goes on where it was stopped, or killed

A run is a cell: a variant of the tiny recipe, a learning rate and a seed. It is a process of its own on one thread, and
leaves one file under ``benchmarks/results/reproduction``, whole or not at all. Its seconds are the processor's, which
other work beside it does not stretch. Learning rates and adapters are chosen
on validation problems; test problems are only graded. `benchmarks.report` makes docs/reproduction.md from the files.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from transformers import TrainerCallback

import dopsd
from benchmarks import results
from benchmarks.results import Row
from dopsd import collapse, report
from dopsd.commands import parse_train
from dopsd.console import console
from dopsd.errors import RunError, ending
from dopsd.files import sha256, write_json
from dopsd.models import SHIPPED
from dopsd.precision import has_bf16
from dopsd.run import build

FOLDER = results.FOLDER / "reproduction"
Options = dict[str, Any]

# What a point of a run's curve has: sums since the run began, and means since the point before.
COSTS = ("rollouts", "decode_tokens", "forward_tokens", "tokens", "states")
MEANS = ("loss", "kl", "overlap_top20", "clip_fraction", "first_try", "pass_rate", "tries", "accepted", "drift")


@dataclass(frozen=True)
class Variant:
    """A row of a table.

    Args:
        options: what differs from the tiny recipe; of a variant that is not trained, the options of an evaluation.
        rates: learning rates, the best of which on validation problems is taken; or the variant whose choice is taken;
            none for the model as it ships.
        seconds: about how long a run takes, before one is known.
    """

    options: Options = field(default_factory=dict)
    rates: tuple[float, ...] | str = ()
    seconds: float = 450


LOW, HIGH = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
FIXED, OURS, AR_STYLE = "d-OPSD, fixed teacher", "d-OPSD, averaged teacher", "AR-style"
TOY = "toy"
GROUPS = {"per_device_train_batch_size": 16}  # half the recipe's prompts, each with all its tries
# Updates are such that each computes about as many tokens as d-OPSD does in the recipe's 36, with three responses to a
# prompt and a gradient for three passes; what it takes is measured. Each is validated seven times, as d-OPSD is.
METHODS = {
    "base": Variant({"tokens_per_step": [2, 1]}, seconds=60),
    FIXED: Variant({"teacher": "fixed"}, HIGH),
    OURS: Variant({}, HIGH),
    AR_STYLE: Variant({"teacher_context": "reference"}, HIGH),
    "SFT": Variant({"method": "sft", "max_steps": 1500, "eval_steps": 250}, LOW),
    "rejection": Variant({"method": "rejection", "max_steps": 72, "eval_steps": 12}, LOW),
    "diffu-GRPO": Variant(
        {**GROUPS, "method": "diffu_grpo", "updates_per_batch": 4, "max_steps": 120, "eval_steps": 20}, LOW
    ),
    "VRPO": Variant({**GROUPS, "method": "vrpo", "max_steps": 42, "eval_steps": 7}, LOW),
    "off-policy": Variant({"method": "off_policy", "max_steps": 90, "eval_steps": 15}, LOW),
}
ABLATIONS = {
    name: Variant({"eval_tokens_per_step": [], **options}, OURS)
    for name, options in {
        "forward KL": {"divergence": "forward_kl"},
        "JSD": {"divergence": "jsd"},
        "K by student": {"selection": "student"},
        "rho 0.1": {"retain_ratio": 0.1},
        "rho 0.5": {"retain_ratio": 0.5},
        "live teacher": {"teacher": "live"},
        "1 try": {"pass_k": 1},
        "all responses": {"correct_only": False},
        "reveal among all masked": {"reveal_scope": "masked"},
        "reveal the next state": {"reveal_scope": "later_state", "retain_ratio": 1.0},
        "top 20, renormalized": {"top_k": 20},
        "top 20, rest as one entry": {"top_k": 20, "tail": "bucket"},
    }.items()
}
CLIPS = {
    "plain": {"clip": 0.05},
    "nonnegative": {"clip": 0.05, "clip_form": "nonnegative"},
    "no clip": {"clip": None},
}
# As in the paper, the teacher is fixed and the learning rate constant.
STABILITY = {
    f"{form}, {rate:g}": Variant(
        {
            **{"teacher": "fixed", "lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}, **options},
            **{"max_steps": 150, "per_device_train_batch_size": 8, "eval_steps": 10, "eval_tokens_per_step": []},
        },
        (rate,),
    )
    for form, options in CLIPS.items()
    for rate in (1e-3, 2e-3, 4e-3)
}
# The same problems for a model whose learning rate fell in pretraining: `python -m dopsd.assets.pretrain --steps 1560
# --anneal_steps 200` makes it in 35 minutes on one thread.
ANNEALED = {
    f"{name}, annealed": Variant(
        {**variant.options, "model": "benchmarks/models/annealed"}, (1e-4, 3e-4, 1e-3, 2e-3) if variant.rates else ()
    )
    for name, variant in METHODS.items()
    if name in ("base", FIXED, OURS, "SFT", "rejection")
}
# The block-causal model that ships.
CAUSAL_BASE, CAUSAL, CAUSAL_EXACT = (f"{name}, block-causal" for name in ("base", "d-OPSD", "d-OPSD without reuse"))
BLOCKS = {"model": "tiny-causal", "cache": "block"}
CAUSALS = {
    CAUSAL_BASE: Variant({**BLOCKS, "block_length": 16, "tokens_per_step": [2, 1]}, seconds=30),
    CAUSAL: Variant({**BLOCKS, "recipe": "tiny-causal"}, (1e-3,), seconds=250),
}
TOYS = {TOY: Variant({"tokens_per_step": [2], "pass_k": 8, "reveal": [0.1, 0.25, 0.5]}, seconds=150)}
REUSES = {
    CAUSAL_EXACT: Variant({**BLOCKS, "recipe": "tiny-causal", "reuse": "none", "eval_tokens_per_step": []}, CAUSAL),
    **{f"reuse {kind}": Variant({"reuse": kind, "eval_tokens_per_step": []}, OURS) for kind in ("prompt", "block")},
    **{
        f"cache {kind}": Variant({"cache": kind, "tokens_per_step": [2, 1]}, seconds=20) for kind in ("prefix", "block")
    },
}
VARIANTS: dict[str, Variant] = {**METHODS, **STABILITY, **TOYS, **ABLATIONS, **REUSES, **ANNEALED, **CAUSALS}
# What tells most comes first. Table 2, the cost, is of the runs of table 1.
TABLES: dict[int, tuple[Mapping[str, Variant], int]] = {  # its variants, and how many seeds
    1: (METHODS, 5),
    2: (METHODS, 5),
    3: (TOYS, 5),
    5: (STABILITY, 5),
    4: (ABLATIONS, 3),
    8: (CAUSALS, 5),
    7: (ANNEALED, 3),
    6: (REUSES, 3),
}


@dataclass(frozen=True)
class Cell:
    """A run. It is not ``ready`` before its learning rate has been chosen."""

    variant: str
    rate: float | None
    seed: int

    @property
    def ready(self) -> bool:
        return self.rate is not None or not VARIANTS[self.variant].rates

    @property
    def weights(self) -> str:
        return weights(self.options["model"])

    @property
    def name(self) -> str:
        rate = "" if self.rate is None else f"_{self.rate:g}"
        return f"{re.sub('[^a-z0-9]+', '-', self.variant.lower())}{rate}_{self.seed}"

    @property
    def options(self) -> Options:
        """Of the training run, or of the evaluation."""
        given = VARIANTS[self.variant].options
        if self.rate is None:
            return {"model": "tiny", "eval_problems": 512, "sequences_per_forward": 128, **given}
        # The recipe's schedule: down to a tenth.
        schedule = {"learning_rate": self.rate, "lr_scheduler_kwargs": {"lr_end": self.rate / 10, "power": 1.0}}
        return {"recipe": "tiny", "model": "tiny", **schedule, "eval_steps": 6, "save_strategy": "no", **given}


@cache
def weights(model: str) -> str:
    """Which weights a model has: a file about others is as good as none."""
    return sha256(SHIPPED.get(model, results.ROOT / model) / "model.safetensors")[:16]


def record(cell: Cell) -> Row | None:
    """What a cell's file says; None if there is none, or it is about other options or another model."""
    path = FOLDER / f"{cell.name}.json"
    if not cell.ready or not path.is_file():
        return None
    row: Row = json.loads(path.read_text())
    return row if (row["options"], row["weights"]) == (cell.options, cell.weights) else None


def search(variant: str) -> dict[float, float | None]:
    """A variant's learning rates, each with the best validation accuracy of its run with seed 0."""
    rates = VARIANTS[variant].rates
    found = {rate: record(Cell(variant, rate, 0)) for rate in rates if isinstance(rate, float)}
    return {rate: row and max(point["accuracy"] for point in row["curve"]) for rate, row in found.items()}


def chosen(variant: str) -> float | None:
    """The learning rate of a variant: the lowest of the best on validation problems; None before all were tried."""
    rates = VARIANTS[variant].rates
    if isinstance(rates, str):
        return chosen(rates)
    if len(rates) <= 1:
        return rates[0] if rates else None
    tried = {rate: accuracy for rate, accuracy in search(variant).items() if accuracy is not None}
    return max(sorted(tried), key=lambda rate: tried[rate]) if len(tried) == len(rates) else None


def cells(tables: Sequence[int], most_seeds: int) -> list[Cell]:
    """What the tables need, what tells most first."""
    found: list[Cell] = []
    for number, (variants, seeds) in TABLES.items():
        if number not in tables:
            continue
        # What is not trained is the same for all seeds, but where tries are drawn.
        of_seed = {
            name: seeds if variant.rates or "pass_k" in variant.options else 1 for name, variant in variants.items()
        }
        sources = {
            name: variant.rates if isinstance(variant.rates, str) else name for name, variant in variants.items()
        }
        found += [Cell(source, rate, 0) for source in sources.values() for rate in search(source)]
        for seed in range(min(seeds, most_seeds)):
            found += [Cell(name, chosen(name), seed) for name in variants if seed < of_seed[name]]
    # The first seed's run at the rate that is chosen is one of those that it is chosen from.
    return [cell for cell in dict.fromkeys(found) if cell.ready or cell.seed or not search(cell.variant)]


# ---- a cell ----


class Keeper(TrainerCallback):
    """Keeps the adapter that is best by validation, the first of equals, and what had been spent at each validation."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.points: list[Row] = []
        self.best: Row = {"accuracy": -1.0}
        self.weights: dict[str, torch.Tensor] = {}
        self.began = self.seconds = 0.0

    def trained(self) -> dict[str, torch.Tensor]:
        return {name: p.data for name, p in self.trainer.student.named_parameters() if p.requires_grad}

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self.trainer.evaluate()  # the adapter that a run begins with may be its best

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        self.seconds += time.process_time() - self.began

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **kwargs: Any) -> None:
        accuracy = metrics["eval_accuracy"]
        self.points.append({"update": state.global_step, "accuracy": accuracy, "seconds": round(self.seconds, 1)})
        if accuracy > self.best["accuracy"]:
            self.best = self.points[-1]
            self.weights = {name: weight.clone() for name, weight in self.trained().items()}

    def restore(self) -> None:
        """The best adapter is the student's again."""
        for name, weight in self.trained().items():
            weight.copy_(self.weights[name])


def bits(scores: Sequence[float]) -> str:
    """Right and wrong answers, problem by problem, as ones and zeros."""
    return "".join(str(int(score >= 1)) for score in scores)


def curve(points: Sequence[Row], log: Sequence[Row], prompts: int, slices: int) -> list[Row]:
    """Points with what the log says of the updates before; every ``slices`` updates are of other ``prompts``."""
    rows, before, found = [row for row in log if "loss" in row], 0, []
    for point in points:
        so_far = [row for row in rows if row["step"] <= point["update"]]
        new = [row for row in so_far if row["step"] > before]
        spent = {name: sum(row.get(name, 0) for row in so_far) for name in COSTS}
        values = {name: [row[name] for row in new if math.isfinite(row.get(name, math.nan))] for name in MEANS}
        means = {name: round(mean(some), 5) for name, some in values.items() if some}
        found.append({**point, "prompts": -(-point["update"] // slices) * prompts, **spent, **means})
        before = point["update"]
    return found


def train(options: Options, seed: int) -> Row:
    """Train, go back to the best adapter by validation, and grade it on the test problems."""
    with tempfile.TemporaryDirectory() as folder:
        groups = parse_train(**options, seed=seed, output_dir=folder, inspect_samples=0)
        trainer, test = build(*groups)
        keeper = Keeper(trainer)
        trainer.add_callback(keeper)
        start, ended = time.process_time(), None
        try:
            trainer.train()
        except RunError as error:  # such as weights that are not finite: what came before it counts
            ended = str(error)
        trained = time.process_time()
        keeper.restore()
        scores = report.held_out(trainer, test, "after", Path(folder))
    given = {name: value for group in groups for name, value in vars(group).items()}
    log, seconds = trainer.state.log_history, {"train": keeper.seconds, "validate": trained - start - keeper.seconds}
    return {
        "bf16": given["bf16"],
        "updates": trainer.state.global_step,
        "chosen_update": keeper.best["update"],
        "collapse": collapse.events(log),
        "ended": ended,
        "curve": curve(keeper.points, log, given["per_device_train_batch_size"], given["updates_per_batch"]),
        "seconds": {**seconds, "test": time.process_time() - trained},
        "scores": {f"greedy, {rate}": bits(some) for rate, some in scores.items()},
    }


def evaluate(options: Options, seed: int) -> Row:
    """Grade a model without an adapter on the test problems, in the precision that a run would train in."""
    bf16 = has_bf16(cpu=not torch.accelerator.is_available())
    decoding = {name: value for name, value in options.items() if name != "model"}
    found = dopsd.evaluate(options["model"], seed=seed, bf16=bf16, **decoding)
    assert found is not None  # one process
    by_name = {f"{one['measure']}, {one['tokens_per_step']}": one for one in found.content["results"]}
    return {
        "bf16": bf16,
        "seconds": {name: one["seconds"] for name, one in by_name.items()},
        "scores": {name: bits([response["score"] for response in one["responses"]]) for name, one in by_name.items()},
    }


def run(cell: Cell, path: Path) -> None:
    """Run a cell and write its file, in a process of its own."""
    # It ends with the process that started it, however that ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    named = cell.options["model"]
    options = {**cell.options, "model": named if named in SHIPPED else str(results.ROOT / named)}
    try:
        with console(sentences=False, bars=False):
            measured = (evaluate if cell.rate is None else train)(options, cell.seed)
    except Exception as error:
        status, sentence = ending(error)
        print(f"{cell.name}: {sentence}", file=sys.stderr)
        raise SystemExit(status) from None
    about = {"name": cell.name, "seed": cell.seed, "options": cell.options, "weights": cell.weights}
    about["machine"] = results.machine()
    measured["seconds"] = {part: round(seconds, 1) for part, seconds in measured["seconds"].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**about, **measured})


# ---- all of them ----


def duration(cell: Cell) -> float:
    """Seconds that a cell takes: the median of its variant's runs, if there is one."""
    rates = search(cell.variant) or {chosen(cell.variant): None}
    rows = [record(Cell(cell.variant, rate, seed)) for rate in rates for seed in range(5)]
    return median([sum(row["seconds"].values()) for row in rows if row] or [VARIANTS[cell.variant].seconds])


def run_all(wanted: Callable[[], list[Cell]], jobs: int) -> list[str]:
    """Run what is missing, so many at a time; names of those that failed, or waited for one that did."""
    processes = multiprocessing.get_context("spawn")
    running: dict[Any, Cell] = {}
    failed: set[Cell] = set()
    while True:
        everything = wanted()
        left = [cell for cell in everything if record(cell) is None and cell not in failed]
        ready = [cell for cell in left if cell.ready and cell not in running.values()]
        for cell in ready[: jobs - len(running)]:
            process = processes.Process(target=run, args=(cell, FOLDER / f"{cell.name}.json"), daemon=True)
            process.start()
            running[process] = cell
        if not running:
            return [cell.name for cell in everything if record(cell) is None]
        wait([process.sentinel for process in running])
        for process in [process for process in running if process.exitcode is not None]:
            cell = running.pop(process)
            row = record(cell)
            if row is None:
                failed.add(cell)
            said = "failed" if row is None else f"{sum(row['seconds'].values()):.0f} s"
            hours = sum(duration(other) for other in left if other != cell) / jobs / 3600
            done = sum(record(other) is not None for other in everything)
            print(f"{cell.name}: {said}; {done} of {len(everything)} done, about {hours:.1f} h left", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, or say what that is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, nargs="+", choices=sorted(TABLES), default=sorted(TABLES))
    parser.add_argument("--seeds", type=int, default=5, help="at most so many; tables 4, 6 and 7 take three")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--dry_run", action="store_true", help="say what is missing and how long it takes")
    args = parser.parse_args(argv)
    if args.dry_run:
        missing = [cell for cell in cells(args.tables, args.seeds) if record(cell) is None]
        for cell in missing:
            print(f"{duration(cell):5.0f} s  {cell.name}{'' if cell.ready else ' (at the rate that is chosen)'}")
        print(f"{len(missing)} cells, about {sum(map(duration, missing)) / args.jobs / 3600:.1f} h")
        return 0
    missing = run_all(lambda: cells(args.tables, args.seeds), args.jobs)
    for name in missing:
        print(f"not run: {name}")
    return int(bool(missing))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    raise SystemExit(main())
