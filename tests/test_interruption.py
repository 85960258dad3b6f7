"""Ctrl-C and SIGTERM: the update under way ends and is saved, a second one stops at once, and nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from processes import start

from dopsd import checkpoints, run
from dopsd.errors import Interrupted
from dopsd.interruption import Interruption
from dopsd.trainer import Trainer

# A task that says when it grades, and where SLOW is set takes its time over that.
TASK = """
import os
import time
from pathlib import Path

from dopsd.tasks.sudoku import Sudoku


class Slow(Sudoku):
    def score(self, row, response):
        with Path(os.environ["GRADED"]).open("a") as file:
            file.write("x")
        if Path(os.environ["GRADED"]).stat().st_size > int(os.environ["SLOW"]):
            time.sleep(1000)
        return 1.0
"""


def wait_for(process: ForkServerProcess, printed: Path, there: Callable[[], bool]) -> None:
    """Until something is there that a process makes."""
    deadline = time.monotonic() + 300
    while not there():
        assert process.is_alive() and time.monotonic() < deadline, printed.read_text()
        time.sleep(0.005)


def ended(process: ForkServerProcess) -> int | None:
    process.join(300)
    process.kill()
    return process.exitcode


def last_line(printed: Path) -> str:
    return printed.read_text().strip().splitlines()[-1]


def test_an_interrupted_run_loses_nothing(
    small_run: list[str], random_model: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    """SIGTERM in an early update of many: that is saved though no checkpoint was due, the status is 143, one line says
    how to go on, and what goes on ends with the bits of a run that was left alone."""
    whole, stopped, printed = tmp_path / "whole", tmp_path / "stopped", tmp_path / "printed"
    argv = [*small_run, "--model", str(random_model), "--correct_only", "false", "--max_steps", "12"]
    argv += ["--eval_strategy", "epoch", "--output_dir"]  # of 8 updates
    process = start("dopsd.train", [*argv, str(stopped)], printed)
    wait_for(process, printed, (stopped / "metrics.csv").is_file)
    os.kill(process.pid or 0, signal.SIGTERM)
    assert ended(process) == 128 + signal.SIGTERM, printed.read_text()
    (checkpoint,) = checkpoints.folders(stopped)
    update = checkpoints.number(checkpoint)
    assert 1 <= update < 12 and checkpoints.newest(stopped) == checkpoint
    assert last_line(printed) == (
        f"stopped by SIGTERM behind update {update} of 12; the same command with --resume_from_checkpoint true goes on"
    )
    assert command(run.main, *argv, str(whole))[0] == 0
    assert command(run.main, *argv, str(stopped), "--resume_from_checkpoint", "true")[0] == 0
    for name in ("adapter_model.safetensors", "held_out_after.json"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    rows = [len((folder / "metrics.csv").read_text().splitlines()) for folder in (whole, stopped)]
    assert rows[0] == rows[1]


def test_a_second_signal_stops_at_once_and_a_dead_process_has_no_folder(
    small_run: list[str],
    random_model: Path,
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An update that would take hours: the first signal is answered, the second ends it with its status. Until then
    the folder is the process's, which is named to the next; then it is free."""
    (tmp_path / "slow.py").write_text(TASK)
    graded, printed, output = tmp_path / "graded", tmp_path / "printed", tmp_path / "run"
    argv = [*small_run, "--model", str(random_model), "--task", f"{tmp_path / 'slow.py'}:Slow", "--max_steps", "1"]
    argv += ["--output_dir", str(output)]
    process = start("dopsd.train", argv, printed, GRADED=str(graded), SLOW="8")  # 4 at 2 rates come before training
    wait_for(process, printed, lambda: graded.is_file() and graded.stat().st_size > 8)
    status, _, err = command(run.main, *argv, "--resume_from_checkpoint", "true")
    assert status == 1 and f"output_dir='{output}' is in use by process {process.pid} on " in err
    os.kill(process.pid or 0, signal.SIGINT)
    wait_for(process, printed, lambda: "once more stops at once" in printed.read_text())
    time.sleep(0.2)
    assert process.is_alive()
    os.kill(process.pid or 0, signal.SIGINT)
    assert ended(process) == 128 + signal.SIGINT
    assert "SIGINT: the update under way ends" in last_line(printed)
    monkeypatch.setenv("GRADED", str(graded))
    monkeypatch.setenv("SLOW", "1000")
    assert command(run.main, *argv, "--resume_from_checkpoint", "true")[0] == 0


@pytest.mark.parametrize("moment", ["evaluate", "save_adapter"])
def test_a_signal_before_or_after_training_stops_there(
    moment: str,
    command: Callable[..., tuple[int, str, str]],
    small_run: list[str],
    random_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the first evaluation, and behind the last update: at once, with the same line; the caller's handlers are back
    in their place."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    name = "decode_rows" if moment == "evaluate" else moment
    monkeypatch.setattr(Trainer, name, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    argv = [*small_run, "--model", str(random_model), "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    argv += ["--eval_strategy", "no"]
    if moment != "evaluate":
        monkeypatch.setattr("dopsd.report.held_out", lambda *_: {})
    status, _, err = command(run.main, *argv)
    assert status == 143 and err.strip().splitlines()[-1] == (
        "stopped by SIGTERM; the same command with --resume_from_checkpoint true goes on"
    )
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert (tmp_path / "run" / "checkpoint-1" / "manifest.json").is_file() == (moment != "evaluate")


def test_nothing_is_said_to_go_on_that_has_not_begun() -> None:
    """A signal while a model is loaded."""
    said = "SIGINT; nothing was written: the same command starts again"
    with pytest.raises(Interrupted, match=said) as raised, Interruption():
        os.kill(os.getpid(), signal.SIGINT)
    assert raised.value.status == 130
