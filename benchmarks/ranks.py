"""``python -m benchmarks.ranks``: the table of docs/scale.md, of the tiny recipe on several processes against one.

Each run is a launch by torchrun, of one thread a process, that takes the same batches of prompts. A result file has
each run's figures; the page's table is made of the newest one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from safetensors.torch import load_file

from benchmarks.results import FOLDER, ROOT, machine
from dopsd.files import write_json, write_text
from dopsd.memory.scale import rounds, turns
from dopsd.report import read_metrics
from dopsd.tables import markdown_table

BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"
PAGE = ROOT / "docs" / "scale.md"
PROMPTS = 12  # a batch, which each of these numbers of processes divides
STATES, TRIES = 32, 8  # of a micro-batch; at a prompt
RUNS = [(1, "data"), (2, "data"), (3, "data"), (4, "data"), (2, "full_shard"), (4, "full_shard")]
# No evaluation, whose time is no update's; dropout, which is not to depend on who computes what.
LINE = (
    "--recipe tiny --seed 7 --lora_dropout 0.05 --eval_strategy no --save_strategy no --load_best_model_at_end false "
)
LINE += f"--eval_problems 4 --train_problems 120 --states_per_forward {STATES} --sequences_per_forward 12 "
LINE += f"--pass_k {TRIES} --use_cpu true --bf16 false --eval_tokens_per_step 2 --max_steps"


def command(processes: int, engine: str, updates: int, folder: Path) -> list[str]:
    """One run's command line."""
    line = f"{LINE} {updates} --per_device_train_batch_size {PROMPTS // processes} --output_dir {folder}"
    line += " --ddp_backend gloo" * (processes > 1) + " --fsdp full_shard" * (engine == "full_shard")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launch, "-m", "dopsd.train", *line.split()]


def figures(processes: int, engine: str, folder: Path, alone: Path) -> dict[str, Any]:
    """What a run in ``folder`` came to; ``alone`` is that of one process."""
    updates = [row for row in read_metrics(folder / "metrics.csv") if "loss" in row]
    report = json.loads((folder / "report.json").read_text())
    ours, theirs = (load_file(one / "adapter_model.safetensors") for one in (folder, alone))

    def total(name: str) -> float:
        return sum(row.get(name, 0.0) for row in updates)

    return {
        "processes": processes,
        "engine": engine,
        "adapter_deviation": max(float((ours[name] - value).abs().max()) for name, value in theirs.items()),
        "adapter_largest": max(float(value.abs().max()) for value in theirs.values()),
        "accepted": round(PROMPTS * total("accepted")),
        "updates": len(updates),
        "tries": total("tries") / len(updates),
        "states": [row["states"] for row in updates],
        "rollout_seconds": total("rollout_seconds") / len(updates),
        "learn_seconds": total("learn_seconds") / len(updates),
        "wait_seconds": total("wait_seconds") / len(updates),
        "parameters": report["parameters"],
        "parameters_per_rank": report["parameters_per_rank"],
    }


def modelled(alone: dict[str, Any], processes: int, cores: int) -> float:
    """Seconds of an update on so many processes, by what one takes and who has most of the tries and micro-batches.

    All tries are taken to be right equally often: as often as makes the mean number of tries.
    """
    low, high = 0.0, 1.0
    for _ in range(50):
        rate = (low + high) / 2
        low, high = (rate, high) if sum((1 - rate) ** k for k in range(TRIES)) > alone["tries"] else (low, rate)
    tries = rounds(PROMPTS, rate, TRIES)
    batches = [states / STATES for states in alone["states"]]
    rollout = sum(turns(count, processes) for count in tries) / sum(tries)
    learn = sum(turns(count, processes) for count in batches) / sum(batches)
    return max(1, processes / cores) * (rollout * alone["rollout_seconds"] + learn * alone["learn_seconds"])


def cells(row: dict[str, Any], alone: dict[str, Any], cores: int) -> dict[str, str]:
    """A row of the page's table."""
    seconds, before = (one["rollout_seconds"] + one["learn_seconds"] for one in (row, alone))
    return {
        "processes": str(row["processes"]),
        "engine": row["engine"],
        "adapter against one process": f"{row['adapter_deviation']:.1e} of {row['adapter_largest']:.1e}",
        "accepted": str(row["accepted"]),
        "s of rollouts": f"{row['rollout_seconds']:.1f}",
        "s of learning": f"{row['learn_seconds']:.1f}",
        "s an update": f"{seconds:.1f}",
        "by the model": f"{modelled(alone, row['processes'], cores):.1f}",
        "times as fast": f"{before / seconds:.2f}",
        "waiting for others": f"{row['wait_seconds'] / seconds:.0%}",
        "parameters a process": f"{row['parameters_per_rank']:,}",
    }


def table(content: dict[str, Any]) -> str:
    """The page's table of a result file."""
    rows: Sequence[dict[str, Any]] = content["rows"]
    return markdown_table([cells(row, rows[0], content["machine"]["cores"]) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3, help="of all runs, one after another; times are their medians")
    args = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="ranks-") as temporary:
        repeated: list[list[dict[str, Any]]] = []
        for number in range(args.rounds):
            found = []
            for processes, engine in RUNS:
                folder = Path(temporary, f"{processes}-{engine}-{number}")
                subprocess.run(command(processes, engine, args.updates, folder), env=environment, check=True)
                found.append(figures(processes, engine, folder, Path(temporary, f"1-data-{number}")))
            repeated.append(found)
    times = ("rollout_seconds", "learn_seconds", "wait_seconds")
    rows = [
        {**runs[0], **{name: median(run[name] for run in runs) for name in times}}
        for runs in zip(*repeated, strict=True)
    ]
    content = {"machine": {**machine(), "threads": 1, "cores": os.cpu_count()}, "rounds": args.rounds, "rows": rows}
    folder = FOLDER / "ranks"
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{content['machine']['date']}.json", content)
    if PAGE.exists():
        start, rest = PAGE.read_text().split(BEGIN)
        write_text(PAGE, f"{start}{BEGIN}\n\n{table(content)}\n{END}{rest.split(END)[1]}")
    print(table(content))


if __name__ == "__main__":
    main()
