"""A run's folder: one run at a time has it, a new run takes an empty one, and a run goes on only as it began."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from uuid import uuid4

from dopsd import checkpoints
from dopsd.checkpoints import ADAPTER_FILE, RUN_FILE
from dopsd.errors import RunError, require
from dopsd.files import plain, sha256, write_json, writing
from dopsd.recorded import run_options

log = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
REPORT_FILE = "report.json"
# What a run that was killed while it took the folder can have left.
CLAIM = {LOCK_FILE, f"{RUN_FILE}.part"}

# The prompts of a batch that a process adds.
SHARE = "per_device_train_batch_size"
# Options of training that may differ between a run and its continuation.
FREE = {"resume_from_checkpoint", "output_dir", "logging_dir", "disable_tqdm", "report_to", "run_name", "ddp_timeout"}
# How a batch is shared out, whose size may not differ.
FREE |= {"processes", SHARE, "fsdp", "ddp_backend"}
FREE |= {"push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision"}
FREE |= {"figure_width", "inspect_samples"}


class Start(NamedTuple):
    """Where a run begins."""

    checkpoint: str | None  # None: at the first update
    report: dict[str, Any] | None  # of a run that has finished: nothing is left to do


class RunFolder:
    """``output_dir``, which no other run can have until this one leaves it or dies; one process opens and claims it.

    Args:
        path: where.
        config: every option of the run, by group.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.config = path, config
        self.lock: int | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.lock is not None:
            os.close(self.lock)

    def open(self, resume: str | None) -> Start:
        """Whether the folder can be this run's, and where it begins; writes nothing to a folder that is none's yet.

        Raises:
            UsageError: the folder holds something else, or a run with other options.
            RunError: another process has it, or there is no complete checkpoint to go on from.
        """
        if resume is None or resume.lower() == "false":
            self.require_new()
            return Start(None, None)
        there = (self.path / RUN_FILE).is_file()
        require(there, "resume_from_checkpoint", resume, f"{self.path} holds no run to go on with")
        self.hold()
        run = checkpoints.run_id(self.path)
        before = run_options(self.path / RUN_FILE)
        if "training" in self.config and "training" in before:
            prompts, theirs = batch(self.config["training"]), batch(before["training"])
            hint = f"the run in {self.path} has batches of {theirs} prompts over all processes, and not of {prompts}"
            require(prompts == theirs, SHARE, self.config["training"][SHARE], hint)
        for group, options in before.items():
            for name, value in options.items() if group in self.config else ():
                if name not in FREE:
                    given = plain(self.config[group].get(name))
                    require(given == value, name, given, f"the run in {self.path} has {name}={value!r}")
        if resume.lower() != "true":
            why = checkpoints.fault(Path(resume), run)
            if why is not None:
                raise RunError(f"resume_from_checkpoint={resume!r} is no complete checkpoint of this run: {why}")
            return Start(resume, None)
        result = finished(self.path)
        if result is not None:
            return Start(None, result)
        checkpoint = checkpoints.newest(self.path)
        return Start(None if checkpoint is None else str(checkpoint), None)

    def claim(self) -> None:
        """Make the folder this run's, unless it is already.

        Raises:
            UsageError: it has become another's since it was opened.
            RunError: another process has it.
        """
        if self.lock is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self.hold()
            self.require_new()
            write_json(self.path / RUN_FILE, {"id": uuid4().hex, **self.config})

    def require_new(self) -> None:
        """Raise UsageError if the folder has anything in it that is not left by a claim that was cut short."""
        free = not self.path.exists() or (self.path.is_dir() and {one.name for one in self.path.iterdir()} <= CLAIM)
        hint = "an empty or new folder; a run in it goes on with --resume_from_checkpoint true"
        require(free, "output_dir", str(self.path), hint)

    def hold(self) -> None:
        """Take the lock, which ends with this process however that ends; RunError if another process has it."""
        descriptor = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise RunError(f"output_dir={str(self.path)!r} is in use by {holder}: wait for it, or stop it") from None
        except OSError as error:  # a file system without locks
            log.warning("%s can't be locked (%s): nothing keeps a second run out of it", self.path, error)
        self.lock = descriptor
        with writing(self.path / LOCK_FILE):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def batch(training: Mapping[str, Any]) -> int:
    """The prompts of a batch of all processes."""
    return int(training[SHARE]) * int(training.get("processes", 1))


def finished(output: Path) -> dict[str, Any] | None:
    """The report in ``output``, with which a run ends, if the adapter there is the one that it is about; else None."""
    try:
        result: dict[str, Any] = json.loads((output / REPORT_FILE).read_text())
        same = sha256(output / ADAPTER_FILE) == result["adapter_sha256"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return result if same else None
