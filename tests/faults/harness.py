"""Commands in processes of their own with a fault in them, and what is right about how they end."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import os
import random
import resource
import select
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from processes import start

from dopsd import checkpoints

# Processes are started and waited for by several threads, and multiprocessing's list of them is not made for that.
LOCK = threading.Lock()
PAGE = resource.getpagesize()
TIMES = ("rollout_seconds", "learn_seconds")
RESUME = ("--resume_from_checkpoint", "true")


class Wrong(Exception):
    """A fault was not survived; the sentence says what was wrong."""


def require(condition: object, said: str) -> None:
    if not condition:
        raise Wrong(said)


class Case(NamedTuple):
    """One fault: its name, and what lays it in an empty folder and raises Wrong unless it is survived."""

    name: str
    run: Callable[[Path], None]


# ---- faults ----


@dataclass(frozen=True)
class Fault:
    """What happens to a process at one of its operations on files below a folder: the creating, writing, syncing,
    renaming and removing of them, numbered in their order.

    ``watch``: nothing; each is written down in the file ``trace``.
    ``kill``: SIGKILL ahead of the operation.
    ``tear``: from there on the first file that grows beyond ``size`` bytes ends there, and with it the process.
    ``full``: from there on nothing can be created, renamed, synced or written. The kernel refuses what is written
    (RLIMIT_FSIZE), so that libraries in C++ and Rust meet that as well.
    """

    kind: Literal["watch", "kill", "tear", "full"]
    folder: Path
    at: int = 0
    size: int = 0
    trace: Path = Path(os.devnull)

    def __call__(self) -> None:
        """Lay it in this process."""
        import sys

        import safetensors.torch

        numbers = itertools.count()
        struck = False
        trace = os.open(self.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def operation(name: str, path: str, refused: bool) -> None:
            """Count it if it is below the folder, and let the fault happen; ``refused``: by a full disk."""
            nonlocal struck
            if path != str(self.folder) and not path.startswith(f"{self.folder}{os.sep}"):
                return
            struck |= next(numbers) == self.at
            if self.kind == "watch":
                os.write(trace, f"{name} {path}\n".encode())
            elif struck and self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif struck:
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))
                if self.kind == "tear":
                    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores
                elif refused:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                path, _, flags = arguments
                if isinstance(path, str) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    operation(event, os.path.abspath(path), refused=False)
            elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
                path = os.fspath(arguments[event == "os.rename"])
                if arguments[-1] > 0:  # a name in an open folder
                    path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), path)
                operation(event, os.path.abspath(path), refused=event in ("os.mkdir", "os.rename"))

        def counted(function: Callable[..., Any], path_of: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                path = path_of(*args, **kwargs)
                if isinstance(path, str | Path):
                    operation(function.__name__, os.path.abspath(path), refused=function is sync)
                return function(*args, **kwargs)

            return call

        sync = os.fsync
        os.fsync = counted(sync, lambda file: os.readlink(f"/proc/self/fd/{file}"))
        # These two write without Python's knowledge.
        torch.save = counted(torch.save, lambda content, path, *_, **__: path)
        safetensors.torch.serialize_file = counted(
            safetensors.torch.serialize_file, lambda tensors, path, *_, **__: path
        )
        sys.addaudithook(audit)


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    printed: str
    seconds: float
    busy: float  # seconds of a processor, which other processes do not add to
    memory: int  # bytes beyond what it began with, at most

    @property
    def error(self) -> str:
        """The one sentence with which it ended, which is no traceback and not unexpected."""
        tail = self.printed[-600:]
        require(self.status in (1, 2), f"status {self.status}: {tail}")
        require("Traceback" not in self.printed, f"a traceback: {tail}")
        sentences = [line for line in self.printed.splitlines() if line.startswith("error: ")]
        require(len(sentences) == 1, f"{len(sentences)} errors: {tail}")
        require("(unexpected;" not in sentences[0], f"unexpected: {tail}")
        return sentences[0]


def run(
    module: str,
    *argv: object,
    fault: Callable[[], object] | None = None,
    kill_after: float | None = None,
    limit: float = 300.0,
) -> Ended:
    """``python -m module`` to its end, or until it is killed."""
    reader, writer = Pipe(duplex=False)
    begin = time.monotonic()
    with LOCK:
        process = start(module, [str(word) for word in argv], writer, fault, COLUMNS="200", OMP_NUM_THREADS="1")
    writer.close()
    printed, killed = b"", False
    first = most = used(process.pid)
    deadline = begin + (limit if kill_after is None else kill_after)
    while True:
        if select.select([reader], [], [], 0.02)[0]:
            part = os.read(reader.fileno(), 1 << 16)
            if not part:
                break
            printed += part
        now = used(process.pid)
        most = max(most[0], now[0]), max(most[1], now[1])
        if not killed and time.monotonic() > deadline:
            process.kill()
            killed = True
    seconds = time.monotonic() - begin
    with LOCK:
        process.join()
    reader.close()
    text = printed.decode(errors="replace")
    if killed and kill_after is None:
        text += f"\nkilled after {limit:g} seconds"
    return Ended(int(process.exitcode or 0), text, seconds, most[0], max(0, most[1] - first[1]))


def used(process: int | None) -> tuple[float, int]:
    """Seconds of a processor and the most memory, in bytes, that a process has had so far; zeros if there is none."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        ticks = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0
    memory = next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), memory


# ---- commands, and what they leave ----


def make_model(folder: Path) -> None:
    """A small random checkpoint with the character tokenizer."""
    from dopsd.assets.pretrain import character_tokenizer
    from dopsd.models.llada import LLaDAConfig, LLaDAModelLM

    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"vocab_size": len(tokenizer), "d_model": 16, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 24}
    LLaDAModelLM(
        LLaDAConfig(**sizes, **ids, max_sequence_length=128, init_std=0.3, weight_tying=False)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def reseal(checkpoint: Path) -> None:
    """Have a checkpoint's manifest be right about what is there now."""
    (checkpoint / checkpoints.MANIFEST).unlink()
    checkpoints.seal(checkpoint)


def words(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


class Bench:
    """A folder with what cases start from: a model, and runs that nothing happened to."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.model = folder / "model"
        make_model(self.model)
        run("dopsd.train", "--help")  # so that no process whose time counts is the first
        self.made: dict[str, Any] = {}

    def random(self, row: str) -> random.Random:
        return random.Random(f"{self.seed} {row}")

    def train(self, output: Path) -> list[str]:
        """A run of three updates, each of them evaluated and saved, of which the best is kept."""
        options: dict[str, Any] = {"recipe": "tiny", "model": self.model, "correct_only": "false", "report_to": "none"}
        options |= {"max_steps": 3, "save_steps": 1, "save_total_limit": 2, "bf16": "false", "disable_tqdm": "true"}
        options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": "true", "lora_r": 2}
        options |= {"per_device_train_batch_size": 2, "train_problems": 4, "validation_problems": 2, "pass_k": 2}
        options |= {"eval_problems": 2, "gen_length": 16, "block_length": 8, "steps": 4, "output_dir": output}
        return words(options)

    def evaluate(self, output: Path) -> list[str]:
        """Two tries at each of six problems and a share revealed, two problems at a time."""
        options = {"model": self.model, "eval_problems": 6, "gen_length": 16, "block_length": 8, "tokens_per_step": 4}
        return words({**options, "sequences_per_forward": 2, "pass_k": 2, "reveal": 0.5, "output": output})

    def whole(self, module: str) -> tuple[Any, list[str], float]:
        """What a run leaves that nothing happens to, its operations on files, and its seconds."""
        if module not in self.made:
            folder = self.folder / module
            folder.mkdir()
            argv, outcome = self.command(module, folder)
            trace = self.folder / f"{module}.trace"
            ended = run(module, *argv, fault=Fault("watch", folder, trace=trace))
            assert ended.status == 0, ended.printed
            self.made[module] = outcome(), trace.read_text().splitlines(), ended.seconds
        return self.made[module]

    def two_checkpoints(self) -> Path:
        """A folder with a run that was killed when it began its third checkpoint, and was moved since."""
        begun, moved = self.folder / "begun", self.folder / "two checkpoints"
        if not moved.exists():
            trace = self.whole("dopsd.train")[1]
            at = next(number for number, line in enumerate(trace) if "checkpoint-3" in line)
            run("dopsd.train", *self.train(begun / "run"), fault=Fault("kill", begun, at=at))
            begun.rename(moved)
        return moved

    def command(self, module: str, folder: Path) -> tuple[list[str], Callable[[], Any]]:
        """The command line of a run in ``folder``, and what reads its outcome."""
        if module == "dopsd.train":
            return self.train(folder / "run"), lambda: trained(folder / "run")
        return self.evaluate(folder / "result.json"), lambda: evaluated(folder / "result.json")

    def go_on(self, module: str, folder: Path) -> Ended:
        """The same command once more, undisturbed: it must end as a run that nothing happened to."""
        argv, outcome = self.command(module, folder)
        resumed = module == "dopsd.train" and (folder / "run" / "run.json").exists()
        ended = run(module, *argv, *(RESUME if resumed else ()))
        if module == "dopsd.evaluate" and ended.status == 2 and "it exists; --overwrite" in ended.error:
            ended = ended._replace(status=0)  # killed when all was written
        require(ended.status == 0, f"going on ends with status {ended.status}: {ended.printed[-600:]}")
        expected, found = self.whole(module)[0], outcome()
        differing = [name for name in expected if expected[name] != found.get(name)]
        require(not differing, f"other than undisturbed: {', '.join(differing)}; {ended.printed[-600:]}")
        return ended


def trained(folder: Path) -> dict[str, Any]:
    """What a finished run leaves, but for times and places."""
    names = ("adapter_model.safetensors", "adapter_config.json", "held_out_before.json", "held_out_after.json")
    with (folder / "metrics.csv").open(newline="") as file:
        log = [{name: row[name] for name in row if name not in TIMES} for row in csv.DictReader(file)]
    report = json.loads((folder / "report.json").read_text())
    report["best_checkpoint"] = Path(report["best_checkpoint"] or "").name
    for name in ("output_dir", "logging_dir", "resume_from_checkpoint"):
        report["config"]["training"].pop(name, None)
    del report["seconds"]
    pictures = [(folder / name).read_bytes()[-8:] for name in ("curves.png", "trajectory.png")]
    left = {name: (folder / name).read_bytes() for name in names}
    parts = [path.name for path in folder.rglob("*.part")]
    return {**left, "metrics.csv": log, "report.json": report, "pictures": pictures, "parts": parts}


def evaluated(path: Path) -> dict[str, Any]:
    """What a finished evaluation leaves, but for times and places."""
    found = json.loads(path.read_text())
    for one in found["results"]:
        del one["seconds"]
    del found["config"]["evaluation"]["output"]
    return {**found, "page": path.with_suffix(".md").read_text(), "files": len(list(path.parent.iterdir()))}
