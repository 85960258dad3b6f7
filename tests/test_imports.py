"""What imports what, and what importing and running needs and does not: Triton, transformers for the ops, the network,
optionals."""

from __future__ import annotations

import ast
import functools
import graphlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import dopsd_kernels

ROOT = Path(dopsd_kernels.__file__).parents[1]
LONGEST = 520  # lines of a module


def room_of(name: str) -> str:
    """The folder or file of a package that a module is in."""
    return ".".join(name.split(".")[:2])


# What the extra train brings and the ops do without; torch alone does without numpy too.
TRAIN = "transformers peft accelerate safetensors tokenizers yaml tqdm numpy huggingface_hub"


def start(*argv: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """What became of a fresh interpreter, with ``changes`` of its environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, *argv]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)


def python(program: str, *argv: str, **changes: str) -> str:
    """Standard output of a program in a fresh interpreter."""
    done = start("-c", program, *argv, **changes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@functools.cache
def modules() -> dict[str, Path]:
    """The file of each module of both packages."""
    files = [file for package in ("dopsd", "dopsd_kernels") for file in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


@functools.cache
def imported() -> dict[str, frozenset[str]]:
    """What each module's file imports, inside functions and for types alone too: modules of ours, or names of others'.

    That a package is imported along with what is in it is no import of the file's.
    """
    known = modules()
    found = {}
    for name, file in known.items():
        package = name if file.stem == "__init__" else name.rpartition(".")[0]
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
                source = ".".join(part for part in (base, node.module) if part)
                inner = {alias.name: f"{source}.{alias.name}" for alias in node.names}
                names |= {whole if whole in known else source for whole in inner.values()}
        found[name] = frozenset(names - {name})
    return found


def reached(start: str) -> set[str]:
    """All that a module imports, directly or not."""
    seen, left = set(), [start]
    while left:
        for name in imported().get(left.pop(), ()):
            if name not in seen:
                seen.add(name)
                left.append(name)
    return seen


@pytest.mark.parametrize("place", [str, room_of], ids=["files", "rooms"])
def test_no_import_leads_back(place: Callable[[str], str]) -> None:
    """No circle among files, nor among folders with the files beside them; not even for types."""
    graph: dict[str, set[str]] = {}
    for name, names in imported().items():
        graph.setdefault(place(name), set()).update(
            {place(other) for other in names & modules().keys()} - {place(name)}
        )
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names one


def test_what_a_package_knows_nothing_of() -> None:
    """The ops of the driver; evaluation of training, reports and pictures."""
    for name in modules():
        others = {other.partition(".")[0] for other in imported()[name]}
        if name.partition(".")[0] == "dopsd_kernels":
            assert "dopsd" not in others, name
        elif name == "dopsd.evaluate" or name.startswith("dopsd.evaluation"):
            assert not reached(name) & {"dopsd.trainer", "dopsd.train", "dopsd.report", "dopsd.plots"}, name
            assert not any(other.startswith("matplotlib") for other in reached(name)), name


def test_no_module_is_long() -> None:
    """What is longer is more than one thing."""
    assert not {name for name, file in modules().items() if len(file.read_text().splitlines()) > LONGEST}


def test_the_ops_need_torch_only() -> None:
    """Importing dopsd_kernels, and calling an op on the CPU, imports neither Triton nor transformers nor the driver."""
    program = """
import sys
import torch
before = set(sys.modules)
import dopsd_kernels
x = torch.randn(3, 8, requires_grad=True)
dopsd_kernels.fused_step_kl(x, torch.randn(3, 8), torch.randn(11, 8)).loss.backward()
dopsd_kernels.fused_confidence(x.detach(), torch.randn(11, 8))
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    loaded = python(program)
    assert "'dopsd_kernels'" in loaded
    for package in ("triton", "transformers", "peft", "accelerate", "datasets", "numpy", "'dopsd'"):
        assert package not in loaded


def test_the_ops_run_where_torch_alone_is_installed(bare_path: str) -> None:
    """Without all that the extra train brings an op computes, and what needs it says so in a line that names it."""
    bare = {"PYTHONPATH": bare_path, "ALSO_ABSENT": TRAIN}
    program = """
import torch
from dopsd_kernels import fused_step_kl, prefix_attention

x = torch.randn(3, 8, requires_grad=True)
fused_step_kl(x, torch.randn(3, 8), torch.randn(11, 8)).loss.backward()
print(float(x.grad.abs().sum()) > 0)
"""
    assert python(program, **bare).endswith("True\n")
    for module in ("train", "evaluate", "plan"):
        done = start("-m", f"dopsd.{module}", "--help", **bare)
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
        assert "dopsd needs transformers, peft, accelerate: pip install 'dopsd[train]'" in done.stderr


def test_a_run_needs_neither_network_nor_triton(small_run: list[str], tmp_path: Path) -> None:
    """With every connection refused and Triton not installed, the command with the shipped model trains an update."""
    program = """
import socket
import sys

tried = []


def refuse(self, address):
    tried.append(address)
    raise OSError("no network")


socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *args, **kwargs: refuse(None, args)
sys.modules["triton"] = None
try:
    import triton
except ImportError:
    pass
else:
    raise AssertionError
from dopsd import run

run.main(sys.argv[1:])
assert not tried, tried
print("done")
"""
    output = tmp_path / "run"
    argv = [*small_run, "--max_steps", "1", "--steps", "6", "--eval_problems", "1", "--output_dir", str(output)]
    assert python(program, *argv).endswith("done\n")
    assert (output / "report.json").is_file()


def test_what_is_not_installed_is_in_nobodys_way(bare_path: str, small_run: list[str], tmp_path: Path) -> None:
    """Without what ``without/sitecustomize.py`` lists, every module is imported, every GPU test is collected, and a
    run ends as usual: its report says which pictures are left out and why, and its tables are Markdown."""
    program = """
import importlib
import pkgutil
import sys
from importlib.util import find_spec

import pytest

assert "without" in sys.modules["sitecustomize"].__file__ and find_spec("datasets") is find_spec("rich") is None
collected = pytest.main(["-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", "tests"])
assert collected == 0, collected
for package in ("dopsd_kernels", "dopsd", "benchmarks"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
from dopsd import cli, run

try:
    run.main(["--help"])
except SystemExit as end:
    assert not end.code
cli.run(run.main)
"""
    output = tmp_path / "run"
    argv = [*small_run, "--max_steps", "1", "--steps", "6", "--eval_problems", "1", "--output_dir", str(output)]
    printed = python(program, *argv, PYTHONPATH=bare_path)
    assert "tests/test_memory.py::" in printed and "tests/kernels/test_step_kl_gpu.py::" in printed
    assert "--lora_targets" in printed  # the help
    assert (
        "curves.png and trajectory.png are left out: matplotlib is not installed: pip install 'dopsd[train]'" in printed
    )
    assert "| tokens per step | before | after | gain |" in printed
    report = json.loads((output / "report.json").read_text())
    assert list(report["left_out"]) == ["curves.png", "trajectory.png"]
    assert (output / "adapter_model.safetensors").is_file() and not list(output.glob("*.png"))
