"""Finds the kernels' best launch configurations on this GPU and writes them where the kernels look.

    python -m benchmarks.tune --minutes 8 --out configs.json          # all kernels, at LLaDA-8B's sizes
    python -m benchmarks.tune --only step_kl_rows --rows 512 --width 3584 --vocab 152064

One parameter at a time is varied, from the present configuration on, while that helps. Times are those of the public
op. Every improvement is written when it is found, as an entry that applies up to these sizes, on this architecture and
its relatives; without ``--out`` that is the package's own file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.measure import Trial, error, timed
from benchmarks.ops import OPS, cases, run
from benchmarks.results import DEVICE
from dopsd.files import write_text
from dopsd_kernels.common import configs

Config = dict[str, int]
Entry = dict[str, Any]

# Values that are tried for a parameter of this name.
CANDIDATES = {
    "BLOCK": (512, 1024, 2048, 4096),
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (16, 32, 64, 128),
    "BLOCK_V": (64, 128, 256),
    "ROW_BYTES": (64, 128),
    "GROUP": (1, 4, 8, 16),
    "PROGRAMS": (1, 2, 4),
    "SPLITS": (1, 2, 4, 8, 16),
    "CACHE_MIB": (16, 32, 64, 96, 128, 256),
    "num_warps": (4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5),
}
SIZES = ("rows", "width", "vocab")
_HEAD = (4096, 126464, torch.bfloat16)
_ATTENTION = next(case for case in cases(torch.device("cuda")) if case.op == "attention" and case.phase == "both")
# Kernel -> the case whose time its configuration decides.
CASES = {
    "step_kl_rows": Case("step_kl", "both", "reverse_kl", 2048, *_HEAD),
    "token_logprob_rows": Case("token_logprob", "both", "tokens", 2048, *_HEAD),
    "confidence_argmax": Case("confidence", "forward", "argmax", 256, *_HEAD),
    "confidence": Case("confidence", "forward", "sampled", 256, *_HEAD, "peaked"),
    "confidence_wide": Case("confidence", "forward", "top_k=20", 256, *_HEAD[:2], torch.float32),
    "prefix_attention": replace(_ATTENTION, phase="forward"),
    "prefix_attention_query_gradient": _ATTENTION,
    "prefix_attention_key_gradient": _ATTENTION,
}
ROUNDS = 9
WORTHWHILE = 0.99  # a smaller gain than 1 % is noise
ERROR = 0.02  # of bf16 results; a configuration with more is wrong


def search(start: Config, seconds: Callable[[Config], float], until: float) -> Iterator[tuple[Config, float]]:
    """Yield the present configuration and each that is faster than all before; ``seconds`` is infinite for one that
    cannot run. None is tried after ``until``, in Unix time."""
    best, fastest = start, seconds(start)
    yield best, fastest
    tried = [start]
    improved = True
    while improved:
        improved = False
        for name in start:
            for value in CANDIDATES.get(name, ()):
                candidate = {**best, name: value}
                if candidate in tried or time.time() > until:
                    continue
                tried.append(candidate)
                taken = seconds(candidate)
                print(f"{1e3 * taken:9.3f} ms  {json.dumps(candidate)}", flush=True)
                if taken < WORTHWHILE * fastest:
                    best, fastest, improved = candidate, taken, True
                    yield best, fastest


def insert(entries: list[Entry], entry: Entry) -> list[Entry]:
    """Return a kernel's entries with one more, in front of the first that applied to its problem until now.

    An older entry of the same architecture and sizes is replaced; entries for smaller problems stay in front.
    """
    (arch,) = entry["arch"]
    limits = {name: value for name, value in entry.items() if name in SIZES}
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
    of_kernels = (
        f" {json.dumps(kernel)}: [\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in of_kernel) + "\n ]"
        for kernel, of_kernel in entries.items()
    )
    write_text(path, "{\n" + ",\n".join(of_kernels) + "\n}\n")


def timer(kernel: str, case: Case, arch: str, entries: dict[str, list[Entry]]) -> Callable[[Config], float]:
    """Return a function that times the public op on this GPU with a configuration of one of its kernels."""
    op = OPS[case.op]
    tensors = op.tensors(case, DEVICE)

    def seconds(config: Config) -> float:
        trial = Trial(lambda: run(case, op.providers["ours triton"].forward, tensors))

        def measure() -> None:
            # Compiles, too. A configuration may be impossible: too much shared memory, or a block too small.
            if error(case, "ours triton")["error"] > ERROR:
                raise ValueError("wrong results")
            timed(trial.run)
            trial.times += [timed(trial.run) for _ in range(ROUNDS)]

        with configs.use({**entries, kernel: [{"arch": [arch], "config": config}]}):
            trial.attempt(measure)
        if trial.status != "ok":
            print(trial.status, flush=True)
            return math.inf
        return statistics.median(device for device, _ in trial.times)

    return seconds


def tune(kernel: str, case: Case, arch: str, until: float, out: Path) -> bool:
    """Search one kernel's best configuration and write each that is found; return whether any ran."""
    entries = configs.read(out if out.is_file() else configs.PATH)
    limits = {name: size for name in SIZES if case.op != "attention" and (size := getattr(case, name))}
    start, fastest = configs.choose(kernel, DEVICE, **limits), math.inf
    for config, fastest in search(start, timer(kernel, case, arch, entries), until):  # noqa: B007
        if config != start:
            entries[kernel] = insert(entries[kernel], {"arch": [arch], **limits, "config": config})
            write(entries, out)
    print(f"{kernel}: {1e3 * fastest:.3f} ms", flush=True)
    return not math.isinf(fastest)


def main(argv: list[str] | None = None) -> int:
    """Tune kernels, as long as there is time; exit status 1 if a kernel ran in no configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="KERNEL", help=" ".join(CASES))
    parser.add_argument("--minutes", type=float, default=math.inf, help="when to have stopped")
    parser.add_argument("--out", type=Path, default=configs.PATH, help="the file (default: the package's)")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, help="of the loss and the confidence, instead of LLaDA-8B's")
    args = parser.parse_args(argv)
    arch = configs.family(DEVICE)
    if arch is None:
        print(f"There are no Triton kernels for this device: {DEVICE}.", file=sys.stderr)
        return 2
    begin, fine = time.time(), True
    for number, kernel in enumerate(args.only, 1):
        case = CASES[kernel]
        if case.op != "attention":
            case = replace(case, **{name: size for name in SIZES if (size := getattr(args, name)) is not None})
        # Each kernel has an equal share of the time.
        fine &= tune(kernel, case, arch, begin + 60 * args.minutes * number / len(args.only), args.out)
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
