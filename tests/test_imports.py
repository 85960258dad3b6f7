"""What importing and running needs, and what it does not: Triton, transformers for the ops, the network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dopsd_kernels

ROOT = Path(dopsd_kernels.__file__).parents[1]


def python(program: str, *argv: str) -> str:
    """Standard output of a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


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
from dopsd import train

train.main(sys.argv[1:])
assert not tried, tried
print("done")
"""
    output = tmp_path / "run"
    argv = [*small_run, "--max_steps", "1", "--steps", "6", "--eval_problems", "1", "--output_dir", str(output)]
    assert python(program, *argv).endswith("done\n")
    assert (output / "report.json").is_file()
