"""The benchmarks compare like with like, and report what they measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, plots, providers, report, results, tune
from benchmarks.measure import Clock
from benchmarks.problems import Case, Problem, cases, make_problem
from benchmarks.providers import PROVIDERS, Provider, errors
from benchmarks.test_kernels import Run
from dopsd_kernels import products

CPU = torch.device("cpu")
TOLERANCE = 1e-3
SMALL = [
    Case("step_kl", 24, 64, 1000, torch.float32),
    Case("step_kl", 24, 64, 1000, torch.float32, "peaked"),
    Case("step_kl", 24, 64, 1000, torch.float32, clip=0.05),
    Case("confidence", 24, 64, 1000, torch.float32),
]


def by_label(op: str, label: str) -> Provider:
    return next(provider for provider in PROVIDERS[op] if provider.label == label)


# Every provider computes what ours does.


@pytest.mark.parametrize(
    ("case", "provider"),
    [
        pytest.param(case, provider, id=f"{case}-{provider.label}")
        for case in SMALL
        for provider in providers.providers(case)
        if provider.computes and provider.name in ("eager", "liger chunked", "trl", "ours torch")
    ],
)
def test_every_provider_computes_the_same(case: Case, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient are those of the fp64 reference, to the rounding of fp32 logits of size 10 to 30."""
    monkeypatch.setattr(providers, "no_compiler", lambda device: "compilation takes too long for a test")
    reason = provider.missing(CPU)
    if reason is not None:
        pytest.skip(f"{provider.label}: {reason}")
    error = errors(provider, make_problem(case, CPU))
    assert max(error.values()) < TOLERANCE, error


def test_an_error_would_show() -> None:
    """The reverse KL is not the clipped one, nor that from a teacher whose logits are off by 1 %."""
    problem, eager = make_problem(SMALL[0], CPU), by_label("step_kl", "eager")
    for other in (replace(problem, case=SMALL[2]), replace(problem, teacher=1.01 * problem.teacher)):

        def forward(_: Problem, other: Problem = other) -> Any:
            return eager.forward(other)

        error = errors(replace(eager, forward=forward), problem)
        assert min(error.values()) > TOLERANCE


@pytest.mark.parametrize(("op", "label"), [("step_kl", "floor"), ("step_kl", "eager"), ("confidence", "floor")])
def test_every_phase_runs(op: str, label: str) -> None:
    """The floor multiplies all rows, in chunks too; what happens between forward and backward happens once."""
    problem = make_problem(next(case for case in SMALL if case.op == op), CPU)
    marks: list[None] = []
    provider = by_label(op, label)
    providers.run(provider, problem, "forward")
    assert problem.student.grad is None
    if op == "step_kl":
        providers.run(provider, problem, "both", lambda: marks.append(None))
        assert len(marks) == 1


def test_the_floor_is_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk's logits are in the buffer, whose size is bounded."""
    problem = make_problem(SMALL[0], CPU)
    monkeypatch.setattr(providers, "_FLOOR_BYTES", 7 * 1000 * 4)  # 7 rows
    buffer = by_label("step_kl", "floor").forward(problem)
    assert buffer.shape == (7, 1000)
    last = (2 * 24) % 7
    torch.testing.assert_close(buffer[:last], problem.teacher[-last:] @ problem.weight.T)


def test_one_that_fails_does_not_end_the_others_case() -> None:
    """What became of it is its row; nothing is measured of it after that."""
    problem, eager = make_problem(SMALL[0], CPU), by_label("step_kl", "eager")
    for error, status in (
        (torch.OutOfMemoryError("too much"), "out of memory"),
        (RuntimeError("no"), "failed: RuntimeError: no"),
    ):
        calls: list[int] = []

        def forward(_: Problem, error: Exception = error, calls: list[int] = calls) -> None:
            calls.append(1)
            raise error

        run = Run(replace(eager, forward=forward), "both", problem, Clock(CPU))
        run.warm_up(lambda *_: 0)
        run.sample()
        assert len(calls) == 1 and [row["status"] for row in run.rows()] == [status]
    run = Run(eager, "both", problem, Clock(CPU))
    run.warm_up(lambda *_: 5)
    run.sample()
    both, backward = run.rows()
    assert (both["phase"], both["peak_bytes"]) == ("both", 5) and (backward["phase"], backward["rounds"]) == (
        "backward",
        1,
    )
    assert 0 < backward["ms"] < both["ms"]


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for label, package in (("trl", "trl"), ("liger chunked", "liger-kernel")):
        reason = by_label("step_kl", label).missing(CPU)
        assert reason == f"{package} is not installed: pip install {package}"
    assert "GPU" in str(by_label("step_kl", "liger").missing(CPU))


# The problems.


@pytest.mark.parametrize(("width", "vocab"), [(256, 16384), (1024, 4096)])
def test_peaked_rows_are_peaked_and_their_teacher_is_close(width: int, vocab: int) -> None:
    problem = make_problem(Case("step_kl", 200, width, vocab, torch.float32, "peaked"), CPU)
    with torch.no_grad():
        s, t = ((rows @ problem.weight.T).softmax(-1) for rows in (problem.student, problem.teacher))
    top = s.max(-1)
    assert 0.6 < (top.values > 0.9).float().mean() <= 1
    assert (t.argmax(-1) == top.indices).float().mean() > 0.95
    divergence = (s * (s / t).log()).sum(-1)
    assert 0 < divergence.median() < 0.05
    of_others = (s.topk(21).values[:, 1:].sum(-1) / (1 - top.values)).median()
    assert of_others > 0.8


def test_diffuse_rows_are_not() -> None:
    problem = make_problem(SMALL[0], CPU)
    assert ((problem.teacher @ problem.weight.T).softmax(-1).max(-1).values < 0.5).float().mean() > 0.5


def test_both_kinds_of_machine_have_every_kind_of_case() -> None:
    kinds = [{(case.setting, case.data) for case in cases(torch.device(name))} for name in ("cpu", "cuda")]
    assert kinds[0] == kinds[1] and len(kinds[0]) == 4


# Results, tables and figures.


def recorded(folder: Path) -> dict[str, Any]:
    """Rows with invented times, of everything that could run, were all peers there but one."""
    recorder = results.Recorder(folder / "run.json", CPU)
    for case in cases(CPU):
        rows = []
        for place, (provider, phase) in enumerate(providers.entries(case)):
            if provider.name == "liger":
                rows.append(results.describe(case, provider, phase, "out of memory"))
                continue
            described = results.describe(case, provider, phase, "ok")
            rows.append({**described, **results.figures([0.001 * (place + 1), 0.002, 0.5], 1 << 20)})
        results.compare(rows)
        recorder.add(rows)
    recorder.add(
        [{**results.describe(SMALL[1], by_label("step_kl", "eager"), "accuracy", "ok"), "gradient_error": 0.1}]
    )
    return results.load(folder / "run.json")


def test_results_say_what_was_measured_where(tmp_path: Path) -> None:
    written = recorded(tmp_path)
    assert {"device", "driver", "python", "versions", "date", "revision", "threads"} <= written["machine"].keys()
    assert written["machine"]["versions"]["torch"] == torch.__version__
    rows = written["rows"]
    timed = [row for row in rows if "ms" in row]
    assert timed
    for row in timed:
        assert row["ms_q20"] <= row["ms"] <= row["ms_q80"] and row["rounds"] == 3 and row["peak_bytes"] == 1 << 20
        floor = next(
            other
            for other in timed
            if other["provider"] == "floor"
            and all(other[name] == row[name] for name in ("setting", "data", "rows", "phase"))
        )
        if row is not floor:
            assert row["over"]["floor"] == pytest.approx(row["ms"] / floor["ms"], rel=1e-3)


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    """Of several processes, too, one after the other."""
    path = tmp_path / "run.json"
    for count, phase in enumerate(("forward", "both"), 1):
        recorder = results.Recorder(path, CPU)
        recorder.add([results.describe(SMALL[0], by_label("step_kl", "eager"), phase, "ok")])
        assert len(results.load(path)["rows"]) == count
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_quantiles() -> None:
    row = results.figures([5.0, 1.0, 2.0, 3.0, 4.0, 6.0], None)
    assert (row["ms_q20"], row["ms"], row["ms_q80"]) == pytest.approx((2000, 3500, 5000))
    assert results.figures([2.0], 7)["ms_q20"] == 2000


def test_the_table_shows_triton_where_it_ran_and_names_who_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = recorded(tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.kernels()
    assert "liger, reverse_kl, N = 512 (out of memory)" in text and "| / liger |" not in text and "/ trl" in text
    assert "On a GPU: not measured." in text and "eager 0.1" in text
    (ours,) = (
        row
        for row in written["rows"]
        if (row["provider"], row["setting"], row["data"], row["rows"], row["phase"], row["variant"])
        == ("ours triton", "clipped", "diffuse", 512, "both", "")
    )
    assert f"| reverse KL, clipped | 512 | {ours['ms']:.3g} | {ours['over']['floor']:.2f} |" in text
    # Without Triton, the PyTorch backend is shown.
    rows = [row for row in written["rows"] if row["provider"] != "ours triton"]
    (tmp_path / "run.json").write_text(json.dumps({**written, "rows": rows}))
    other = report.kernels()
    assert other != text and other.count("\n|") == text.count("\n|")


def test_figures_are_drawn(tmp_path: Path) -> None:
    written = recorded(tmp_path)
    plots.draw({"cpu": written, "gpu": written}, tmp_path / "docs")
    for name in ("kernel_time.png", "kernel_memory.png"):
        assert (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG")


# Tuning.


def test_search_finds_the_best_value_of_every_parameter() -> None:
    """On a bowl, one parameter at a time is enough; what cannot run is never chosen, nor any name it doesn't know."""

    def seconds(config: dict[str, int]) -> float:
        if config["num_stages"] == 5:
            return math.inf
        return 1 + abs(config["BLOCK_V"] - 256) + abs(config["num_warps"] - 8) + (5 - config["num_stages"])

    start = {"BLOCK_V": 64, "num_warps": 4, "num_stages": 1, "OTHER": 3}
    assert tune.search(start, seconds) == ({"BLOCK_V": 256, "num_warps": 8, "num_stages": 4, "OTHER": 3}, 2)


def test_search_does_not_change_for_noise_and_says_when_nothing_runs() -> None:
    start = {"BLOCK_V": 64, "num_warps": 4}
    assert tune.search(start, lambda config: 1 - 0.0005 * config["num_warps"])[0] == start
    assert tune.search(start, lambda config: math.inf) == (start, math.inf)


OLD: list[dict[str, Any]] = [
    {"arch": ["interpret"], "config": {"A": 0}},
    {"arch": ["sm_80", "sm_90"], "rows": 32, "config": {"A": 1}},
    {"arch": ["sm_80", "sm_90"], "config": {"A": 2}},
]


def test_the_new_entry_is_the_first_that_applies_and_hides_no_smaller_one() -> None:
    entry = {"arch": ["sm_90"], "rows": 256, "width": 64, "vocab": 1000, "config": {"A": 3}}
    entries = tune.insert(OLD, entry)
    assert entries == [*OLD[:2], entry, OLD[2]]
    # Tuned again, it is replaced.
    again = {**entry, "config": {"A": 4}}
    assert tune.insert(entries, again) == [*OLD[:2], again, OLD[2]]
    # An architecture without any entry.
    new = {**entry, "arch": ["gfx942"]}
    assert tune.insert(OLD, new) == [*OLD, new]


def test_the_file_is_written_as_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "configs.json"
    tune.write({"one": OLD, "two": OLD[:1]}, path)
    assert tune.configs.read(path) == {"one": OLD, "two": OLD[:1]}
    assert sum(line.startswith('  {"arch"') for line in path.read_text().splitlines()) == 4


SIZES = {"BLOCK": 64, "BLOCK_N": 16, "BLOCK_R": 16, "BLOCK_V": 64, "BLOCK_D": 32, "SPLITS": 3}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's -inf - -inf
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_every_kernel_can_be_tuned(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op runs the kernel with the configuration that is tried, and with its own again afterwards."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("on a GPU, Triton's interpreter does not run")
    from dopsd_kernels.triton import confidence, step_kl

    # The interpreter cannot run bf16; 16-bit products, which a CPU has none of, choose two of the kernels.
    monkeypatch.setattr(products, "matmul", lambda a, b, out=None: torch.mm(a.float(), b.float(), out=out))
    monkeypatch.setattr(products, "operand_dtype", lambda hidden, weight: weight.dtype)
    op, data, _ = tune.KERNELS[kernel]
    case = Case(op, 3, 32, 150, torch.float16, data)
    seconds = tune.timer(kernel, case, "interpret")
    start = tune.configs.choose(kernel, CPU, case.rows, case.width, case.vocab)
    tried = {**start, **{name: size for name, size in SIZES.items() if name in start}}
    launched: list[dict[str, int]] = []
    choose = tune.configs.choose

    def choose_and_tell(name: str, *sizes: Any) -> dict[str, int]:
        config = choose(name, *sizes)
        launched.extend([config] if name == kernel else [])
        return config

    for module in (confidence, step_kl):
        monkeypatch.setattr(module, "choose", choose_and_tell)
    assert seconds(tried) < math.inf
    assert launched and all(config == tried for config in launched)
    assert seconds({**tried, next(name for name in tried if "BLOCK" in name): 3}) == math.inf  # no power of 2
    assert choose(kernel, CPU, case.rows, case.width, case.vocab) == start


# The commands.


def test_without_a_gpu_the_commands_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
    for kernel in tune.KERNELS:
        assert tune.main([kernel, "--rows", "32"]) == 2
    assert "no Triton kernels" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["confidence_argmax", "--rows", "32", "--dtype", "float32"])
    assert "16-bit" in capsys.readouterr().err


def test_a_command_that_runs_out_of_time_is_stopped(tmp_path: Path) -> None:
    script = "import time\nprint('started', flush=True)\ntime.sleep(60)"
    command = [gpu.sys.executable, "-c", script]
    assert not gpu.run(command, tmp_path / "log", 1.0)
    assert "KeyboardInterrupt" in (tmp_path / "log").read_text()
    assert gpu.run([*command[:2], "print(1)"], tmp_path / "log", 30.0)
