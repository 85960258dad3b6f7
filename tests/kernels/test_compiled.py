"""Every kernel compiles for a GPU of each vendor as `python -m benchmarks.compile_table` wants it, without a GPU.

In each shipped configuration for one architecture, and in one for the other; that command does all dtypes and variants,
in minutes.
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

from benchmarks import compile_table

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "dopsd_kernels"
WHOLE, SAMPLED = "sm_90", "gfx942"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


PROGRAM = f"""
import sys
from benchmarks import compile_table

everything = compile_table.work

def work(arch):
    calls = everything(arch)
    if arch == {SAMPLED!r}:
        return list({{call[1]: call for call in calls}}.values())  # one an entry
    if arch == {WHOLE!r}:
        return list({{(call[1], str(call[2])): call for call in calls}}.values())  # one a configuration
    if arch == "sm_80":
        _, entry, config, label = calls[0]
        return [(arch, entry, {{**config, **more}}, label) for more in ({{}}, {{"num_stages": 20}}, {{"BLOCK_N": 256}})]
    return calls

compile_table.work = work
sys.exit(compile_table.main())
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """The table, and what the command printed."""
    path = tmp_path_factory.mktemp("compiled") / "table.json"
    # In a process of its own: what the interpreter has taken over does not compile.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-c", PROGRAM, "--arch", WHOLE, SAMPLED, "sm_80", "--json", str(path)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr[-4000:]  # some are faulty
    assert "Warning" not in done.stderr, done.stderr  # a user would see it at the first launch
    return json.loads(path.read_text()), done.stdout


@pytest.fixture
def table(done: tuple[list[dict[str, Any]], str]) -> list[dict[str, Any]]:
    """The rows of what ships."""
    return [row for row in done[0] if row["arch"] in (WHOLE, SAMPLED)]


def launched() -> set[str]:
    """Kernels that any launcher calls with a grid: kernel[grid](...)."""
    return {
        f"{path.parent.name}.{call.func.value.id}"
        for path in KERNELS.glob("*/kernels.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name)
    }


def test_every_kernel_is_compiled(table: list[dict[str, Any]]) -> None:
    kernels = launched()
    assert {"confidence._confidence", "step_kl._row_sums"} <= kernels
    assert {(row["kernel"], row["arch"]) for row in table} == {
        (name, arch) for name in kernels for arch in (WHOLE, SAMPLED)
    }


def test_every_shipped_configuration_is_compiled(table: list[dict[str, Any]]) -> None:
    compiled = [row["config"] for row in table if row["arch"] == WHOLE]
    for entries in json.loads((KERNELS / "common" / "configs.json").read_text()).values():
        assert {arch for entry in entries for arch in entry["arch"]} > {WHOLE, SAMPLED, "sm_80", "sm_100", "sm_120"}
        assert all(entry["config"] in compiled for entry in entries if WHOLE in entry["arch"])


def test_no_row_is_at_fault(table: list[dict[str, Any]]) -> None:
    for row in table:
        assert not row["faults"]
        assert row["registers"] > 0 and 0 <= row["shared_bytes"] <= row["shared_limit"]
        assert row["spill_bytes"] <= row["spill_budget"] <= 832 + 64
        assert row["instruction"] != "-" or not row["tensor_cores"]
        if row["kernel"] in ("confidence._confidence", "step_kl._hidden_gradient"):
            assert row["tensor_cores"] == (row["variant"].split(",")[0] in ("bf16", "fp16", "bf16 x bf16"))


def test_what_is_wrong_is_found(done: tuple[list[dict[str, Any]], str]) -> None:
    rows, printed = done
    assert printed.count("FAULT: ") == 2
    good, large, spilling = (
        row for row in rows if row["arch"] == "sm_80" and row["kernel"] == "confidence._confidence"
    )
    assert not good["faults"] and "shared memory" in large["faults"] and "spills" in spilling["faults"]
    assert compile_table.faults({**good, "instruction": "-"}) == ["no tensor cores"]
