"""Commands in processes of their own, without the seconds that importing takes: forks of one that has imported all."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess as Process
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import TCPStore


def start(
    module: str,
    argv: list[str],
    output: Path | Connection,
    first: Callable[[], object] | None = None,
    **environment: str,
) -> Process:
    """``python -m module`` with ``argv``, after a call of ``first``; what it prints goes to ``output``."""
    fork = multiprocessing.get_context("forkserver")
    process = fork.Process(target=_run, args=(module, argv, output, first, environment))
    process.start()
    return process


@contextmanager
def several(
    module: str, argv: list[str], folder: Path, count: int = 2, **environment: str
) -> Iterator[list[tuple[Process, Path]]]:
    """The same as a launcher starts it on ``count`` processes, and what each prints; killed at the end if they run."""
    # The launcher keeps the store by which they meet, so that none takes it along when it leaves.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    outputs = [folder / f"printed by {rank}" for rank in range(count)]
    processes = [
        start(module, argv, output, **environment, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, output in enumerate(outputs)
    ]
    try:
        yield list(zip(processes, outputs, strict=True))
    finally:
        for process in processes:
            process.kill()


def run_all(module: str, argv: list[str], folder: Path, count: int = 2, **environment: str) -> list[str]:
    """``count`` processes to their end, which is to be a good one: what each printed."""
    with several(module, argv, folder, count, **environment) as processes:
        for process, output in processes:
            process.join(600)
            assert process.exitcode == 0, output.read_text()[-3000:]
    return [output.read_text() for _, output in processes]


def _run(
    module: str,
    argv: list[str],
    output: Path | Connection,
    first: Callable[[], object] | None,
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)
    if isinstance(output, Connection):
        file = output.fileno()
    else:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    if isinstance(output, Connection):
        output.close()  # so that whoever reads sees the end with this process
    torch.set_num_threads(1)
    sys.argv = [module, *argv]
    if first is not None:
        first()
    runpy.run_module(module, run_name="__main__")


def _worker(rank: int, case: Callable[[int], None], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(f"{folder}/rendezvous", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    case(rank)
    # Not a barrier: a process that leaves it first closes connections on which the other may still be in it.
    store.set(f"done {rank}", "")
    store.wait(["done 0", "done 1"])
    dist.destroy_process_group()


def in_two_processes(case: Callable[[int], None], folder: Path) -> None:
    """Call a function of a test module with each rank, in two processes that form a group."""
    mp.start_processes(_worker, (case, str(folder)), nprocs=2, start_method="forkserver")
