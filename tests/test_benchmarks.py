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
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import conftest, gpu, layer, measure, ops, report, results, tune
from benchmarks.case import Case
from benchmarks.measure import Trial, Unusable, error, measure_case
from benchmarks.ops import OPS, Provider, cases, providers
from benchmarks.results import Content, Recorder, Row

CPU = torch.device("cpu")
SMALL = cases(CPU, rehearsal=True)
CLIPPED = Case("step_kl", "both", "clipped", 8, 32, 500)
TOLERANCE = 1e-3


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (measure, results, gpu, tune):
        monkeypatch.setattr(module, "DEVICE", CPU)


def stand_in(monkeypatch: pytest.MonkeyPatch, forward: Any, op: str = "step_kl") -> None:
    """Give an op another provider."""
    monkeypatch.setitem(OPS[op].providers, "stand-in", Provider(forward))


# Who computes what.


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_provider_computes_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients and outputs are those of the fp64 reference, to the rounding of fp32 logits of size 10 to 30."""
    monkeypatch.setattr(ops, "no_compiler", lambda device: "compilation takes too long for a test")
    for name in providers(case):
        runs = OPS[case.op].providers[name].missing(CPU) is None or (name == "flex" and case.phase == "forward")
        if runs and name != "compile":
            assert error(case, name).get("error", 0.0) < TOLERANCE, name


def test_an_error_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reverse KL is not the clipped one, nor that from a teacher whose logits are off by 1 %."""
    eager = OPS["step_kl"].providers["eager"].forward
    for wrong in (
        lambda case, *tensors: eager(replace(case, setting="clipped"), *tensors),
        lambda case, student, teacher, weight: eager(case, student, 1.01 * teacher, weight),
    ):
        stand_in(monkeypatch, wrong)
        assert error(SMALL[0], "stand-in")["error"] > TOLERANCE


def test_the_floor_is_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplies every row, in chunks whose size is bounded."""
    hidden, weight = torch.randn(24, 64), torch.randn(1000, 64)
    monkeypatch.setattr(ops, "_FLOOR_BYTES", 7 * 1000 * 4)  # 7 rows
    buffer = ops._bare(hidden, weight)
    assert buffer.shape == (7, 1000)
    torch.testing.assert_close(buffer[: 24 % 7], hidden[-(24 % 7) :] @ weight.T)


@pytest.mark.parametrize("case", [case for case in SMALL if case.op == "lora_layer"], ids=str)
def test_a_layer_does_the_arithmetic_that_it_needs(case: Case) -> None:
    """The floor all of it; PEFT's modules and ours all but attention's, which is one operator."""
    tensors, attention = layer.tensors(case, CPU), 4 * case.sequences * case.length**2 * case.width
    needed, in_place = (
        layer.needs(case)["flops"],
        {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * math.prod(a) * b[1]},
    )
    for forward, rest in ((layer.floor, 0), (layer.peft, attention), (layer.ours, attention)):
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            out = forward(case, *tensors)
            if case.phase == "both" and out is not None:
                out.sum().backward()
        assert counter.get_total_flops() == needed - rest * (3 if case.phase == "both" else 1)


def test_what_a_graph_keeps_is_counted_once() -> None:
    x, y = torch.ones(10, requires_grad=True), torch.ones(10)
    assert measure.kept_memory(lambda: None, [x]) is None
    # The results of both exp, of the square and of relu, two of them by two nodes; and neither of the inputs.
    assert measure.kept_memory(lambda: (x * y).exp() ** 2 * x.exp() + x.relu(), [x, y]) == 4 * 10 * 4


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        return str(OPS["step_kl"].providers[name].missing(CPU))

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert "GPU" in missing("liger") and "GPU" in missing("liger kl")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if "kl_div" in name else name)
    assert "has no ops.fused_linear_kl_div" in missing("liger kl")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("trl", "trl"), ("liger chunked", "liger-kernel"), ("liger", "liger-kernel")):
        assert missing(name) == f"{package} is not installed: pip install {package}"


@pytest.mark.parametrize(("width", "vocab"), [(256, 16384), (1024, 4096)])
def test_peaked_rows_are_a_trained_models(width: int, vocab: int) -> None:
    """Entropies of about 1 to 3 nats, and a teacher that is close; those of diffuse rows are far above."""
    peaked, diffuse = (
        OPS["step_kl"].tensors(Case("step_kl", "both", "reverse_kl", 200, width, vocab, data=data), CPU)
        for data in ("peaked", "diffuse")
    )
    with torch.no_grad():
        s, t = ((rows @ peaked[2].T).softmax(-1) for rows in peaked[:2])
        d = (diffuse[0] @ diffuse[2].T).softmax(-1)
    entropy, far = (-(p * p.log()).nan_to_num(0).sum(-1) for p in (s, d))
    assert bool((entropy > 0.8).float().mean() > 0.9) and 1.2 < entropy.median() < 2 and entropy.max() < 3
    assert 0 < (s * (s / t).log()).nan_to_num(0).sum(-1).median() < 0.1
    assert far.median() > 4


def test_both_kinds_of_machine_and_a_rehearsal_have_every_kind_of_case() -> None:
    def kinds(chosen: list[Case]) -> set[tuple[str, ...]]:
        return {(case.op, case.setting, case.data, case.phase) for case in chosen}

    on_gpu = cases(torch.device("cuda"))
    assert kinds(cases(CPU)) == kinds(on_gpu) == kinds(SMALL)
    assert {case.setting for case in SMALL if case.op == "step_kl"} == ops.OPTIONS.keys()
    assert {case.setting for case in SMALL if case.op == "confidence"} == ops.ASKED.keys()
    assert {case.rows for case in on_gpu if case.op == "step_kl"} == {2048, 256}
    assert [name for case in on_gpu if case.op == "products" for name in providers(case)] == [
        "float32 out",
        "bfloat16 out",
    ] * 2


# How it is timed.


def test_rounds_run_everything_once_and_the_slow_no_more_than_twice() -> None:
    order: list[str] = []
    fast = Trial(lambda: order.append("fast"))
    slow = Trial(lambda: (order.append("slow"), time.sleep(0.05)))
    broken = Trial(lambda: 1 / 0)
    measure.interleave([fast, broken, slow], 0.06, 3, 5)
    assert order == ["fast", "slow", "fast", "slow", "fast"]
    assert broken.status == "failed: ZeroDivisionError: division by zero" and not broken.times
    assert all(host is None and device > 0 for device, host in fast.times)
    assert min(device for device, _ in slow.times) >= 0.05
    quick = Trial(lambda: None)
    measure.interleave([quick], 60, 3, 5)
    assert len(quick.times) == 5


def test_one_that_fails_does_not_end_the_others() -> None:
    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("too much")

    trial = Trial(out_of_memory)
    trial.attempt(out_of_memory)
    trial.attempt(lambda: pytest.fail("it goes on"))
    assert trial.status == "out of memory"


def test_a_lost_gpu_ends_everything_and_names_who_lost_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    stand_in(monkeypatch, lose)
    with pytest.raises(Unusable) as lost:
        measure_case(CLIPPED, ["floor", "stand-in", "eager"], True, (0.0, 2, 2))
    (row,) = lost.value.rows
    assert row["provider"] == "stand-in" and "illegal memory access" in str(row["status"])


def test_a_row_has_its_needs_its_ceiling_and_its_error() -> None:
    rows, trials = measure_case(CLIPPED, ["floor", "eager", "ours triton"], True, (60.0, 3, 3))
    floor, eager, triton = rows
    assert floor["flops"] == 6 * 8 * 32 * 500 and floor["rounds"] == 3 == len(trials[0].times)
    assert floor["of_ceiling"] == pytest.approx(
        1000 * max(floor[need] / floor["ceiling"][need] for need in ("flops", "bytes")) / floor["ms"]
    )
    assert eager["over"] == {"floor": pytest.approx(eager["ms"] / floor["ms"])} and eager["error"] < TOLERANCE
    assert triton["status"].startswith("skipped: ") and "ms" not in triton and "error" not in floor
    Recorder(None).add(rows)
    assert OPS["step_kl"].needs(replace(CLIPPED, setting="top_k=20"))["flops"] == floor["flops"] / 3
    # Two buffers of logits with their softmaxes are the most that code has which keeps them.
    assert 4 * 8 * 500 * 4 <= eager["peak_bytes"] <= 12 * 8 * 500 * 4


def test_the_peak_of_a_run_is_what_it_used_at_most() -> None:
    before = torch.ones(8 << 20, dtype=torch.int8)

    def run() -> None:
        for mebibytes in (32, 64, 16):
            torch.ones(mebibytes << 20, dtype=torch.int8).add_(before[0])

    assert measure.peak_memory(run) == pytest.approx(64 << 20, rel=0.01)


def test_quantiles() -> None:
    row = Trial(print, times=[(seconds, seconds / 10) for seconds in (5.0, 1.0, 2.0, 3.0, 4.0, 6.0)]).figures()
    assert (row["ms_q20"], row["ms"], row["ms_q80"], row["host_ms"]) == pytest.approx((2000, 3500, 5000, 350))
    one = Trial(print, times=[(2.0, None)], peak_bytes=7).figures()
    assert (one["ms_q20"], one["peak_bytes"]) == (2000, 7) and "host_ms" not in one


# Files.


def row_of(provider: str = "ours torch", status: str = "ok", **figures: Any) -> Row:
    """A row about one case, with invented figures if it is given any."""
    case = Case("step_kl", "both", "clipped", 512, 256, 16384)
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
    first.announce([row_of(), row_of("eager"), skipped])
    assert [row["status"] for row in results.load(path)["rows"]] == ["failed: the process ended in it"] * 2 + [
        "skipped: no GPU"
    ]
    first.add([row_of("eager", ms=2.0)])
    second = Recorder(path)
    assert second.new([row_of(), row_of("eager"), row_of("trl")]) == [row_of("trl")]
    second.withdraw([row_of()])
    assert [row["provider"] for row in results.load(path)["rows"]] == ["eager", "liger"]
    assert second.new([row_of("eager"), row_of()]) == [row_of()]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"part": "other"}, "part='other'"), ({"mss": 1}, "a column mss"), ({"status": "fine"}, "status='fine'")],
)
def test_what_is_no_row_is_refused(changes: Row, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Recorder(None).add([{**row_of(ms=1.0), **changes}])


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


def test_a_run_never_takes_anothers_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "machine", lambda: {"device": "NVIDIA H200 (SXM)", "date": "2030-01-01"})
    for name in ("nvidia-h200-sxm_2030-01-01", "nvidia-h200-sxm_2030-01-01_2", "nvidia-h200-sxm_2030-01-01_3"):
        path = results.new_path(tmp_path)
        assert path == tmp_path / f"{name}.json"
        path.touch()


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
    told = [line.rstrip(" |").split(" | ")[2:] for line in report.targets(rows).splitlines()[2:]]
    met, missed = [["2.5", "yes"], ["0.2", "yes"], ["9.5", "yes"], ["22 GiB", "yes"]], [["25 GiB", "no"]]
    assert told == [*met, *missed, ["not measured"], ["44 %", "no"]]


def test_against_an_older_run_what_became_slower_comes_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(*times: tuple[float, float, float]) -> list[Row]:
        names = ("noisy", "slow", "slower", "fast")
        return [
            {**row_of(name), "rounds": 3, "ms_q20": low, "ms": middle, "ms_q80": high}
            for name, (low, middle, high) in zip(names, times, strict=False)
        ]

    old, new = folder / "old.json", folder / "new.json"
    old.write_text(json.dumps(content_of(*rows((1, 2, 3), (1, 1, 1.1), (1, 1, 1.1), (5, 5, 5)))))
    changed = rows((2.5, 4, 5), (1.2, 1.2, 1.3), (1.2, 1.5, 1.6), (4, 4, 4.5))
    new.write_text(json.dumps(content_of(*changed, row_of("new", ms=1.0), date="2030-01-02")))
    for argv in ([str(old)], [str(old), str(new)]):
        assert report.main(["--against", *argv]) == 0
        text = capsys.readouterr().out
        order = [text.index(word) for word in ("Slower: 2", " slower", " slow", "Faster: 1", " fast")]
        assert order == sorted(order)
        assert text.index("Within the spread: 1") < text.index(" noisy")
        assert "1.500" in text and "0.800" in text and "Only in the new file: 1" in text
    new.unlink()
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
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=results.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    text, case = done.stdout, "step_kl clipped, N = 12"
    assert "test_benchmarks" not in text and "skipped" not in text and f"benchmark '{case}': 3 tests" in text
    (ratios,) = (line for line in text.splitlines() if line.startswith(case))
    of_case = {one["name"]: one for one in json.loads(out.read_text())["benchmarks"] if one["group"] == case}
    assert of_case.keys() == {"floor", "eager", "ours torch"}
    medians = {name: one["stats"]["median"] for name, one in of_case.items()}
    # Rows keep four digits, so either time may be off by 5e-4 of itself, and the ratio is printed to a hundredth.
    ratio = medians["ours torch"] / medians["floor"]
    numbers = [float(word) for word in ratios.removeprefix(case).split() if word != "MiB"]
    assert min(abs(number - ratio) for number in numbers) <= 0.005 + 1.001e-3 * ratio
    assert all(one["stats"]["rounds"] == 2 and one["extra_info"]["peak_bytes"] for one in of_case.values())
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
    Every improvement is told when it is found, and without time nothing is tried; noise is no improvement."""

    def seconds(config: dict[str, int]) -> float:
        if config["num_stages"] == 5:
            return math.inf
        return 1 + abs(config["BLOCK_V"] - 256) + abs(config["num_warps"] - 8) + (5 - config["num_stages"])

    start = {"BLOCK_V": 64, "num_warps": 4, "num_stages": 1, "OTHER": 3}
    found = list(tune.search(start, seconds, math.inf))
    times = [time for _, time in found]
    assert found[0] == (start, seconds(start)) and times == sorted(times, reverse=True)
    assert found[-1] == ({"BLOCK_V": 256, "num_warps": 8, "num_stages": 4, "OTHER": 3}, 2)
    assert list(tune.search(start, seconds, 0.0)) == found[:1]
    assert len(list(tune.search(start, lambda config: 1 - 0.0005 * config["num_warps"], math.inf))) == 1
    assert list(tune.search(start, lambda config: math.inf, math.inf)) == [(start, math.inf)]


def test_the_new_entry_is_the_first_that_applies_and_hides_no_smaller_one(tmp_path: Path) -> None:
    old: list[dict[str, Any]] = [
        {"arch": ["interpret"], "config": {"A": 0}},
        {"arch": ["sm_80", "sm_90"], "rows": 32, "config": {"A": 1}},
        {"arch": ["sm_80", "sm_90"], "config": {"A": 2}},
    ]
    entry = {"arch": ["sm_90"], "rows": 256, "width": 64, "vocab": 1000, "config": {"A": 3}}
    entries = tune.insert(old, entry)
    assert entries == [*old[:2], entry, old[2]]
    # Tuned again, it is replaced.
    again = {**entry, "config": {"A": 4}}
    assert tune.insert(entries, again) == [*old[:2], again, old[2]]
    # An architecture without any entry.
    new = {**entry, "arch": ["gfx942"]}
    assert tune.insert(old, new) == [*old, new]
    path = tmp_path / "configs.json"
    tune.write({"one": old, "two": old[:1]}, path)
    assert tune.configs.read(path) == {"one": old, "two": old[:1]}


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

    # The interpreter cannot run bf16; 16-bit products, which a CPU has none of, choose some of the kernels.
    monkeypatch.setattr(products, "matmul", lambda a, b, out=None: torch.mm(a.float(), b.float(), out=out))
    monkeypatch.setattr(products, "operand_dtype", lambda hidden, weight: weight.dtype)
    monkeypatch.setattr(tune, "ROUNDS", 1)
    case = tune.CASES[kernel]
    case = replace(case, dtype=torch.float16 if case.dtype == torch.bfloat16 else case.dtype)
    if case.op == "attention":
        case = replace(case, groups=1, sequences=2, heads=1, length=16, prefix=16, width=16)
    else:
        case = replace(case, rows=3, width=32, vocab=150)
    seconds = tune.timer(kernel, case, "interpret", tune.configs.read())
    start = next(one["config"] for one in tune.configs.read()[kernel] if "interpret" in one["arch"])
    tried = {**start, **{name: size for name, size in SIZES.items() if name in start}}
    assert seconds(tried) < math.inf
    # It is this kernel's: no power of 2 is not possible, and a missing one is asked for.
    assert seconds({**tried, next(name for name in tried if "BLOCK" in name): 3}) == math.inf
    assert seconds({}) == math.inf
    out = tmp_path / "configs.json"
    monkeypatch.setattr(tune, "search", lambda *_: iter([(start, 2.0), (tried, 1.0)]))
    assert tune.tune(kernel, case, "interpret", math.inf, out)
    assert tried in [entry["config"] for entry in tune.configs.read(out)[kernel]]
    monkeypatch.setattr(tune, "search", lambda *_: iter([(start, math.inf)]))
    assert not tune.tune(kernel, case, "interpret", math.inf, out)


def test_without_a_gpu_the_commands_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert tune.main(["--only", "confidence", "--rows", "32"]) == 2
    assert "no Triton kernels" in capsys.readouterr().err
