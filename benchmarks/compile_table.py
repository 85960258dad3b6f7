"""Compiles every kernel ahead of time for every architecture, without a GPU, and checks what the compiler made of it.

    python -m benchmarks.compile_table                        # every architecture, as a table; exit status 1 on a fault
    python -m benchmarks.compile_table --arch sm_90 --json table.json

The ops are called with tensors that have no memory, and Triton compiles what they launch: with each entry of the
kernels' configurations, for the dtypes and options that change most what a program keeps in registers. What lies
between a layer's products has no entries and is compiled for widths of models. A row is at fault if it spills more
registers than it may, needs more shared memory than the chip has, or multiplies 16-bit operands without tensor cores.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from dopsd.files import write_json
from dopsd.tables import markdown_table
from dopsd_kernels import (
    fused_confidence,
    fused_step_kl,
    fused_token_logprob,
    prefix_attention,
    step_kl_from_logits,
)

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma")


def _confidence(hidden: torch.dtype, weight: torch.dtype, top_k: int, **sample: Any) -> None:
    tensors = torch.empty(33, 4096, dtype=hidden), torch.empty(126464, 4096, dtype=weight)
    fused_confidence(*tensors, bias=torch.empty(126464), top_k=top_k, backend="triton", **sample)


def _step_kl(**options: Any) -> None:
    student, teacher, weight = (torch.empty(rows, 4096, dtype=torch.bfloat16) for rows in (33, 33, 126464))
    fused_step_kl(student.requires_grad_(), teacher, weight, clip=0.05, backend="triton", **options)


def _step_kl_from_logits(**options: Any) -> None:
    student, teacher = (torch.empty(33, 126464, dtype=torch.bfloat16) for _ in range(2))
    step_kl_from_logits(student.requires_grad_(), teacher, clip=0.05, backend="triton", **options).loss.backward()


def _token_logprob(dtype: torch.dtype, tokens: int, entropy: bool) -> None:
    hidden, weight = (torch.empty(rows, 4096, dtype=dtype) for rows in (33, 126464))
    ids, bias = torch.empty(33, tokens, dtype=torch.int64), torch.empty(126464, dtype=dtype)
    out = fused_token_logprob(hidden.requires_grad_(), weight, ids, bias=bias, exclude=[0], backend="triton")
    (out.logprob.sum() + out.entropy.sum() if entropy else out.logprob.sum()).backward()


def _attention(dtype: torch.dtype, width: int) -> None:
    shapes = ((2, 3, 4, 33, width), *[(2, 3, 2, 33, width)] * 2, *[(2, 2, 57, width)] * 2)
    masks = {"prefix_mask": torch.empty(2, 57, dtype=torch.bool), "own_mask": torch.empty(2, 3, 33, dtype=torch.bool)}
    tensors = (torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    prefix_attention(*tensors, **masks, backend="triton").sum().backward()


def _layer(dtype: torch.dtype, width: int, hidden: int, heads: int, products: torch.dtype = torch.bfloat16) -> None:
    from dopsd_kernels.lora_layer import kernels

    x, weight = torch.empty(33, width, dtype=dtype), torch.empty(width, dtype=dtype)
    normed = kernels.rms_norm(x, weight, 1e-5, products)
    kernels.rms_norm_backward(normed, x, x, weight, 1e-5)
    gate, up = torch.empty(33, hidden, dtype=products), torch.empty(33, hidden, dtype=products)
    kernels.swiglu_backward(kernels.swiglu(gate, up), gate, up)
    kernels.drop(normed, 0.05, 1 << 40, kernels.drop(normed, 0.05, 1 << 40))
    of_head = torch.empty(3, 11, heads, 128, dtype=products).transpose(1, 2)
    cos, sin = torch.empty(1, 1, 11, 128), torch.empty(1, 1, 11, 128)
    for transposed in (False, True):
        kernels.rotary(of_head, cos, sin, transposed)


# Configuration entry -> by label, the calls that launch it; with biases and masks, which cost registers.
_SAMPLE = {"temperature": 1.0, "seed": 0}
_BUCKET = {"divergence": "jsd", "top_k": 20, "tail": "bucket", "clip_form": "nonnegative"}
_BF16, _FP32 = torch.bfloat16, torch.float32
CALLS: dict[str, dict[str, Callable[[], None]]] = {
    "confidence_argmax": {
        "bf16 x bf16, top 0": functools.partial(_confidence, _BF16, _BF16, 0),
        "bf16 x bf16, top 0, entropy": functools.partial(_confidence, _BF16, _BF16, 0, entropy=True),
    },
    "confidence": {
        "bf16 x bf16, top 2, sample": functools.partial(_confidence, _BF16, _BF16, 2, **_SAMPLE),
        "bf16 x bf16, top 0, sample, entropy": functools.partial(_confidence, _BF16, _BF16, 0, entropy=True, **_SAMPLE),
        "bf16 x bf16, top 32": functools.partial(_confidence, _BF16, _BF16, 32),
    },
    "confidence_wide": {
        "bf16 x bf16, top 128, sample": functools.partial(_confidence, _BF16, _BF16, 128, **_SAMPLE),
        "fp32 x fp32, top 32, sample": functools.partial(_confidence, _FP32, _FP32, 32, **_SAMPLE),
        "bf16 x fp32, top 0, sample": functools.partial(_confidence, _BF16, _FP32, 0, **_SAMPLE),
    },
    "step_kl_rows": {
        "reverse KL, fp32": functools.partial(_step_kl, clip_form="nonnegative"),
        "JSD, fp32, bucket": functools.partial(_step_kl, **_BUCKET),
        "JSD, bf16, bucket": functools.partial(_step_kl_from_logits, **_BUCKET),
        "skew reverse KL, bf16": functools.partial(_step_kl_from_logits, divergence="skew_reverse_kl"),
        "skew forward KL, bf16": functools.partial(_step_kl_from_logits, divergence="skew_forward_kl"),
    },
    "token_logprob_rows": {
        "bf16, entropy": functools.partial(_token_logprob, _BF16, 4, True),
        "fp32": functools.partial(_token_logprob, _FP32, 1, False),
    },
    **{
        name: {"bf16, D = 128": functools.partial(_attention, _BF16, 128)}
        for name in ("prefix_attention", "prefix_attention_query_gradient", "prefix_attention_key_gradient")
    },
    "prefix_attention_fp32": {"fp32, D = 64": functools.partial(_attention, _FP32, 64)},
    "lora_layer": {
        "fp32, d = 16384": functools.partial(_layer, _FP32, 16384, 12288, 32, _FP32),
        "fp32 and bf16, LLaDA-8B": functools.partial(_layer, _FP32, 4096, 12288, 32),
        "bf16, LLaDA-8B": functools.partial(_layer, _BF16, 4096, 12288, 32),
        "bf16, Dream-7B": functools.partial(_layer, _BF16, 3584, 18944, 28),
    },
}
_FIXED = [{"arch": list(TARGETS), "config": {}}]  # of what has no entry

# Bytes that may be spilled. Once per vocabulary tile, whose reduction needs more registers than its product, and not
# inside the product: by the largest tiles, by a top_k of 128 (1 KB of keys per row), and by fp32 operands, which lie in
# registers twice as wide as 16-bit ones.
_TILE_SPILL = 256
# Once per tile of 128 x 128 logits, by their noise. Counted in bytes, writing and reading it is below a tenth of the
# tile's product at d = 4096. Tiles of 64 rows would not spill, but read half as much again from the L2 cache for each
# product, which is their limit.
_NOISE_SPILL = 832
# By large tiles and their sums: some of the numbers that wait between the products of a tile of keys, or, where keys
# are summed for, outside the loop over tiles of rows.
_ATTENTION_SPILL = 256
# Once per vocabulary tile, by an entropy: one more sum of a row waits through the product.
_ENTROPY_SPILL = 64


def spill_budget(entry: str, constexprs: dict[str, Any]) -> int:
    """The bytes that a kernel with this entry's configuration may spill."""
    if entry.startswith("prefix_attention"):
        return _ATTENTION_SPILL
    if "BLOCK_V" not in constexprs:
        return 0
    entropy = _ENTROPY_SPILL if constexprs["weighted"] is not None else 0
    if entry == "confidence" and constexprs["BLOCK_N"] == 128:
        return entropy + (_NOISE_SPILL if constexprs["SAMPLE"] else _TILE_SPILL)
    return entropy + (_TILE_SPILL if entry == "confidence_wide" or constexprs["BLOCK_V"] > 128 else 0)


def compile_call(arch: str, entry: str, config: dict[str, int], label: str) -> list[dict[str, Any]]:
    """Compile what a call launches with a configuration; a row for every kernel that this process has not compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from dopsd_kernels.common import configs

    rows: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **named}
        # Of an op's kernels, the one that the entry is for and those that have no entry.
        if any(config.get(name, value) != value for name, value in arguments.items() if name.startswith("BLOCK")):
            return
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = run(kernel, *args, grid=grid, warmup=True, **named)
        if (arch, compiled.hash) not in _SEEN:
            _SEEN.add((arch, compiled.hash))
            about = {"config": config, "variant": label + _SIDES.get(arguments.get("OWN"), "")}
            budget = spill_budget(entry, arguments)
            about |= {"tensor_cores": _needs_tensor_cores(arguments), "spill_budget": budget, "hash": compiled.hash}
            rows.append({"kernel": _name(kernel), "arch": arch, **about, **_found(arch, compiled, log.getvalue())})

    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # what another process has compiled has no log
    target, place = GPUTarget(*TARGETS[arch]), list(TARGETS).index(arch)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: place, get_current_stream=lambda device: 0
        )
    )
    # A large GPU has many splits, which the kernel that merges them is compiled for; here they come from the least.
    many = {**config, **({"SPLITS": 1024} if "PROGRAMS" in config else {})}
    with (
        configs.use({**configs.read(), entry: [{"arch": [arch], "config": many}]}),
        mock.patch.object(configs, "family", return_value=arch),
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(torch.Tensor, "nonzero", lambda x: x.new_empty(len(x), 1, dtype=torch.int64)),
        mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()),  # knows no meta tensors
        mock.patch.object(JITFunction, "run", compile_only),
        torch.device("meta"),
    ):
        CALLS[entry][label]()
    return rows


_SEEN: set[tuple[str, str]] = set()
_SIDES = {True: ", own keys", False: ", prefix"}


def _name(kernel: Any) -> str:
    return f"{kernel.__module__.split('.')[1]}.{kernel.__name__}"


def _needs_tensor_cores(arguments: dict[str, Any]) -> bool:
    """Whether a kernel multiplies (what has stages does) operands of 16 bits."""
    operands = next(x for x in arguments.values() if isinstance(x, torch.Tensor))
    return "num_stages" in arguments and operands.itemsize == 2 and not arguments["UPCAST"]


def _found(arch: str, compiled: Any, log: str) -> dict[str, Any]:
    """What the compiler made of a kernel."""
    from dopsd_kernels.common.configs import SHARED_MEMORY

    if TARGETS[arch][0] == "cuda":
        assembly = compiled.asm["ptx"]
        registers, spill = (_number(x, log) for x in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    else:
        assembly = compiled.asm["amdgcn"]
        registers, spill = (_number(x, assembly) for x in (r"\.vgpr_count:\s+(\d+)", r"\.vgpr_spill_count:\s+(\d+)"))
        spill *= 4
    instruction = next((x for x in INSTRUCTIONS if x in assembly), "-")
    found = {"registers": registers, "spill_bytes": spill, "instruction": instruction}
    return {**found, "shared_bytes": compiled.metadata.shared, "shared_limit": SHARED_MEMORY[arch]}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern!r}")
    return int(found[1])


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row."""
    wrong = {
        "spills": row["spill_bytes"] > row["spill_budget"],
        "shared memory": row["shared_bytes"] > row["shared_limit"],
        "no tensor cores": row["tensor_cores"] and row["instruction"] == "-",
    }
    return [name for name, is_wrong in wrong.items() if is_wrong]


def work(arch: str) -> list[tuple[Any, ...]]:
    """What `compile_call` is called with for an architecture."""
    from dopsd_kernels.common.configs import read

    entries = read()
    return [
        (arch, entry, one["config"], label)
        for entry, calls in CALLS.items()
        for one in entries.get(entry, _FIXED)
        if arch in one["arch"]
        for label in calls
    ]


def main() -> int:
    """Compile everything and print a table; exit status 1 if a row is at fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_table", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    # The interpreter's functions do not compile, and a cached kernel would hide a fault of this compiler.
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        calls = [call for arch in arguments.arch for call in work(arch)]
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = itertools.chain(*pool.map(compile_call, *zip(*calls, strict=True)))
            rows = list({(row["arch"], row.pop("hash")): row for row in found}.values())
    rows = [{**row, "faults": faults(row)} for row in rows]
    if arguments.json:
        write_json(arguments.json, rows)
    print(markdown_table([{name: str(value) for name, value in row.items()} for row in rows]))
    faulty = [row for row in rows if row["faults"]]
    for row in faulty:
        print(f"FAULT: {row['kernel']} {row['arch']} {row['variant']} {row['config']}: {', '.join(row['faults'])}")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
