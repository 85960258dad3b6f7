"""``python -m benchmarks.gpu``: every line of it in a rehearsal, its files' schema, and what is compared with what."""

from __future__ import annotations

import copy
import json
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from benchmarks import attention, ceilings, gpu, measure, plots, report, results, step, train, until
from benchmarks.problems import DEVICE
from benchmarks.results import Content, Recorder, Row
from dopsd.cache import Cache
from dopsd.models import quantization
from dopsd.models.bidirectional import BidirectionalLayer
from dopsd.models.llada import LLaDAModelLM
from dopsd.step_batch import PackedInputs
from dopsd_kernels import reference

CPU = torch.device("cpu")
OWN_FORM = [path for path in results.FOLDER.glob("*.json") if path.name in (report.RECIPE, report.REUSE)]
COMMITTED = [path for path in sorted(results.FOLDER.glob("*.json")) if path not in OWN_FORM]


# The whole command.


@pytest.mark.skipif(DEVICE.type == "cuda", reason="where there is a GPU, the command itself can be run")
def test_a_rehearsal_runs_every_part_and_is_never_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The children see the tests' own environment; nothing of it may be needed.
    for name in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "pytest_benchmark" else name)
    assert gpu.main(["--rehearse", "--out", str(tmp_path / "partly"), "--only", "kernels"]) == 0
    assert "kernels: pip install pytest-benchmark" in capsys.readouterr().out
    monkeypatch.undo()
    for name in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)

    out = tmp_path / "out"
    status = gpu.main(["--rehearse", "--out", str(out), "--minutes", "10"])
    log = capsys.readouterr().out
    assert status == 0, log
    assert "ours triton" in log.partition("Not run:")[2]
    assert {path.name for path in out.glob("*.txt")} == {"environment.txt", *(f"{name}.txt" for name in gpu.PARTS)}
    (path,) = out.glob("*.json")
    content = json.loads(path.read_text())
    results.validate(content)
    assert content["rehearsal"] and {row["part"] for row in content["rows"]} == {"attention", *gpu.PARTS}
    assert not [row["status"] for row in content["rows"] if row["status"].startswith(("failed", "out of"))]
    for part in ("kernels", "attention", "step"):
        rows = [row for row in content["rows"] if row["part"] == part and "flops" in row]
        assert rows and all(row["of_ceiling"] > 0 for row in rows)

    for own in OWN_FORM:
        (out / own.name).write_bytes(own.read_bytes())
    monkeypatch.setattr(report, "RESULTS", out)
    for argv in (["--against", str(path), str(path)], ["--check"], []):
        with pytest.raises(ValueError, match=rf"{path.name} is a rehearsal"):
            report.main(argv)


# The schema.


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_committed_file_is_valid(path: Path) -> None:
    assert results.load(path)["rows"]


TIMES = {"rounds": 3, "ms_q20": 0.9, "ms": 1.0, "ms_q80": 1.1}
COPY: Row = {"part": "ceilings", "name": "copy", "dtype": "bfloat16", "status": "ok", "bytes": 10**6, **TIMES}
MATMUL: Row = {"part": "ceilings", "name": "matmul", "dtype": "bfloat16", "status": "ok", "flops": 10**9, **TIMES}


def content_of(*rows: Row, kind: str = "gpu", **machine: Any) -> Content:
    """A run's file with these rows."""
    known = {**results.machine(CPU), "kind": kind, "device": "Some GPU", "date": "2030-01-01", **machine}
    return {"rehearsal": False, "machine": known, "rows": list(rows)}


BROKEN: dict[str, Callable[[Content], Any]] = {
    "fields": lambda content: content.pop("machine"),
    "rehearsal": lambda content: content.update(rehearsal=0),
    "lacks date": lambda content: content["machine"].pop("date"),
    "a kind": lambda content: content["machine"].update(kind="tpu"),
    "part='other'": lambda content: content["rows"][0].update(part="other"),
    "no status": lambda content: content["rows"][0].pop("status"),
    "no name": lambda content: content["rows"][0].pop("name"),
    "column mss": lambda content: content["rows"][0].update(mss=1),
    "rounds=True": lambda content: content["rows"][0].update(rounds=True),
    "ms='1'": lambda content: content["rows"][0].update(ms="1"),
    "status='fine'": lambda content: content["rows"][0].update(status="fine"),
    "without its spread": lambda content: content["rows"][0].pop("ms_q80"),
    "outside its quantiles": lambda content: content["rows"][0].update(ms=2.0),
    "second about": lambda content: content["rows"].append(content["rows"][0]),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_what_is_not_valid_is_named(sentence: str, tmp_path: Path) -> None:
    content = content_of(COPY, MATMUL)
    results.validate(content)
    broken = copy.deepcopy(content)
    BROKEN[sentence](broken)
    (tmp_path / "file.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=rf"^file.json: .*{sentence}"):
        results.load(tmp_path / "file.json")


def test_a_run_never_takes_anothers_place(tmp_path: Path) -> None:
    machine = {"device": "NVIDIA H200 (SXM)", "date": "2030-01-01"}
    for name in ("nvidia-h200-sxm_2030-01-01", "nvidia-h200-sxm_2030-01-01_2", "nvidia-h200-sxm_2030-01-01_3"):
        path = results.new_path(tmp_path, machine)
        assert path == tmp_path / f"{name}.json"
        path.touch()


def test_what_nvidia_smi_says_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first GPU; nothing where it answers otherwise, or is not there."""
    script = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert results.query_gpu("a", "b") == {} or DEVICE.type == "cuda"
    for answer, found in (
        ("1980 MHz, 35", {"clocks.sm": "1980 MHz", "temperature.gpu": "35"}),
        ("No devices were found", {}),
    ):
        script.write_text(f"#!/bin/sh\necho '{answer}'; echo 'another'\n")
        script.chmod(0o755)
        assert results.query_gpu("clocks.sm", "temperature.gpu") == found


def test_a_share_is_of_this_runs_ceilings(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run.json", CPU)
    recorder.add([COPY, MATMUL])  # 1 GB/s and 1 TFLOP/s
    assert recorder.ceilings() == {"bytes": 1e9, "flops": 1e12}
    timed = {"part": "attention", "status": "ok", **TIMES, "ms": 2.0, "ms_q80": 2.0}
    recorder.add([{**timed, "flops": 10**9, "bytes": 10**3}, {**timed, "bytes": 10**6}, timed])
    assert [row.get("of_ceiling") for row in recorder.rows[2:]] == [0.5, 0.5, None]


# What is measured.


@pytest.mark.parametrize("provider", ["ours torch", "concatenated", "flex"])
def test_every_attention_is_the_same(provider: str) -> None:
    for shape in attention.REHEARSED:
        inputs = shape.tensors(torch.float32, CPU)
        with torch.no_grad():
            out = attention.PROVIDERS[provider](*inputs)
        exact = reference.prefix_attention(*(x.double() for x in inputs))
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def attention_rows() -> list[Row]:
    """A rehearsed shape, by every provider."""
    shape = attention.REHEARSED[0]
    inputs = shape.tensors(torch.float32, CPU)
    trials = [attention.Trial(provider, shape, inputs, "forward") for provider in attention.PROVIDERS]
    for trial in trials:
        trial.warm_up(lambda _: None)
        trial.sample(measure.Clock(CPU))
    rows = [trial.row() for trial in trials]
    results.compare(rows)
    return rows


def test_a_failure_of_an_attention_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no\nmore")

    monkeypatch.setitem(attention.PROVIDERS, "ours torch", fail)
    rows = {row["provider"]: row for row in attention_rows()}
    assert rows["ours torch"]["status"] == "failed: RuntimeError: no"
    assert "ms" in rows["concatenated"] and "ms" in rows["flex"]


@pytest.fixture(scope="module")
def student() -> step.Student:
    student = step.Student(step.REHEARSED, CPU)
    for name, value in student.model.named_parameters():
        if "lora_B" in name:  # else student and teacher are equal
            torch.nn.init.normal_(value, std=0.3)
    return student


def test_plain_code_computes_what_ours_does(student: step.Student) -> None:
    """Loss and gradients, and so the choice of K, on every micro-batch."""
    goal = step.objective()
    student.model.eval()  # no dropout: both sides draw nothing
    student.teacher.stopwatch = step.Stopwatch(CPU)
    mask_id, _ = student.special_ids()
    found = []
    for forward in (lambda *inputs: goal.forward(*inputs).loss, step.plain_forward(goal)):
        losses = [forward(student.network, student.teacher, batch, mask_id) for batch in student.batches(goal, 4)]
        found.append((torch.stack(losses), torch.autograd.grad(sum(losses), student.trained)))
    (ours, our_gradients), (plain, plain_gradients) = found
    assert bool((ours.abs() > 1e-4).all())
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(our_gradients, plain_gradients, rtol=1e-3, atol=1e-5)


def test_plain_decoding_is_ours(student: step.Student) -> None:
    mask_id, eos_id = student.special_ids()
    prompt, decoding = student.trajectory.prompt_ids, step.REHEARSED.decoding
    seeds = torch.zeros(1, dtype=torch.int64)
    (ours,) = step.decode(student.network, [prompt], decoding, mask_id=mask_id, eos_id=eos_id, seeds=seeds)
    assert torch.equal(step.plain_decode(student.network, prompt, decoding, mask_id), ours.tokens)


def test_an_update_moves_the_adapter_and_its_phases_add_up(student: step.Student) -> None:
    goal = step.objective()
    before = [value.detach().clone() for value in student.trained]
    seconds = student.update(student.batches(goal, 4), lambda *inputs: goal.forward(*inputs).loss).seconds
    assert any(not torch.equal(old, new) for old, new in zip(before, student.trained, strict=True))
    assert seconds["update"] == pytest.approx(sum(seconds[name] for name in ("teacher", "student", "optimiser")))
    assert min(seconds.values()) > 0


def test_the_peak_of_an_update_is_the_highest_of_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A phase has what was used at most while it ran, and not what was in a phase within it."""
    used = {"now": 0, "most": 0}

    def use(count: int) -> None:
        used.update(now=count, most=max(used["most"], count))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: used["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: used.update(most=used["now"]))
    stopwatch = step.Stopwatch(torch.device("cuda"))
    use(99)  # before
    use(5)
    with stopwatch.phase("student"):
        for teacher in (20, 10):
            with stopwatch.phase("teacher"):
                use(teacher)
                use(6)
            use(teacher // 2 + 2)
            use(5)
    with stopwatch.phase("optimiser"):
        use(8)
    stopwatch.total("update")
    assert stopwatch.peaks == {"student": 12, "teacher": 20, "optimiser": 8, "update": 20}
    assert stopwatch.seconds.keys() == stopwatch.peaks.keys()


@pytest.mark.parametrize("cache", get_args(Cache))
def test_a_rollout_needs_what_it_computes(cache: Cache, student: step.Student, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens as the embedding sees them, products as PyTorch counts them, and the keys that each query may see."""
    from torch.utils.flop_counter import FlopCounterMode

    pairs: list[int] = []

    def count(name: str, others: Callable[..., int]) -> None:
        original = getattr(BidirectionalLayer, name)

        def attend(layer: Any, query: Any, key: Any, *rest: Any) -> Any:
            pairs.append(query.shape[2] * (key.shape[2] + others(*rest)))
            return original(layer, query, key, *rest)

        monkeypatch.setattr(BidirectionalLayer, name, attend)

    count("_attend", lambda *_: 0)
    count("_attend_to_prefix", lambda *rest: int(rest[-1].prefix_mask.sum()))
    tokens: list[int] = []
    embedding = student.network.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].numel()))
    with FlopCounterMode(display=False) as counter:
        student.rollout("ours", cache)
    hook.remove()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    flops = products + 4 * step.REHEARSED.config.d_model * sum(pairs)
    assert step.rollout_needs(student, cache) == {"tokens": sum(tokens), "flops": flops}


def test_nf4_is_what_quantize_gives(tmp_path: Path) -> None:
    """The bits that transformers makes of a checkpoint with these weights, and the same parts as they were."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'dopsd[quant]'")
    torch.manual_seed(0)
    LLaDAModelLM(step.REHEARSED.config).save_pretrained(tmp_path)
    loaded = LLaDAModelLM.from_pretrained(tmp_path, quantization_config=quantization("nf4")).state_dict()
    network = step.Student(step.REHEARSED, CPU, "nf4").network
    made = {
        name.replace(".base_layer", ""): value for name, value in network.state_dict().items() if "lora_" not in name
    }
    assert sum(name.endswith("nf4") for name in made) == 7 * step.REHEARSED.config.n_layers
    assert made.keys() == loaded.keys()
    assert all(torch.equal(made[name], value) for name, value in loaded.items())


def test_one_student_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[step.Student] = weakref.WeakSet()
    built = []

    class Counted(step.Student):
        def __init__(self, setting: step.Setting, device: torch.device, quantize: step.Quantize) -> None:
            assert not alive
            super().__init__(setting, device)
            alive.add(self)
            built.append(quantize)

    kinds: list[step.Quantize] = ["none", "nf4", "none"]
    wanted = [step.Trial("ours", 4, reuse="block", quantize=kind) for kind in kinds]
    monkeypatch.setattr(step, "Student", Counted)
    monkeypatch.setattr(step, "trials", lambda setting: wanted)
    monkeypatch.setattr(step, "is_bitsandbytes_available", lambda: True)
    recorder = Recorder(None, CPU)
    assert step.measure(recorder, float("inf"), True) and built == kinds
    assert {row["status"] for row in recorder.rows} == {"ok"} and not alive


def test_without_bitsandbytes_nf4_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [trial for trial in step.trials(step.REHEARSED) if trial.quantize == "nf4"]
    monkeypatch.setattr(step, "trials", lambda setting: wanted)
    monkeypatch.setattr(step, "is_bitsandbytes_available", lambda: False)
    recorder = Recorder(None, CPU)
    assert step.measure(recorder, float("inf"), True)
    assert [row["variant"] for row in recorder.rows] == ["quantize=nf4", "quantize=nf4, reuse=block"]
    assert all(row["status"].startswith("skipped: ") and "pip install" in row["status"] for row in recorder.rows)


def test_further_rounds_are_for_time_to_spare(student: step.Student) -> None:
    """A trial that has used its share has had one round."""
    for enough, rounds in ((0.0, 1), (float("inf"), step.ROUNDS)):
        recorder = Recorder(None, CPU)
        trial = step.Trial("ours", 1, "rollout", cache="dual")
        assert step.measure_trial(recorder, student, trial, enough, float("inf"))
        assert [row["rounds"] for row in recorder.rows] == [rounds]


def test_the_arithmetic_is_that_of_the_layers() -> None:
    """Against the products that PyTorch counts."""
    from torch.utils.flop_counter import FlopCounterMode

    plain = step.Student(step.REHEARSED, CPU)
    config: Any = step.REHEARSED.config
    ids = torch.zeros(3, 21, dtype=torch.int64)
    read = torch.arange(4).expand(3, 4)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain.model.disable_adapter():
        plain.network.config._attn_implementation = "eager"
        plain.network.hidden_states(ids, None, read)
    assert sum(step.network_flops(config, 3 * 21, 3 * 21**2, 12)) == counter.get_total_flops()


def test_reuse_is_fed_less(student: step.Student) -> None:
    tokens = {}
    for reuse in ("none", "prompt", "block"):
        batches = list(student.batches(step.objective(reuse), 4))
        needs = step.update_needs(student, batches)["update"]
        tokens[reuse] = (needs["tokens"], needs["flops"])
        assert isinstance(batches[0].student, PackedInputs) is (reuse != "none")
    assert tokens["block"] < tokens["prompt"] < tokens["none"]


def test_no_memory_and_no_time_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "is_bitsandbytes_available", lambda: True)
    recorder = Recorder(None, CPU)
    assert step.measure(recorder, 0.0, True)
    assert {row["status"] for row in recorder.rows} == {"out of time"}

    def build(*_: Any) -> Any:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(step, "Student", build)
    recorder.rows.clear()
    assert step.measure(recorder, float("inf"), True)
    assert {row["status"] for row in recorder.rows} == {"out of memory"}
    assert len(recorder.rows) == len(step.trials(step.REHEARSED))


def test_training_is_judged_by_two_standard_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = train.recorded()
    error = 2 * (2 * recorded["standard_error_recorded"] ** 2) ** 0.5
    run: dict[str, Any] = dict.fromkeys(train.KEPT, 0.5) | {"standard_error_after": recorded["standard_error_recorded"]}
    recorder = Recorder(None, CPU)
    for off, fine in ((0.99 * error, True), (-0.99 * error, True), (1.01 * error, False), (-1.01 * error, False)):
        report_of = {**run, "accuracy_after": recorded["accuracy_recorded"] + off}
        monkeypatch.setattr(train.tiny_recipe, "run", lambda *_, found=report_of, **__: found)
        assert train.measure(recorder, float("inf"), False) is fine
    for error_of, status in (
        (subprocess.TimeoutExpired("train", 1), "out of time"),
        (subprocess.CalledProcessError(3, "train"), "failed: dopsd.train ended with 3"),
    ):

        def fail(*_: Any, error: Exception = error_of, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(train.tiny_recipe, "run", fail)
        assert train.measure(recorder, float("inf"), False) is (status == "out of time")
        assert recorder.rows[-1]["status"] == status


def test_ceilings_are_of_a_copy_and_a_product() -> None:
    recorder = Recorder(None, CPU)
    assert ceilings.measure(recorder, float("inf"), True)
    assert recorder.ceilings().keys() == {"bytes", "flops"}


def test_no_test_starts_after_the_deadline_and_every_outcome_is_written(tmp_path: Path) -> None:
    """What passes, fails, is skipped or has no time left, each as a row."""
    (tmp_path / "test_some.py").write_text(
        "import time, pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no')\ndef test_skipped(): pass\n"
        "def test_waits(): time.sleep(0.2)\n"
        "def test_late(): assert False\n"
    )
    script = (
        "import sys, time, pytest; from benchmarks import until\n"
        "late = f'--until={time.time() + 3600}'\n"
        "class Late:\n"
        "    def pytest_runtest_logreport(self, report):\n"
        "        if 'waits' in report.nodeid: config.option.until = 0.0\n"
        "    def pytest_configure(self, config): globals()['config'] = config\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', late, '--outcomes={tmp_path}/run.json',\n"
        f"    '--rootdir={tmp_path}', '{tmp_path}/test_some.py'], plugins=[until, Late()]))\n"
    )
    done = subprocess.run([gpu.sys.executable, "-c", script], cwd=results.ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    found = {row["name"].partition("::")[2]: row["status"] for row in rows}
    assert found.pop("test_fails").startswith("failed: ")
    assert found == {
        "test_passes": "ok",
        "test_skipped": "skipped: no",
        "test_waits": "ok",
        "test_late": until.OUT_OF_TIME,
    }


def test_what_fails_is_named_in_a_line() -> None:
    def fail() -> None:
        raise ValueError("one\ntwo")

    assert measure.attempt(fail) == "failed: ValueError: one"
    assert measure.attempt(lambda: None) == "ok"


# What is shown.


def gpu_run() -> Content:
    """A run with invented figures in every part."""
    rows: list[Row] = [
        {**COPY, "clocks": {"clocks.sm": "1980 MHz"}},
        MATMUL,
        {"part": "tests", "name": "a", "status": "ok", "seconds": 1.0},
        {"part": "tests", "name": "b", "status": "failed: wrong", "seconds": 1.0},
    ]
    recorder = Recorder(None, CPU)
    recorder.content = content_of(*rows)
    recorder.add(attention_rows())
    step.measure(recorder, float("inf"), True)
    recorder.add([step.Trial("ours", 99).about(None, step.REHEARSED, "update", "out of memory")])
    trained = dict.fromkeys((*train.KEPT, "accuracy_recorded", "standard_error_recorded"), 0.5)
    recorder.add([{"part": "train", "seed": 0, "status": "ok", **trained, "agrees": True}])
    results.validate(recorder.content)
    return recorder.content


def test_every_part_of_a_gpu_run_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    new = ("ceilings", "tests", "kernel_ceilings", "step", "train")
    assert {report.SECTIONS[name]().partition("\n")[0] for name in new} == {"Not measured."}
    assert report.step().count("| not measured |") == 7
    content = gpu_run()
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert "| copy | bfloat16 | 1 GB/s | 1980 MHz |" in report.ceilings()
    assert "| matmul | bfloat16 | 1 TFLOP/s |" in report.ceilings()
    assert "1 failed, 1 ok." in report.tests() and "- `b`: failed: wrong" in report.tests()
    assert "| 4 | 12 | forward | concatenated |" in report.attention() and "attention.png" in report.attention()
    shown = report.step()
    assert "| plain | 4 | update |" in shown and "| ours cache=dual | 1 | rollout |" in shown
    assert "| ours | 99 | update | out of memory |" in shown
    assert "| 0 | 50.0 ± 50.0 | 50.0 ± 50.0 | 50.0 ± 50.0 | yes | 0 |" in report.train()
    assert report.kernel_ceilings() == "Not measured."
    # A newer file with one part replaces that part alone, and only if it was run.
    late = {"part": "train", "seed": 0, "status": "out of time"}
    newer = content_of({**COPY, "bytes": 7 * 10**6}, MATMUL, late, date="2030-01-02")
    (tmp_path / "b.json").write_text(json.dumps(newer))
    assert "out of time" not in report.train()
    assert "| 7 GB/s |" in report.ceilings() and report.step() == shown
    plots.draw_attention({"gpu": content}, tmp_path)
    plots.draw_step(content, tmp_path)
    for name in ("attention", "step"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


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
        row("ours", 1, variant="cache=dual", phase="rollout", states_per_forward=1),
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


def test_against_an_older_run_what_became_slower_comes_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(*times: tuple[float, float, float]) -> list[Row]:
        names = ("noisy", "slow", "slower", "fast")
        return [
            {**COPY, "name": name, "ms_q20": low, "ms": middle, "ms_q80": high}
            for name, (low, middle, high) in zip(names, times, strict=False)
        ]

    old = tmp_path / "old.json"
    old.write_text(json.dumps(content_of(*rows((1, 2, 3), (1, 1, 1.1), (1, 1, 1.1), (5, 5, 5)))))
    new = content_of(*rows((2.5, 4, 5), (1.2, 1.2, 1.3), (1.2, 1.5, 1.6), (4, 4, 4.5)), date="2030-01-02")
    new["rows"].append(MATMUL)
    (tmp_path / "new.json").write_text(json.dumps(new))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for argv in ([str(old)], [str(old), str(tmp_path / "new.json")]):
        assert report.main(["--against", *argv]) == 0
        text = capsys.readouterr().out
        order = [text.index(word) for word in ("Slower: 2", " slower ", " slow ", "Faster: 1", " fast ")]
        assert order == sorted(order)
        assert text.index("Within the spread: 1") < text.index(" noisy ")
        assert "1.500" in text and "0.800" in text and "Only in the new file: 1" in text
    with pytest.raises(SystemExit):
        report.main(["--against", str(old), str(old), str(old)])
    (tmp_path / "new.json").unlink()
    with pytest.raises(SystemExit):
        report.main(["--against", str(old)])
    assert "no file to compare old.json with" in capsys.readouterr().err


def test_the_sizes_on_a_gpu_are_llada_8b() -> None:
    config: Any = step.LLADA_8B.config
    weights = config.n_layers * (4 * config.d_model**2 + 3 * config.d_model * config.mlp_hidden_size)
    assert weights + 2 * config.vocab_size * config.d_model == pytest.approx(8.02e9, rel=0.01)
    assert step.LLADA_8B.decoding.total_steps == 128
