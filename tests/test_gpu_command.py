"""``python -m benchmarks.gpu``: every line of it in a rehearsal, and what may go wrong on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, outcomes, report, results
from benchmarks.results import Recorder, Row


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children see the tests' own environment; nothing of it may be needed."""
    for name in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)


def call(command: list[str], path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=results.ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the command itself can be run")
def test_a_rehearsal_runs_with_little_installed_and_is_never_shown(
    tmp_path: Path, own_environment: None, bare_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the parts those that measure every op and the step; `python -m benchmarks.gpu --rehearse` runs all."""
    out, parts = tmp_path / "out", ("step", "peers")
    done = call([*gpu.COMMAND, "--rehearse", "--out", str(out), "--minutes", "10", "--only", *parts], bare_path)
    assert done.returncode == 0, done.stdout + done.stderr
    missing = done.stdout.partition("Not run:")[2]
    assert "liger chunked" in missing and "trl" in missing
    assert {path.name for path in out.glob("*.txt")} == {f"{name}.txt" for name in parts}
    (path,) = out.glob("*.json")
    content = json.loads(path.read_text())
    measured = {"kernels", "attention", "layer", "step"}
    assert content["rehearsal"] and {row["part"] for row in content["rows"]} == measured
    assert not [row for row in content["rows"] if row["status"].startswith(("failed", "out of"))]
    for part in ("kernels", "attention", "step"):
        rows = [row for row in content["rows"] if row["part"] == part and "flops" in row]
        assert rows and all(row["of_ceiling"] > 0 for row in rows)

    monkeypatch.setattr(report, "FOLDER", out)
    for argv in (["--against", str(path), str(path)], ["--check"], []):
        with pytest.raises(ValueError, match=rf"{path.name} is a rehearsal"):
            report.main(argv)


STAND_IN = """
import os, signal, sys
import torch
from benchmarks import gpu, ops

def lose(case, *tensors):
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

def die(case, *tensors):
    os.kill(os.getpid(), signal.SIGKILL)

chosen = [ops.Case("step_kl", "both", setting, 4, 16, 50) for setting in ("reverse_kl", "clipped", "forward_kl")]
providers = ops.OPS["step_kl"].providers
providers["loses"] = ops.Provider(lose, takes=lambda case: case.setting == "reverse_kl")
providers["dies"] = ops.Provider(die, takes=lambda case: case.setting == "clipped")
gpu.cases = lambda *_: chosen
gpu.COMMAND = [sys.executable, __file__]
gpu.PARTS = {"loss": (1, gpu._ops("step_kl", among=lambda name: name in ("loses", "dies", "eager")))}
sys.exit(gpu.main())
"""


def test_what_ends_a_process_costs_its_own_rows(tmp_path: Path, own_environment: None) -> None:
    """A provider that loses the GPU is named, and its case measured without it; of a case that kills the process that
    is known; the others are measured."""
    script, out = tmp_path / "stand_in.py", tmp_path / "out"
    script.write_text(STAND_IN)
    done = call([sys.executable, str(script), "--rehearse", "--out", str(out), "--minutes", "5"], str(results.ROOT))
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("+ ") == 3 and "The GPU is lost: failed: AcceleratorError" in done.stdout
    (path,) = out.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    found = {(row["setting"], row["provider"]): row["status"].split(":")[:2] for row in rows}
    assert found == {
        ("reverse_kl", "loses"): ["failed", " AcceleratorError"],
        **{("clipped", name): ["failed", " the process ended in it"] for name in ("floor", "dies", "eager")},
        **{(setting, name): ["ok"] for setting in ("reverse_kl", "forward_kl") for name in ("floor", "eager")},
    }


SLEEP = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Whether there is such a process, that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes under Linux")
def test_a_part_out_of_time_is_interrupted_and_nothing_that_it_started_outlives_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert gpu.run([sys.executable, "-c", SLEEP], log, 2.0) == "out of time"
    lines = log.read_text().splitlines()
    assert lines[-1] == "KeyboardInterrupt"
    started = [int(pid) for pid in lines[0].split()]
    deadline = time.monotonic() + 10  # a process that is killed takes a moment to end
    while any(map(alive, started)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(started) == 2 and not any(map(alive, started))
    assert gpu.run([sys.executable, "-c", "print(1)"], log, 30.0) == 0


TESTS = """
import pytest
def test_passes(): pass
def test_fails(): assert 1 == 2
@pytest.mark.skip(reason='no')
def test_skipped(): pass
def test_before(): assert False
def test_loses(): raise RuntimeError('CUDA error: illegal memory access')
def test_after(): pass
"""
RUN_TESTS = """
import sys, pytest
from benchmarks import outcomes

class Watch:
    item = ""
    def pytest_runtest_setup(self, item):
        Watch.item = item.name

outcomes.unusable = lambda: "loses" in Watch.item
sys.exit(pytest.main(sys.argv[1:], plugins=[outcomes, Watch()]))
"""


def test_every_tests_outcome_is_written_and_a_lost_gpu_costs_one_test(tmp_path: Path) -> None:
    """What passes, fails, is skipped, or has no time left, each as a row; what is known is not run again."""
    tests, script, path = tmp_path / "test_some.py", tmp_path / "run_tests.py", tmp_path / "run.json"
    tests.write_text(TESTS)
    script.write_text(RUN_TESTS)
    Recorder(path).add([{"part": "tests", "name": "test_some.py::test_before", "status": "ok", "seconds": 0.0}])

    def run(*more: str) -> tuple[int, dict[str, str]]:
        options = ["-q", "-p", "no:cacheprovider", f"--outcomes={path}", f"--rootdir={tmp_path}", str(tests), *more]
        done = call([sys.executable, str(script), *options], str(results.ROOT))
        assert done.returncode in (0, 5, 75), done.stdout + done.stderr
        rows = json.loads(path.read_text())["rows"]
        return done.returncode, {row["name"].partition("::")[2]: row["status"] for row in rows}

    status, found = run()
    assert status == 75 and "test_after" not in found and found.pop("test_fails").startswith("failed: ")
    assert "illegal memory access" in found.pop("test_loses")
    assert found == {"test_passes": "ok", "test_skipped": "skipped: no", "test_before": "ok"}
    status, later = run(f"--until={time.time()}")
    assert status == 0 and later["test_after"] == outcomes.OUT_OF_TIME and len(later) == 6


def test_training_is_judged_by_two_standard_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the difference to the mean of the recorded runs, of which there may be none."""
    old = {"scores": {gpu.TWO: "10" * 50}}
    error = float(gpu.grades(old, gpu.TWO).std()) / 100 / 10
    run = {"accuracy_before": 0.5, "standard_error_before": 0.1, "standard_error_after": error, "seconds": 1}
    run_process = subprocess.run

    def train(outcome: Row | Exception, recorded: list[Row]) -> tuple[bool, Row]:
        def ran(command: Sequence[str], **options: Any) -> Any:
            if "dopsd.train" not in command:  # what the machine is
                return run_process(command, **options)
            if isinstance(outcome, Exception):
                raise outcome
            folder = Path(command[command.index("--output_dir") + 1])
            folder.mkdir()
            (folder / "report.json").write_text(json.dumps(outcome))
            return None

        monkeypatch.setattr(gpu.subprocess, "run", ran)
        monkeypatch.setattr(gpu, "recipe_runs", lambda: recorded)
        recorder = Recorder(None)
        return gpu.train(recorder, float("inf"), False), recorder.rows[0]

    two = 2 * (2 * error**2) ** 0.5
    for off, fine in ((0.99 * two, True), (-0.99 * two, True), (1.01 * two, False), (-1.01 * two, False)):
        passed, row = train({**run, "accuracy_after": 0.5 + off}, [old, old])
        assert passed is row["agrees"] is fine
    passed, row = train({**run, "accuracy_after": 0.9}, [])
    assert passed and row["agrees"] is None
    for failure, status, fine in (
        (subprocess.TimeoutExpired("a", 1), "out of time", True),
        (subprocess.CalledProcessError(3, "a"), "failed: dopsd.train ended with 3", False),
    ):
        passed, row = train(failure, [])
        assert passed is fine and row["status"] == status
