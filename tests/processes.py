"""Commands in processes of their own, without the seconds that importing takes: forks of one that has imported all."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["dopsd.train", "dopsd.evaluate"])


def start(module: str, argv: list[str], output: Path, **environment: str) -> ForkServerProcess:
    """``python -m module`` with ``argv``; what it prints goes to the file ``output``."""
    process = SERVER.Process(target=_run, args=(module, argv, str(output), environment))
    process.start()
    return process


def _run(module: str, argv: list[str], output: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(1)
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__")
