"""The benchmarks compare like with like, and report what they measured."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import conftest, gpu, kernels, measure, ops, report, results, tune
from benchmarks.measure import Clock, Times, Trial, Unusable
from benchmarks.ops import Confidence, Provider, StepKL, cases
from benchmarks.results import Content, Recorder, Row

CPU = torch.device("cpu")
SMALL = cases(CPU, rehearsal=True)
TOLERANCE = 1e-3


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        for module in (measure, kernels, results, gpu, tune):
            monkeypatch.setattr(module, "DEVICE", CPU)


def by_name(case: ops.Case, name: str) -> Provider:
    return next(provider for provider in case.providers() if provider.name == name)


# Who computes what.


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_provider_computes_the_same(case: ops.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients and outputs are those of the fp64 reference, to the rounding of fp32 logits of size 10 to 30."""
    monkeypatch.setattr(ops, "no_compiler", lambda device: "compilation takes too long for a test")
    for provider in case.providers():
        if provider.missing(CPU) is None and provider.name != "compile":
            assert kernels.error(case, provider).get("error", 0.0) < TOLERANCE, provider.name


def test_an_error_would_show() -> None:
    """The reverse KL is not the clipped one, nor that from a teacher whose logits are off by 1 %."""
    case = SMALL[0]
    eager = by_name(case, "eager")

    def wrong_case(case: StepKL, tensors: Any) -> Any:
        return eager.run(replace(case, setting="clipped"), tensors)

    def wrong_teacher(case: StepKL, tensors: Any) -> Any:
        return eager.run(case, (tensors[0], 1.01 * tensors[1], tensors[2]))

    for run in (wrong_case, wrong_teacher):
        assert kernels.error(case, replace(eager, run=run))["error"] > TOLERANCE


def test_flex_is_the_same_attention() -> None:
    for case in SMALL:
        if isinstance(case, ops.Attention) and case.phase == "forward":
            assert kernels.error(case, by_name(case, "flex"))["error"] < TOLERANCE


def test_the_floor_is_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplies every row, in chunks whose size is bounded."""
    hidden, weight = torch.randn(24, 64), torch.randn(1000, 64)
    monkeypatch.setattr(ops, "_FLOOR_BYTES", 7 * 1000 * 4)  # 7 rows
    buffer = ops._bare(hidden, weight)
    assert buffer.shape == (7, 1000)
    torch.testing.assert_close(buffer[: 24 % 7], hidden[-(24 % 7) :] @ weight.T)


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case, other = StepKL("reverse_kl", 8, 32, 500, torch.float32), StepKL("forward_kl", 8, 32, 500, torch.float32)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert "GPU" in str(by_name(case, "liger").missing(CPU)) and "GPU" in str(by_name(other, "liger kl").missing(CPU))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if "kl_div" in name else name)
    assert "no fused linear KL" in str(by_name(other, "liger kl").missing(CPU))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("trl", "trl"), ("liger chunked", "liger-kernel"), ("liger", "liger-kernel")):
        assert by_name(case, name).missing(CPU) == f"{package} is not installed: pip install {package}"


@pytest.mark.parametrize(("width", "vocab"), [(256, 16384), (1024, 4096)])
def test_peaked_rows_are_a_trained_models(width: int, vocab: int) -> None:
    """Entropies of about 1 to 3 nats, and a teacher that is close."""
    student, teacher, weight = StepKL("reverse_kl", 200, width, vocab, torch.float32, "peaked").tensors(CPU)
    with torch.no_grad():
        s, t = ((rows @ weight.T).softmax(-1) for rows in (student, teacher))
    entropy = -(s * s.log()).nan_to_num(0).sum(-1)
    assert bool((entropy > 0.8).float().mean() > 0.9) and 1.2 < entropy.median() < 2 and entropy.max() < 3
    assert 0 < (s * (s / t).log()).nan_to_num(0).sum(-1).median() < 0.1


def test_diffuse_rows_are_not() -> None:
    student, _, weight = StepKL("reverse_kl", 200, 256, 16384, torch.float32).tensors(CPU)
    with torch.no_grad():
        probability = (student @ weight.T).softmax(-1)
    assert (-(probability * probability.log()).sum(-1) > 4).float().mean() > 0.9


def test_both_kinds_of_machine_and_a_rehearsal_have_every_kind_of_case() -> None:
    def kinds(chosen: list[ops.Case]) -> set[tuple[Any, ...]]:
        return {(type(case), getattr(case, "setting", ""), getattr(case, "data", ""), case.phase) for case in chosen}

    assert kinds(cases(CPU)) == kinds(cases(torch.device("cuda"))) == kinds(SMALL)
    assert {case.setting for case in SMALL if isinstance(case, StepKL)} == ops.OPTIONS.keys()
    assert {case.setting for case in SMALL if isinstance(case, Confidence)} == ops.ASKED.keys()
    sizes = {case.rows for case in cases(torch.device("cuda")) if isinstance(case, StepKL)}
    assert sizes == {2048, 256}


# How it is timed.


def test_rounds_run_everything_once_and_the_slow_no_more_than_twice() -> None:
    order: list[str] = []
    fast = Trial(lambda: order.append("fast"))
    slow = Trial(lambda: (order.append("slow"), time.sleep(0.05)))
    broken = Trial(lambda: 1 / 0)
    measure.interleave([fast, broken, slow], Clock(CPU), 0.06, 3, 5)
    assert order == ["fast", "slow", "fast", "slow", "fast"]
    assert broken.status == "failed: ZeroDivisionError: division by zero" and not broken.times
    assert all(times.host is None and times.device > 0 for times in fast.times)
    assert min(times.device for times in slow.times) >= 0.05
    quick = Trial(lambda: None)
    measure.interleave([quick], Clock(CPU), 60, 3, 5)
    assert len(quick.times) == 5


def test_one_that_fails_does_not_end_the_others() -> None:
    for error, status in (
        (torch.OutOfMemoryError("too much"), "out of memory"),
        (RuntimeError("no\nmore"), "failed: RuntimeError: no"),
    ):

        def run(error: Exception = error) -> None:
            raise error

        trial = Trial(run)
        trial.attempt(run)
        trial.attempt(lambda: pytest.fail("it goes on"))
        assert trial.status == status


def test_a_lost_gpu_ends_everything_and_names_who_lost_it() -> None:
    case = StepKL("clipped", 8, 32, 500, torch.float32)

    def lose(case: StepKL, tensors: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    providers = [by_name(case, "floor"), Provider("thief", lose), by_name(case, "eager")]
    with pytest.raises(Unusable) as lost:
        kernels.measure_case(case, providers, kernels.ceilings(True))
    (row,) = lost.value.rows
    assert row["provider"] == "thief" and "illegal memory access" in str(row["status"])


def test_a_row_has_its_needs_its_ceiling_and_its_error() -> None:
    case = StepKL("clipped", 8, 32, 500, torch.float32)
    names = ("floor", "eager", "ours triton")
    providers = [by_name(case, name) for name in names]
    rows, trials = kernels.measure_case(case, providers, kernels.ceilings(True), rounds=(3, 3))
    floor, eager, triton = rows
    assert floor["flops"] == 6 * 8 * 32 * 500 and floor["rounds"] == 3 == len(trials[0].times)
    assert floor["of_ceiling"] == pytest.approx(
        1000 * max(floor[need] / floor["ceiling"][need] for need in ("flops", "bytes")) / floor["ms"]
    )
    assert eager["over"] == {"floor": pytest.approx(eager["ms"] / floor["ms"])} and eager["error"] < TOLERANCE
    if not torch.cuda.is_available():
        assert triton["status"].startswith("skipped: ") and "ms" not in triton and "error" not in floor
    recorder = Recorder(None)
    recorder.add(rows)
    assert ops.StepKL("top_k=20", 8, 32, 500, torch.float32).needs()["flops"] == floor["flops"] / 3


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is read under Linux")
def test_the_peak_of_a_run_is_what_it_used_at_most() -> None:
    def run() -> None:
        for mebibytes in (32, 64, 16):
            torch.ones(mebibytes << 20, dtype=torch.int8)

    assert 63 << 20 < measure.cpu_peak(run) < 72 << 20


# Files.


def row_of(provider: str = "ours torch", status: str = "ok", **figures: Any) -> Row:
    """A row about one case, with invented figures if it is given any."""
    case = StepKL("clipped", 512, 256, 16384, torch.float32)
    times = {"rounds": 3, "ms_q20": 0.9 * figures["ms"], "ms_q80": 1.1 * figures["ms"]} if "ms" in figures else {}
    return {**case.about(), "provider": provider, "status": status, "peak_bytes": None, **times, **figures}


def content_of(*rows: Row, kind: str = "gpu", **machine: Any) -> Content:
    """A run's file with these rows."""
    known = {**results.machine(), "kind": kind, "device": "Some GPU", "date": "2030-01-01", **machine}
    return {"rehearsal": False, "machine": known, "rows": list(rows)}


def test_rows_are_written_as_they_come_in_place_of_what_was_announced(tmp_path: Path) -> None:
    """Of several processes, too, one after the other: what ended one is not tried again by the next."""
    path = tmp_path / "run.json"
    first = Recorder(path)
    skipped = row_of("liger", "skipped: no GPU")
    assert first.announce([row_of(), row_of("eager"), skipped]) == [row_of(), row_of("eager"), skipped]
    assert [row["status"] for row in results.load(path)["rows"]] == ["failed: the process ended in it"] * 2 + [
        "skipped: no GPU"
    ]
    first.add([row_of("eager", ms=2.0)])
    second = Recorder(path)
    assert second.announce([row_of(), row_of("eager"), row_of("trl")]) == [row_of("trl")]
    second.withdraw([row_of(), row_of("trl")])
    assert [row["provider"] for row in results.load(path)["rows"]] == ["eager", "liger"]
    assert second.announce([row_of("eager"), row_of()]) == [row_of()]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"part": "other"}, "part='other'"),
        ({"mss": 1}, "a column mss"),
        ({"status": "fine"}, "status='fine'"),
        ({"ms": 3.0}, "outside its quantiles"),
        ({"provider": None}, "has no provider"),
    ],
)
def test_what_is_no_row_is_refused(changes: Row, sentence: str) -> None:
    row = {**row_of(ms=1.0), **changes}
    with pytest.raises(ValueError, match=sentence):
        Recorder(None).add([{name: value for name, value in row.items() if value is not None}])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    good = content_of(row_of(ms=1.0))
    for content, sentence in (
        ({**good, "more": 1}, "has the fields"),
        ({**good, "rehearsal": True}, "is a rehearsal"),
        ({**good, "rows": good["rows"] * 2}, "about the same"),
        ({**good, "rows": [{**good["rows"][0], "status": ""}]}, "row 0 has status=''"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"^a.json.*{sentence}"):
            results.load(path)


def test_every_committed_file_is_valid() -> None:
    files = [path for path in results.FOLDER.glob("*.json") if path.name not in (report.RECIPE, report.REUSE)]
    assert files and all(results.load(path)["rows"] for path in files)


def test_a_run_never_takes_anothers_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "machine", lambda: {"device": "NVIDIA H200 (SXM)", "date": "2030-01-01"})
    for name in ("nvidia-h200-sxm_2030-01-01", "nvidia-h200-sxm_2030-01-01_2", "nvidia-h200-sxm_2030-01-01_3"):
        path = results.new_path(tmp_path)
        assert path == tmp_path / f"{name}.json"
        path.touch()


def test_what_nvidia_smi_says_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first GPU; nothing where it answers otherwise."""
    script = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for answer, found in (
        ("1980 MHz, 35", {"clocks.sm": "1980 MHz", "temperature.gpu": "35"}),
        ("No devices were found", {}),
    ):
        script.write_text(f"#!/bin/sh\necho '{answer}'; echo 'another'\n")
        script.chmod(0o755)
        assert results.query_gpu("clocks.sm", "temperature.gpu") == found


def test_quantiles() -> None:
    times = [Times(seconds, seconds / 10) for seconds in (5.0, 1.0, 2.0, 3.0, 4.0, 6.0)]
    row = results.figures(Trial(lambda: None, times=times))
    assert (row["ms_q20"], row["ms"], row["ms_q80"], row["host_ms"]) == pytest.approx((2000, 3500, 5000, 350))
    one = results.figures(Trial(lambda: None, times=[Times(2.0, None)], peak_bytes=7))
    assert (one["ms_q20"], one["peak_bytes"]) == (2000, 7) and "host_ms" not in one


# What is shown.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    return tmp_path


def test_the_table_shows_triton_where_it_ran_and_names_who_did_not(folder: Path) -> None:
    over = {"floor": 1.25, "eager": 0.5, "ours torch": 0.75}
    rows = [
        row_of("floor", ms=4.0),
        row_of("eager", ms=10.0, peak_bytes=8 << 20),
        row_of("ours torch", ms=20.0 / 3, over={"floor": 5 / 3, "eager": 2 / 3}, peak_bytes=1 << 20),
        row_of("ours triton", ms=5.0, over=over, peak_bytes=2 << 20, error=1e-3),
        row_of("liger", "skipped: no GPU"),
        row_of("compile", "out of memory"),
    ]
    (folder / "a.json").write_text(json.dumps(content_of(*rows, kind="cpu")))
    text = report.kernels()
    assert "| step_kl clipped, N = 512 | 5 | 1.25 | 0.50 | 2 MiB | 0.25 | 1e-03 |" in text
    assert "/ ours" not in text and "On a GPU: not measured." in text
    assert "Not run: liger: no GPU; compile, step_kl clipped, N = 512: out of memory." in text
    (line,) = report.ratios([row for row in rows if row["provider"] != "ours triton"])
    assert line["/ floor"] == "1.67" and line["memory"] == "1 MiB"


def test_targets_are_of_one_run_at_equal_micro_batches() -> None:
    def row(provider: str, seconds: float, gib: float = 0.0, variant: str = "", **others: Any) -> Row:
        about = {"provider": provider, "variant": variant, "phase": "update", "states_per_forward": 16}
        bytes_of = {"total_bytes": int((18 + gib) * 2**30), "peak_bytes": int(gib * 2**30)}
        return {**about, **bytes_of, "status": "ok", "ms": 1000 * seconds, **others}

    rows = [
        row("ours", 6, 4),
        row("ours", 5, phase="student", of_ceiling=0.44),
        row("plain", 15, 20),
        row("ours", 1, variant="reuse=block"),
        row("ours", 0.1, 99, states_per_forward=64),
        row("plain", 4, phase="rollout", states_per_forward=1),
        row("ours", 1, variant="cache=block", phase="rollout", states_per_forward=1),
        row("ours", 8, 7, variant="quantize=nf4"),
    ]
    told = [line.split(" | ")[-2:] for line in report.targets(rows).splitlines()[2:]]
    assert told == [
        ["2.5", "yes |"],
        ["0.2", "yes |"],
        ["9.5", "yes |"],
        ["22 GiB", "yes |"],
        ["25 GiB", "no |"],
        ["not measured", " |"],
        ["44 %", "no |"],
    ]


def test_against_an_older_run_what_became_slower_comes_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(*times: tuple[float, float, float]) -> list[Row]:
        names = ("noisy", "slow", "slower", "fast")
        return [
            {**row_of(name), "rounds": 3, "ms_q20": low, "ms": middle, "ms_q80": high}
            for name, (low, middle, high) in zip(names, times, strict=False)
        ]

    old = folder / "old.json"
    old.write_text(json.dumps(content_of(*rows((1, 2, 3), (1, 1, 1.1), (1, 1, 1.1), (5, 5, 5)))))
    new = content_of(*rows((2.5, 4, 5), (1.2, 1.2, 1.3), (1.2, 1.5, 1.6), (4, 4, 4.5)), date="2030-01-02")
    new["rows"].append(row_of("new", ms=1.0))
    (folder / "new.json").write_text(json.dumps(new))
    for argv in ([str(old)], [str(old), str(folder / "new.json")]):
        assert report.main(["--against", *argv]) == 0
        text = capsys.readouterr().out
        order = [text.index(word) for word in ("Slower: 2", " slower", " slow", "Faster: 1", " fast")]
        assert order == sorted(order)
        assert text.index("Within the spread: 1") < text.index(" noisy")
        assert "1.500" in text and "0.800" in text and "Only in the new file: 1" in text
    with pytest.raises(SystemExit):
        report.main(["--against", str(old), str(old), str(old)])
    (folder / "new.json").unlink()
    with pytest.raises(SystemExit):
        report.main(["--against", str(old)])
    assert "no file to compare old.json with" in capsys.readouterr().err


# The front door.


def test_benchmark_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group for every case, a row for every provider that is here, what was measured of it, and ratios at the end;
    nothing but benchmarks is collected, and pytest-benchmark's own options work on it."""
    pytest.importorskip("pytest_benchmark")
    for name in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "--benchmark-only", "--rehearse", "-p", "no:cacheprovider"]
    command += [f"--benchmark-json={out}", "-k", "clipped"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    done = subprocess.run(command, cwd=results.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    text = done.stdout
    assert "test_benchmarks" not in text and "skipped" not in text
    assert "benchmark 'step_kl clipped, N=12': 3 tests" in text
    (ratios,) = (line for line in text.splitlines() if line.startswith("step_kl clipped, N = 12"))
    found = json.loads(out.read_text())["benchmarks"]
    of_case = {one["name"]: one for one in found if one["group"] == "step_kl clipped, N=12"}
    assert of_case.keys() == {"floor", "eager", "ours torch"}
    medians = {name: one["stats"]["median"] for name, one in of_case.items()}
    assert f"{medians['ours torch'] / medians['floor']:.2f}" in ratios.split()
    assert all(one["stats"]["rounds"] == 2 for one in found)
    assert of_case["ours torch"]["extra_info"]["error"] < TOLERANCE and "error" not in of_case["floor"]["extra_info"]
    assert sum("ours triton: Triton kernels need a GPU" in line for line in text.splitlines()) == 1


def test_any_other_run_leaves_the_benchmarks_out() -> None:
    ours, other = (SimpleNamespace(path=results.ROOT / folder / "test_a.py") for folder in ("benchmarks", "tests"))
    left_out: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    for only, kept in ((False, [other]), (True, [ours, other])):
        items: list[Any] = [ours, other]
        config: Any = SimpleNamespace(getoption=lambda *_, only=only: only, hook=hook)
        conftest.pytest_collection_modifyitems(config, items)
        assert items == kept and left_out == [ours]


# Tuning.


def test_search_finds_the_best_value_of_every_parameter() -> None:
    """On a bowl, one parameter at a time is enough; what cannot run is never chosen, nor any name it doesn't know.
    Every improvement is told when it is found, and without time nothing is tried."""

    def seconds(config: dict[str, int]) -> float:
        if config["num_stages"] == 5:
            return math.inf
        return 1 + abs(config["BLOCK_V"] - 256) + abs(config["num_warps"] - 8) + (5 - config["num_stages"])

    start = {"BLOCK_V": 64, "num_warps": 4, "num_stages": 1, "OTHER": 3}
    found = list(tune.search(start, seconds, math.inf))
    assert found[0] == (start, seconds(start)) and [time for _, time in found] == sorted(
        [time for _, time in found], reverse=True
    )
    assert found[-1] == ({"BLOCK_V": 256, "num_warps": 8, "num_stages": 4, "OTHER": 3}, 2)
    assert list(tune.search(start, seconds, 0.0)) == found[:1]


def test_search_does_not_change_for_noise_and_says_when_nothing_runs() -> None:
    start = {"BLOCK_V": 64, "num_warps": 4}
    assert [config for config, _ in tune.search(start, lambda config: 1 - 0.0005 * config["num_warps"], math.inf)] == [
        start
    ]
    assert list(tune.search(start, lambda config: math.inf, math.inf)) == [(start, math.inf)]


OLD: list[dict[str, Any]] = [
    {"arch": ["interpret"], "config": {"A": 0}},
    {"arch": ["sm_80", "sm_90"], "rows": 32, "config": {"A": 1}},
    {"arch": ["sm_80", "sm_90"], "config": {"A": 2}},
]


def test_the_new_entry_is_the_first_that_applies_and_hides_no_smaller_one(tmp_path: Path) -> None:
    entry = {"arch": ["sm_90"], "rows": 256, "width": 64, "vocab": 1000, "config": {"A": 3}}
    entries = tune.insert(OLD, entry)
    assert entries == [*OLD[:2], entry, OLD[2]]
    # Tuned again, it is replaced.
    again = {**entry, "config": {"A": 4}}
    assert tune.insert(entries, again) == [*OLD[:2], again, OLD[2]]
    # An architecture without any entry.
    new = {**entry, "arch": ["gfx942"]}
    assert tune.insert(OLD, new) == [*OLD, new]
    path = tmp_path / "configs.json"
    tune.write({"one": OLD, "two": OLD[:1]}, path)
    assert tune.configs.read(path) == {"one": OLD, "two": OLD[:1]}
    assert sum(line.startswith('  {"arch"') for line in path.read_text().splitlines()) == 4


def test_every_kernel_is_tuned_but_those_of_slow_attention() -> None:
    assert tune.CASES.keys() == {name for name in tune.configs.read() if not name.endswith("_fp32")}


SIZES = {"num_warps": 2, "BLOCK": 64, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_V": 64, "SPLITS": 3}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's -inf - -inf
@pytest.mark.parametrize("kernel", tune.CASES)
def test_tuning_runs_the_kernel_with_what_it_tries_and_writes_what_is_better(
    kernel: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("on a GPU, Triton's interpreter does not run")
    from dopsd_kernels.common import products
    from dopsd_kernels.confidence import kernels as confidence
    from dopsd_kernels.prefix_attention import kernels as prefix_attention
    from dopsd_kernels.step_kl import kernels as step_kl

    # The interpreter cannot run bf16; 16-bit products, which a CPU has none of, choose some of the kernels.
    monkeypatch.setattr(products, "matmul", lambda a, b, out=None: torch.mm(a.float(), b.float(), out=out))
    monkeypatch.setattr(products, "operand_dtype", lambda hidden, weight: weight.dtype)
    monkeypatch.setattr(ops, "no_triton", lambda device: None)
    case = tune.CASES[kernel]
    if isinstance(case, ops.Attention):
        case = replace(case, groups=1, sequences=2, heads=1, length=16, prefix=16, width=16, dtype=torch.float16)
    else:
        dtype = torch.float16 if case.dtype == torch.bfloat16 else case.dtype
        case = replace(case, rows=3, width=32, vocab=150, dtype=dtype)
    launched: list[dict[str, int]] = []
    choose = tune.configs.choose

    def choose_and_tell(name: str, *sizes: Any, **named: Any) -> dict[str, int]:
        config = choose(name, *sizes, **named)
        launched.extend([config] if name == kernel else [])
        return config

    for module in (confidence, prefix_attention, step_kl):
        monkeypatch.setattr(module, "choose", choose_and_tell)
    entries = tune.configs.read()
    seconds = tune.timer(kernel, case, "interpret", entries)
    start = choose(kernel, CPU, *([case.rows, case.width, case.vocab] if not isinstance(case, ops.Attention) else []))
    tried = {**start, **{name: size for name, size in SIZES.items() if name in start}}
    assert seconds(tried) < math.inf
    assert launched and all(config == tried for config in launched)
    assert seconds({**tried, next(name for name in tried if "BLOCK" in name): 3}) == math.inf  # no power of 2
    out = tmp_path / "configs.json"
    monkeypatch.setattr(tune, "search", lambda *_: iter([(start, 2.0), (tried, 1.0)]))
    assert tune.tune(kernel, case, "interpret", math.inf, out)
    assert tried in [entry["config"] for entry in tune.configs.read(out)[kernel]]
    monkeypatch.setattr(tune, "search", lambda *_: iter([(start, math.inf)]))
    assert not tune.tune(kernel, case, "interpret", math.inf, out)


def test_without_a_gpu_the_commands_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert tune.main(["--only", "confidence", "--rows", "32"]) == 2
    assert "no Triton kernels" in capsys.readouterr().err
