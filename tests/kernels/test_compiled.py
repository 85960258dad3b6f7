"""Every kernel compiles for a GPU of each vendor as `python -m benchmarks.compile_table` wants it, without a GPU.

That command does the same for all architectures, in minutes.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "dopsd_kernels" / "triton"
ARCHITECTURES = {"sm_90", "gfx942"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own: what the interpreter has taken over does not compile.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("compiled") / "table.json"
    done = run("-m", "benchmarks.compile_table", "--arch", *ARCHITECTURES, "--json", str(path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "Warning" not in done.stderr, done.stderr  # a user would see it at the first launch
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def launched() -> set[str]:
    """Kernels that any launcher calls with a grid: kernel[grid](...)."""
    return {
        f"{path.stem}.{call.func.value.id}"
        for path in KERNELS.glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name)
    }


def test_every_kernel_is_compiled(table: list[dict[str, Any]]) -> None:
    kernels = launched()
    assert {"confidence._confidence", "step_kl._row_sums"} <= kernels
    assert {(row["kernel"], row["arch"]) for row in table} == {
        (name, arch) for name in kernels for arch in ARCHITECTURES
    }


def test_every_shipped_configuration_is_compiled(table: list[dict[str, Any]]) -> None:
    compiled = [(row["arch"], row["config"]) for row in table]
    for entries in json.loads((KERNELS / "configs.json").read_text()).values():
        assert {arch for entry in entries for arch in entry["arch"]} > {*ARCHITECTURES, "sm_80", "sm_100", "sm_120"}
        for entry in entries:
            for arch in ARCHITECTURES.intersection(entry["arch"]):
                assert (arch, entry["config"]) in compiled


def test_no_row_is_at_fault(table: list[dict[str, Any]]) -> None:
    for row in table:
        assert not row["faults"]
        assert row["registers"] > 0 and 0 <= row["shared_bytes"] <= row["shared_limit"]
        assert row["spill_bytes"] <= row["spill_budget"] <= 832
        assert row["instruction"] != "-" or not row["tensor_cores"]
        if row["kernel"] in ("confidence._confidence", "step_kl._hidden_gradient"):
            assert row["tensor_cores"] == (row["variant"].split(",")[0] in ("bf16", "fp16", "bf16 x bf16"))


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    script = f"""
import sys
from dataclasses import replace
from benchmarks import compile_table

def faulty(arch):
    good = next(variant for variant in compile_table.step_kl(arch) if variant.tensor_cores)
    yield good
    yield replace(good, constexprs={{**good.constexprs, "BLOCK_R": 32, "BLOCK_V": 512, "BLOCK_D": 256}})
    yield replace(good, signature={{**good.signature, "gradient": "*fp32", "weight": "*fp32"}})

compile_table.OPS = (faulty,)
sys.argv[1:] = ["--arch", "sm_80", "--json", {str(path)!r}]
sys.exit(compile_table.main())
"""
    done = run("-c", script)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("FAULT: ") == 2
    good, large, fp32 = (row["faults"] for row in json.loads(path.read_text()))
    assert not good and "shared memory" in large and {"no tensor cores", "spills"} <= set(fp32)
