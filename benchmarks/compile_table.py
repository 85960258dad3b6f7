"""Compiles every kernel ahead of time for every architecture, without a GPU, and checks what the compiler made of it.

    python -m benchmarks.compile_table                        # every architecture, as a table; exit status 1 on a fault
    python -m benchmarks.compile_table --arch sm_90 --json table.json

Each entry of dopsd_kernels/common/configs.json is compiled with the variants of its kernel that differ most: dtypes,
and options that change what a program keeps in registers. A row is at fault if it spills more registers than its
variant allows, needs more shared memory than the chip has, or multiplies 16-bit operands without tensor cores.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma")


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel, with enough to tell how it will be launched."""

    kernel: str  # module:function
    label: str  # what distinguishes it
    config: dict[str, int]  # the entry it belongs to, for the table
    signature: dict[str, str]  # in any order: "*bf16" (aligned to 16 bytes), "fp32", "i32", "i32:16" (a multiple of 16)
    constexprs: dict[str, Any]  # the other arguments; a function as module:function
    options: dict[str, int]  # num_warps, and num_stages where the launch has it
    tensor_cores: bool = False  # whether it must use them
    spill_budget: int = 0  # bytes


# ------------------------------------------------------------------------------------------------------------
# Variants of each op
# ------------------------------------------------------------------------------------------------------------

# Spilled once per vocabulary tile, whose reduction needs more registers than its product, and not inside the product:
# by the largest tiles, by a top_k of 128 (1 KB of keys per row), and by fp32 operands, which lie in registers twice as
# wide as 16-bit ones.
_TILE_SPILL = 256
# Spilled once per tile of 128 x 128 logits by their noise. Counted in bytes, writing and reading it is below a tenth of
# the tile's product at d = 4096. Tiles of 64 rows would not spill, but read half as much again from the L2 cache for
# each product, which is their limit.
_NOISE_SPILL = 832
# Spilled by large tiles and their sums: some of the numbers that wait between the products of a tile of keys, or, where
# keys are summed for, outside the loop over tiles of rows.
_ATTENTION_SPILL = 256


def confidence(arch: str) -> Iterator[Variant]:
    """Both kernels of fused_confidence, at d = 4096."""
    import triton.language as tl

    bf16, fp32 = ("bf16", "bf16"), ("fp32", "fp32")  # of hidden and weight
    for name, options in (
        ("confidence_argmax", [(bf16, 0, False, False), (bf16, 0, False, True)]),
        ("confidence", [(bf16, 2, True, True), (bf16, 32, False, True)]),
        ("confidence_wide", [(bf16, 128, True, True), (fp32, 32, True, True), (("bf16", "fp32"), 0, True, False)]),
    ):
        for config in _configs(name, arch):
            for (hidden, weight), top_k, sample, entropy in options:
                upcast = hidden != weight
                itemsize = 2 if (hidden, weight) == bf16 else 4
                absent = [] if sample else ["seed", "chosen", "chosen_logit"]
                absent += [] if top_k else ["top"]
                absent += [] if entropy else ["weighted"]
                pointers = {
                    "hidden": hidden,
                    "weight": weight,
                    "bias": "fp32",
                    "seed": "i64",
                    "largest": "i64",
                    "total": "fp32",
                    "weighted": "fp32",
                    "chosen": "i64",
                    "chosen_logit": "fp32",
                    "top": "i64",
                }
                label = (
                    f"{hidden} x {weight}, top {top_k}{', sample' if sample else ''}{', entropy' if entropy else ''}"
                )
                budget = _TILE_SPILL if name == "confidence_wide" or config["BLOCK_V"] > 128 else 0
                if name == "confidence" and config["BLOCK_N"] == 128:
                    budget = _NOISE_SPILL if sample else _TILE_SPILL
                yield Variant(
                    kernel="dopsd_kernels.confidence.kernels:_confidence",
                    label=label,
                    config=config,
                    signature={
                        **{name: f"*{kind}" for name, kind in pointers.items() if name not in absent},
                        **dict.fromkeys(("rows", "splits", "split_tiles"), "i32"),
                        **dict.fromkeys(("vocab", "width", "hidden_stride", "weight_stride"), "i32:16"),
                        "inverse_temperature": "fp32",
                    },
                    constexprs={
                        **dict.fromkeys(absent),
                        "weight_step": 1,
                        "HAS_BIAS": True,
                        "SAMPLE": sample,
                        "TOP_K": top_k,
                        "UPCAST": upcast,
                        "OFFSET": tl.int32,
                        "EVEN_WIDTH": True,
                        "BLOCK_K": config["ROW_BYTES"] // itemsize,
                        **{key: config[key] for key in ("BLOCK_N", "BLOCK_V", "GROUP")},
                    },
                    options={name: config[name] for name in ("num_warps", "num_stages")},
                    tensor_cores=itemsize == 2,
                    spill_budget=budget,
                )
    for splits, top_k in ((1024, 0), (1024, 128)):
        outputs = ("logsumexp", "max_logit", "logit", "top_values", "entropy")
        yield Variant(
            kernel="dopsd_kernels.confidence.kernels:_merge",
            label=f"top {top_k}, sample",
            config={"BLOCK_S": splits},
            signature={
                **dict.fromkeys(("largest", "chosen", "token", "argmax", "top_indices"), "*i64"),
                **dict.fromkeys(("total", "weighted", "chosen_logit", *outputs), "*fp32"),
                **({"top": "*i64"} if top_k else {}),
                **dict.fromkeys(("splits", "count"), "i32"),
            },
            constexprs={
                **({} if top_k else {"top": None}),
                "SAMPLE": True,
                "TOP_K": top_k,
                "BLOCK_S": splits,
                "BLOCK_KEYS": 1024,
            },
            options={"num_warps": 4 if top_k else 1},
        )


def step_kl(arch: str) -> Iterator[Variant]:
    """The passes of fused_step_kl: without a top-k, and with a bucket, which keeps most."""
    from dopsd_kernels.step_kl import kernels

    signature = {
        **dict.fromkeys(("bias_s", "bias_t", "normalizers", "sums", "scale"), "*fp32"),
        "threshold": "*i64",
        **dict.fromkeys(("stride_s", "stride_t", "stride_gradient"), "i32:16"),
        **dict.fromkeys(("vocab", "split_columns"), "i32:16"),
        **dict.fromkeys(("rows", "first_row", "first_column"), "i32"),
        **dict.fromkeys(("inverse_temperature", "beta", "clip"), "fp32"),
    }

    def variant(
        name: str, label: str, config: dict[str, int], constexprs: dict[str, Any], types: dict[str, str], **more: Any
    ) -> Variant:
        arguments = getattr(kernels, name).arg_names
        constexprs = {key: value for key, value in {**config, **constexprs}.items() if key in arguments}
        kinds = {**signature, **types}
        return Variant(
            kernel=f"dopsd_kernels.step_kl.kernels:{name}",
            label=label,
            config=config,
            signature={key: kinds[key] for key in arguments if key not in constexprs},
            constexprs=constexprs,
            **more,
        )

    for config in _configs("step_kl_rows", arch):
        for label, logits, bucket in (
            ("reverse KL, fp32", "*fp32", False),
            ("JSD, fp32, bucket", "*fp32", True),
            ("JSD, bf16, bucket", "*bf16", True),
        ):
            constexprs = {
                "DIVERGENCE": f"dopsd_kernels.step_kl.divergence_kernels:{'_jsd' if bucket else '_reverse_kl'}",
                "CLIPPED": True,
                "NONNEGATIVE": True,
                "PARTS": config["SPLITS"],
                "PADDED_PARTS": config["SPLITS"],
                **({} if bucket else dict.fromkeys(("bias_s", "bias_t", "threshold", "scale"))),
            }
            for name in ("_normalizers", "_row_sums", "_logit_gradient"):
                yield variant(
                    name,
                    label,
                    config,
                    constexprs,
                    {"z_s": logits, "z_t": logits, "gradient": "*bf16"},
                    options={"num_warps": config["num_warps"]},
                )


def prefix_attention(arch: str) -> Iterator[Variant]:
    """Forward and backward with both masks, which cost registers, at D = 128 (fp32: 64)."""
    from dopsd_kernels.prefix_attention import kernels

    def variants(config: dict[str, int], names: tuple[str, ...], dtype: str, width: int) -> Iterator[Variant]:
        for name in names:
            arguments = getattr(kernels, name).arg_names
            for own in (False, True) if name == "_backward_keys" else (None,):
                constexprs = {
                    "UPCAST": False,
                    "BLOCK_D": width,
                    "BLOCK_M": config["BLOCK_M"],
                    "BLOCK_N": config["BLOCK_N"],
                    **({} if own is None else {"OWN": own}),
                }
                signature = {
                    **dict.fromkeys(("q", "k", "v", "k_prefix", "v_prefix", "grad", "out"), f"*{dtype}"),
                    **dict.fromkeys(("d_q", "d_k", "d_v"), f"*{dtype}"),
                    **dict.fromkeys(("lse", "delta"), "*fp32"),
                    **dict.fromkeys(("prefix_mask", "own_mask", "mask"), "*i8"),
                    **{key: "i32:16" for key in arguments if key.startswith("stride_")},
                    **dict.fromkeys(("rows", "prefix", "keys", "length", "split_rows"), "i32"),
                    **dict.fromkeys(("heads", "repeats"), "i32"),
                    "width": "i32:16",
                    "scale": "fp32",
                }
                sides = {None: "", True: ", own keys", False: ", prefix"}[own]
                yield Variant(
                    kernel=f"dopsd_kernels.prefix_attention.kernels:{name}",
                    label=f"{dtype}, D = {width}{sides}",
                    config=config,
                    signature={key: signature[key] for key in arguments if key not in constexprs},
                    constexprs=constexprs,
                    options={key: config[key] for key in ("num_warps", "num_stages")},
                    tensor_cores=dtype != "fp32",
                    spill_budget=_ATTENTION_SPILL,
                )

    for config in _configs("prefix_attention", arch):
        yield from variants(config, ("_forward",), "bf16", 128)
    for config in _configs("prefix_attention_query_gradient", arch):
        yield from variants(config, ("_backward_queries",), "bf16", 128)
    for config in _configs("prefix_attention_key_gradient", arch):
        yield from variants(config, ("_backward_keys",), "bf16", 128)
    for config in _configs("prefix_attention_fp32", arch):
        yield from variants(config, ("_forward", "_backward_queries", "_backward_keys"), "fp32", 64)


OPS = (confidence, step_kl, prefix_attention)


def _configs(kernel: str, arch: str) -> list[dict[str, int]]:
    from dopsd_kernels.common.configs import read

    return [entry["config"] for entry in read()[kernel] if arch in entry["arch"]]


# ------------------------------------------------------------------------------------------------------------
# Compiling
# ------------------------------------------------------------------------------------------------------------


def compile_variant(arch: str, variant: Variant) -> dict[str, Any]:
    """Return a row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dopsd_kernels.common.configs import LAUNCH, SHARED_MEMORY

    module, name = variant.kernel.split(":")
    fn = _function(variant.kernel)
    arguments = fn.arg_names
    unknown = set(arguments) ^ (set(variant.signature) | set(variant.constexprs))
    if unknown:
        raise ValueError(f"{name} and its variant disagree on {', '.join(sorted(unknown))}")
    kinds = {x: variant.signature.get(x, "constexpr") for x in arguments}
    multiples = [i for i, x in enumerate(arguments) if kinds[x].startswith("*") or kinds[x].endswith(":16")]
    source = ASTSource(
        fn,
        signature={x: kind.removesuffix(":16") for x, kind in kinds.items()},
        constexprs={x: _function(c) if isinstance(c, str) else c for x, c in variant.constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in multiples},
    )
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[arch]), options={**variant.options, **LAUNCH})
    assembly = compiled.asm["ptx" if TARGETS[arch][0] == "cuda" else "amdgcn"]
    if TARGETS[arch][0] == "cuda":
        registers = _number(r"Used (\d+) registers", log.getvalue())
        spill = _number(r"(\d+) bytes spill stores", log.getvalue())
    else:
        registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
        spill = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    instruction = next((x for x in INSTRUCTIONS if x in assembly), "-")
    shared, limit = compiled.metadata.shared, SHARED_MEMORY[arch]
    faults = []
    if spill > variant.spill_budget:
        faults.append("spills")
    if shared > limit:
        faults.append("shared memory")
    if variant.tensor_cores and instruction == "-":
        faults.append("no tensor cores")
    return {
        "kernel": f"{module.split('.')[1]}.{name}",
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
        "faults": faults,
    }


def _function(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern!r}")
    return int(found[1])


def table(archs: list[str]) -> list[dict[str, Any]]:
    """Compile everything for some architectures. Call it where TRITON_INTERPRET is not set."""
    work = [(arch, variant) for arch in archs for op in OPS for variant in op(arch)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_variant, *zip(*work, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_table", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    # The interpreter's functions do not compile, and a cached kernel would hide a fault of this compiler.
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        rows = table(arguments.arch)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print("kernel arch registers spilled shared/limit instruction | variant | config")
    for row in rows:
        config = " ".join(f"{key}={value}" for key, value in row["config"].items())
        print(
            f"{row['kernel']:25} {row['arch']:7} {row['registers']:3} {row['spill_bytes']:5} "
            f"{row['shared_bytes']:6}/{row['shared_limit']} {row['instruction']:15} | {row['variant']} | {config}"
        )
    faulty = [row for row in rows if row["faults"]]
    for row in faulty:
        print(f"FAULT: {row['kernel']} {row['arch']} {row['variant']} {row['config']}: {', '.join(row['faults'])}")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
