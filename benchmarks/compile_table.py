"""Compiles every kernel ahead of time for every architecture, without a GPU, and checks what the compiler made of it.

    python -m benchmarks.compile_table                        # every architecture, as a table; exit status 1 on a fault
    python -m benchmarks.compile_table --arch sm_90 --json table.json

The public ops are called with tensors that have no memory, and what they would launch is compiled: with each entry of
the kernels' configurations, for the dtypes and options that change most what a program keeps in registers. A row is at
fault if it spills more registers than it may, needs more shared memory than the chip has, or multiplies 16-bit operands
without tensor cores.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dopsd.files import write_json
from dopsd.tables import markdown_table
from dopsd_kernels import fused_confidence, fused_step_kl, prefix_attention, step_kl_from_logits

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma")
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int8: "i8",
    bool: "i1",
    int: "i32",
    float: "fp32",
}


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel, as it is launched."""

    kernel: str  # module:function
    label: str  # what distinguishes it
    config: dict[str, int]  # the entry it belongs to, for the table
    signature: dict[str, str]  # "*bf16" (aligned to 16 bytes), "fp32", "i32", "i32:16" (a multiple of 16)
    constexprs: dict[str, Any]  # the other arguments
    options: dict[str, Any]
    tensor_cores: bool  # whether it must use them
    spill_budget: int  # bytes


# ------------------------------------------------------------------------------------------------------------
# What is launched
# ------------------------------------------------------------------------------------------------------------


def _confidence(hidden: torch.dtype, weight: torch.dtype, top_k: int, **sample: Any) -> None:
    tensors = torch.empty(33, 4096, dtype=hidden), torch.empty(126464, 4096, dtype=weight)
    fused_confidence(*tensors, bias=torch.empty(126464), top_k=top_k, backend="triton", **sample)


def _step_kl(**options: Any) -> None:
    student, teacher, weight = (torch.empty(rows, 4096, dtype=torch.bfloat16) for rows in (33, 33, 126464))
    fused_step_kl(student.requires_grad_(), teacher, weight, clip=0.05, backend="triton", **options)


def _step_kl_from_logits(**options: Any) -> None:
    student, teacher = (torch.empty(33, 126464, dtype=torch.bfloat16) for _ in range(2))
    step_kl_from_logits(student.requires_grad_(), teacher, clip=0.05, backend="triton", **options).loss.backward()


def _attention(dtype: torch.dtype, width: int) -> None:
    shapes = ((2, 3, 4, 33, width), *[(2, 3, 2, 33, width)] * 2, *[(2, 2, 57, width)] * 2)
    masks = {"prefix_mask": torch.empty(2, 57, dtype=torch.bool), "own_mask": torch.empty(2, 3, 33, dtype=torch.bool)}
    tensors = (torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    prefix_attention(*tensors, **masks, backend="triton").sum().backward()


# Configuration entry -> by label, the calls that launch it; with biases and masks, which cost registers.
_SAMPLE = {"temperature": 1.0, "seed": 0}
_BUCKET = {"divergence": "jsd", "top_k": 20, "tail": "bucket", "clip_form": "nonnegative"}
_BF16, _FP32 = torch.bfloat16, torch.float32
CALLS: dict[str, dict[str, Callable[[], None]]] = {
    "confidence_argmax": {"bf16 x bf16, top 0": functools.partial(_confidence, _BF16, _BF16, 0)},
    "confidence": {
        "bf16 x bf16, top 2, sample": functools.partial(_confidence, _BF16, _BF16, 2, **_SAMPLE),
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
    },
    **{
        name: {"bf16, D = 128": functools.partial(_attention, _BF16, 128)}
        for name in ("prefix_attention", "prefix_attention_query_gradient", "prefix_attention_key_gradient")
    },
    "prefix_attention_fp32": {"fp32, D = 64": functools.partial(_attention, _FP32, 64)},
}

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


def spill_budget(entry: str, constexprs: dict[str, Any]) -> int:
    """The bytes that a kernel with this entry's configuration may spill."""
    if entry.startswith("prefix_attention"):
        return _ATTENTION_SPILL
    if "BLOCK_V" not in constexprs:
        return 0
    if entry == "confidence" and constexprs["BLOCK_N"] == 128:
        return _NOISE_SPILL if constexprs["SAMPLE"] else _TILE_SPILL
    return _TILE_SPILL if entry == "confidence_wide" or constexprs["BLOCK_V"] > 128 else 0


def launches(arch: str, entry: str, config: dict[str, int], call: Callable[[], None]) -> Iterator[tuple[Any, ...]]:
    """What a call launches on a GPU with this configuration: kernels and their arguments by name."""
    from triton.runtime import JITFunction

    from dopsd_kernels.triton import configs

    found: list[tuple[Any, dict[str, Any]]] = []

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found.append((kernel, {**dict(zip(kernel.arg_names, args, strict=False)), **named}))

    # A large GPU has many splits, which the kernel that merges them is compiled for; here they come from the least.
    config = {**config, **({"SPLITS": 1024} if "PROGRAMS" in config else {})}
    entries = {**configs.read(), entry: [{"arch": [arch], "config": config}]}
    with (
        configs.use(entries),
        mock.patch.object(configs, "family", return_value=arch),
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(torch.Tensor, "nonzero", lambda x: x.new_empty(len(x), 1, dtype=torch.int64)),
        mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()),  # knows no meta tensors
        mock.patch.object(JITFunction, "run", launch),
        torch.device("meta"),
    ):
        call()
    for kernel, arguments in found:
        # Of an op's kernels, the one that the entry is for and those that have no entry.
        if all(config.get(name, value) == value for name, value in arguments.items() if name.startswith("BLOCK")):
            yield kernel, arguments


def variants(arch: str) -> Iterator[Variant]:
    """Everything that is compiled for an architecture, once."""
    from dopsd_kernels.triton.configs import read

    seen = set()
    for entry, calls in CALLS.items():
        for config in (one["config"] for one in read()[entry] if arch in one["arch"]):
            for label, call in calls.items():
                for kernel, arguments in launches(arch, entry, config, call):
                    variant = _variant(kernel, arguments, entry, config, label)
                    if (
                        key := (variant.kernel, str((variant.signature, variant.constexprs, variant.options)))
                    ) not in seen:
                        seen.add(key)
                        yield variant


def _variant(kernel: Any, arguments: dict[str, Any], entry: str, config: dict[str, int], label: str) -> Variant:
    """As Triton compiles it: what is None or 1 is a constant, and of an integer it counts whether 16 divides it."""
    signature, constexprs = {}, {}
    for parameter in kernel.params:
        value, varies = arguments[parameter.name], parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not varies):
            constexprs[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
        else:
            multiple = type(value) is int and value % 16 == 0 and not varies
            signature[parameter.name] = f"{_TYPES[type(value)]}{':16' if multiple else ''}"
    sides = {True: ", own keys", False: ", prefix"}
    sixteen = next(iter(signature.values())) == "*bf16" and not constexprs.get("UPCAST")
    return Variant(
        kernel=f"{kernel.__module__}:{kernel.__name__}",
        label=f"{label}{sides.get(constexprs.get('OWN'), '')}",  # type: ignore[arg-type]
        config=config,
        signature=signature,
        constexprs=constexprs,
        options={name: value for name, value in arguments.items() if name not in kernel.arg_names},
        tensor_cores=sixteen and "num_stages" in arguments,
        spill_budget=spill_budget(entry, constexprs),
    )


# ------------------------------------------------------------------------------------------------------------
# Compiling
# ------------------------------------------------------------------------------------------------------------


def compile_variant(arch: str, variant: Variant) -> dict[str, Any]:
    """Return a row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dopsd_kernels.triton.configs import SHARED_MEMORY

    module, name = variant.kernel.split(":")
    fn = getattr(importlib.import_module(module), name)
    kinds = {x: variant.signature.get(x, "constexpr") for x in fn.arg_names}
    multiples = [i for i, kind in enumerate(kinds.values()) if kind.startswith("*") or kind.endswith(":16")]
    source = ASTSource(
        fn,
        signature={x: kind.removesuffix(":16") for x, kind in kinds.items()},
        constexprs=variant.constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in multiples},
    )
    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[arch]), options=variant.options)
    if TARGETS[arch][0] == "cuda":
        assembly = compiled.asm["ptx"]
        registers = _number(r"Used (\d+) registers", log.getvalue())
        spill = _number(r"(\d+) bytes spill stores", log.getvalue())
    else:
        assembly = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
        spill = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    instruction = next((x for x in INSTRUCTIONS if x in assembly), "-")
    shared, limit = compiled.metadata.shared, SHARED_MEMORY[arch]
    faults = {
        "spills": spill > variant.spill_budget,
        "shared memory": shared > limit,
        "no tensor cores": variant.tensor_cores and instruction == "-",
    }
    return {
        "kernel": f"{module.rpartition('.')[2]}.{name}",
        "arch": arch,
        "config": variant.config,
        "variant": variant.label,
        "registers": registers,
        "spill_bytes": spill,
        "spill_budget": variant.spill_budget,
        "shared_bytes": shared,
        "shared_limit": limit,
        "instruction": instruction,
        "tensor_cores": variant.tensor_cores,
        "faults": [name for name, found in faults.items() if found],
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern!r}")
    return int(found[1])


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
        work = [(arch, variant) for arch in arguments.arch for variant in variants(arch)]
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows = list(pool.map(compile_variant, *zip(*work, strict=True)))
    if arguments.json:
        write_json(arguments.json, rows)
    print(markdown_table([{name: str(value) for name, value in row.items() if name != "faults"} for row in rows]))
    faulty = [row for row in rows if row["faults"]]
    for row in faulty:
        print(f"FAULT: {row['kernel']} {row['arch']} {row['variant']} {row['config']}: {', '.join(row['faults'])}")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
