"""Finds a kernel's best launch configuration on this GPU and writes it where the kernels look.

    python -m benchmarks.tune confidence --rows 256
    python -m benchmarks.tune step_kl_rows --rows 2048 --width 4096 --vocab 126464 --out configs.json

One parameter at a time is varied, from the present configuration on, while that helps. Times are those of the public
op at the given sizes. The entry that is written applies up to these sizes, on this architecture and its relatives.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Clock
from benchmarks.problems import DEVICE, Case, make_problem
from benchmarks.providers import GRAD_THRESHOLD, errors, providers
from dopsd_kernels.triton import configs

Config = dict[str, int]
Entry = dict[str, Any]

# Values that are tried for a parameter of this name.
CANDIDATES = {
    "BLOCK": (512, 1024, 2048, 4096),
    "BLOCK_N": (16, 32, 64, 128),
    "BLOCK_R": (16, 32, 64, 128),
    "BLOCK_V": (64, 128, 256),
    "BLOCK_D": (64, 128, 256),
    "ROW_BYTES": (64, 128),
    "GROUP": (1, 4, 8, 16),
    "PROGRAMS": (1, 2, 4),
    "SPLITS": (2, 4, 8, 16),
    "CACHE_MIB": (12, 24, 48, 96),
    "num_warps": (4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5),
}
# The public op that runs a kernel, on which kind of rows, and in which variant.
KERNELS = {
    "confidence_argmax": ("confidence", "diffuse", ""),
    "confidence": ("confidence", "diffuse", "top_k=20"),
    "step_kl_rows": ("step_kl", "diffuse", ""),
    "step_kl_hidden_gradient": ("step_kl", "peaked", f"grad_threshold={GRAD_THRESHOLD:g}"),
}
SIXTEEN_BITS = ("confidence_argmax", "step_kl_hidden_gradient")  # run for 16-bit operands alone
WORTHWHILE = 0.99  # a smaller gain than 1 % is noise
ERROR = 0.02  # of bf16 results; a configuration with more is wrong


def search(start: Config, seconds: Callable[[Config], float]) -> tuple[Config, float]:
    """Return the fastest configuration found and its time; ``seconds`` is infinite for one that cannot run."""
    best, fastest = start, seconds(start)
    tried = [start]
    improved = True
    while improved:
        improved = False
        for name in start:
            for value in CANDIDATES.get(name, ()):
                candidate = {**best, name: value}
                if candidate in tried:
                    continue
                tried.append(candidate)
                taken = seconds(candidate)
                print(f"{1e3 * taken:9.3f} ms  {json.dumps(candidate)}", flush=True)
                if taken < WORTHWHILE * fastest:
                    best, fastest, improved = candidate, taken, True
    return best, fastest


def insert(entries: list[Entry], entry: Entry) -> list[Entry]:
    """Return a kernel's entries with one more, in front of the first that applied to its problem until now.

    An older entry of the same architecture and sizes is replaced; entries for smaller problems stay in front.
    """
    (arch,) = entry["arch"]
    limits = {name: value for name, value in entry.items() if name not in ("arch", "config")}
    kept = [old for old in entries if {**old, "config": None} != {**entry, "config": None}]
    applied = (
        place
        for place, old in enumerate(kept)
        if arch in old["arch"] and all(size <= old.get(name, size) for name, size in limits.items())
    )
    place = next(applied, len(kept))
    return [*kept[:place], entry, *kept[place:]]


def write(entries: dict[str, list[Entry]], path: Path) -> None:
    """Write a configuration file, an entry per line."""
    kernels = (
        f" {json.dumps(kernel)}: [\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in of_kernel) + "\n ]"
        for kernel, of_kernel in entries.items()
    )
    path.write_text("{\n" + ",\n".join(kernels) + "\n}\n")


def timer(kernel: str, case: Case, arch: str) -> Callable[[Config], float]:
    """Return a function that times the public op on this GPU with a configuration of one of its kernels."""
    variant = KERNELS[kernel][2]
    (provider,) = (p for p in providers(case) if p.name == "ours triton" and p.variant == variant)
    problem, clock = make_problem(case, DEVICE), Clock(DEVICE)
    small = make_problem(replace(case, rows=min(case.rows, 64)), DEVICE)
    phase = "forward" if case.op == "confidence" else "both"
    entries = configs.read()

    def seconds(config: Config) -> float:
        candidate = {**entries, kernel: [{"arch": [arch], "config": config}, *entries[kernel]]}
        try:
            with configs.use(candidate):
                # Compiles, too. A configuration may be impossible: too much shared memory, or a block too small.
                if max(errors(provider, small).values()) > ERROR:
                    return math.inf
                clock.time(provider, problem, phase)
                return statistics.median(clock.time(provider, problem, phase)[phase] for _ in range(9))
        except Exception as error:
            print(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            return math.inf

    return seconds


def main(argv: list[str] | None = None) -> int:
    """Tune one kernel for one problem size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=126464)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--out", type=Path, default=configs.PATH, help="the data file (default: the package's)")
    args = parser.parse_args(argv)
    if args.kernel in SIXTEEN_BITS and args.dtype == "float32":
        parser.error(f"{args.kernel} runs for 16-bit operands alone")
    arch = configs.family(DEVICE)
    if arch is None:
        print(f"There are no Triton kernels for this device: {DEVICE}.", file=sys.stderr)
        return 2
    op, data, _ = KERNELS[args.kernel]
    case = Case(op, args.rows, args.width, args.vocab, getattr(torch, args.dtype), data)
    start = configs.choose(args.kernel, DEVICE, args.rows, args.width, args.vocab)
    config, fastest = search(start, timer(args.kernel, case, arch))
    if math.isinf(fastest):
        print("No configuration ran.", file=sys.stderr)
        return 1
    print(f"{1e3 * fastest:.3f} ms with {config}")
    entries = configs.read()
    limits = {"rows": args.rows, "width": args.width, "vocab": args.vocab}
    entries[args.kernel] = insert(entries[args.kernel], {"arch": [arch], **limits, "config": config})
    write(entries, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
