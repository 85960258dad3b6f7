"""The benchmark of an update: plain code computes what ours does, and the arithmetic is what is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from benchmarks import step
from benchmarks.results import Recorder
from dopsd import sampler
from dopsd.cache import Cache
from dopsd.models import quantization
from dopsd.models.bidirectional import BidirectionalLayer
from dopsd.models.llada import LLaDAModelLM

CPU = torch.device("cpu")


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
    found = []
    for forward in (lambda *inputs: goal.forward(*inputs).loss, step.plain_forward(goal)):
        losses = [
            forward(student.network, student.teacher, batch, student.mask_id) for batch in student.batches(goal, 4)
        ]
        found.append((torch.stack(losses), torch.autograd.grad(sum(losses), student.trained)))
    (ours, our_gradients), (plain, plain_gradients) = found
    assert bool((ours.abs() > 1e-4).all())
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(our_gradients, plain_gradients, rtol=1e-3, atol=1e-5)


def test_plain_decoding_is_ours(student: step.Student) -> None:
    decoding, ids = step.REHEARSED.decoding, {"mask_id": student.mask_id, "eos_id": student.eos_id}
    (ours,) = step.decode(student.network, [student.prompt], decoding, **ids, seeds=torch.zeros(1, dtype=torch.int64))
    assert torch.equal(step.plain_decode(student.network, student.prompt, decoding, student.mask_id), ours.tokens)


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

    # As with weights of 16 bits, which the benchmark is of: adapters have products of their own.
    monkeypatch.setattr(sampler, "merged_adapters", nullcontext)
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
    counts = counter.get_flop_counts()["Global"]
    products = counts[torch.ops.aten.mm] + counts[torch.ops.aten.addmm]  # the latter add a residual as they go
    flops = products + 4 * step.REHEARSED.config.d_model * sum(pairs)
    assert step.rollout_needs(step.REHEARSED, cache) == {"tokens": sum(tokens), "flops": flops}


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

    wanted = [
        step.Way("ours", size, reuse="block", quantize=kind) for size, kind in ((4, "none"), (4, "nf4"), (8, "none"))
    ]
    monkeypatch.setattr(step, "Student", Counted)
    monkeypatch.setattr(step, "ways", lambda setting: wanted)
    monkeypatch.setattr(step, "is_bitsandbytes_available", lambda: True)
    recorder = Recorder(None)
    assert step.measure(recorder, float("inf"), True) and built == ["none", "nf4", "none"]
    assert {row["status"] for row in recorder.rows} == {"ok"} and not alive
    assert all(row["of_ceiling"] > 0 for row in recorder.rows)
    # Done once, it is not done again.
    assert step.measure(recorder, float("inf"), True) and len(built) == 3


def test_further_rounds_are_for_time_to_spare(student: step.Student) -> None:
    """A way that has used its share has had one round."""
    for enough, rounds in ((0.0, 1), (float("inf"), step.ROUNDS)):
        (row,) = step.measure_way(student, step.Way("ours", 1, "rollout", cache="block"), enough, True)
        assert row["rounds"] == rounds


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
    whole = {
        reuse: step.update_needs(student, list(student.batches(step.objective(reuse), 4)))["update"]
        for reuse in get_args(step.Reuse)
    }
    for column in ("tokens", "flops"):
        assert whole["block"][column] < whole["prompt"][column] < whole["none"][column]


def test_no_memory_no_time_and_no_bitsandbytes_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any) -> Any:
        raise torch.OutOfMemoryError("too large")

    def statuses(until: float) -> list[str]:
        recorder = Recorder(None)
        assert step.measure(recorder, until, True)
        assert len(recorder.rows) == len(step.ways(step.REHEARSED))
        return list(dict.fromkeys(row["status"] for row in recorder.rows))

    monkeypatch.setattr(step, "Student", build)
    monkeypatch.setattr(step, "is_bitsandbytes_available", lambda: True)
    assert statuses(0.0) == ["out of time"] and statuses(float("inf")) == ["out of memory"]
    monkeypatch.setattr(step, "is_bitsandbytes_available", lambda: False)
    late, skipped = statuses(0.0)
    assert late == "out of time" and skipped.startswith("skipped: ") and "pip install" in skipped


def test_the_sizes_on_a_gpu_are_llada_8b() -> None:
    config: Any = step.LLADA_8B.config
    weights = config.n_layers * (4 * config.d_model**2 + 3 * config.d_model * config.mlp_hidden_size)
    assert weights + 2 * config.vocab_size * config.d_model == pytest.approx(8.02e9, rel=0.01)
    assert step.LLADA_8B.decoding.total_steps == 128
