"""Memory: what is planned is what is measured, and running out of it changes no result."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dopsd import files, rollout, run
from dopsd.distillation import Distillation
from dopsd.errors import RunError, UsageError
from dopsd.memory import meter, planner
from dopsd.memory.planner import Curve, Persistent, Planner, even_sizes
from dopsd.memory.probe import RunProbe
from dopsd.method import Sizes
from dopsd.objective import Objective
from dopsd.out_of_memory import is_out_of_memory, unless_out_of_memory
from dopsd.step_batch import collate, step_batches
from dopsd.tasks.sudoku import Sudoku
from dopsd.trainer import Trainer
from dopsd.units import GIB, read_bytes
from dopsd_kernels.common import workspace

ROOT = Path(run.__file__).parents[1]
Make = Callable[..., Trainer]


class Right(Sudoku):
    """Sudoku in which every response is right."""

    def score(self, row: Any, response: str) -> float:
        return 1.0


# ---- budgets ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24", 24 * GIB), ("24GiB", 24 * GIB), ("1.5 gib", 1.5 * GIB), ("0.5", 50 * GIB), ("80%", 80 * GIB)],
)
def test_budgets(text: str, expected: float) -> None:
    """Of a device with 100 GiB."""
    assert read_bytes("memory_budget", text, 100 * GIB) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "101", "101%", "24GB", "nan", "1e3"])
def test_budgets_that_are_none(text: str) -> None:
    """Also more than the device has."""
    with pytest.raises(UsageError, match="memory_budget must be "):
        read_bytes("memory_budget", text, 100 * GIB)
    if text != "101":
        with pytest.raises(UsageError, match="gpu must be "):
            read_bytes("gpu", text.replace("101%", "80%"), None)


def test_the_largest_workspace_is_the_ops_default() -> None:
    """Which the constants of the ops say."""
    defaults = {"cpu": workspace.CPU_BYTES, "cuda": workspace.GPU_BYTES}
    assert defaults == planner.MOST_WORKSPACE
    assert [planner.workspace_for(size * GIB, "cuda") >> 20 for size in (0, 4, 100)] == [16, 64, 256]


# ---- the planner ----


class Line:
    """A probe whose peaks are known: 1000 bytes, and 10 or 2 a token; a phase of its own in small sizes."""

    persistent = Persistent(600, 100, 100, 200, 0)

    def __init__(self, most: int = 1 << 60) -> None:
        self.most, self.asked = most, []

    def tokens(self, states: int) -> int:
        return 100 * states

    def training(self, states: int, checkpointing: bool) -> int | None:
        peak = 1000 + max(500, (2 if checkpointing else 10) * self.tokens(states))
        self.asked.append((states, checkpointing, peak))
        return None if peak > self.most else peak

    def decoding(self, sequences: int) -> int | None:
        return 900 + 50 * sequences


@pytest.mark.parametrize(
    ("budget", "states", "checkpointing", "sequences"),
    [
        (1000 + 10 * 100 * 24, 24, False, 8),  # all states
        (1000 + 10 * 100 * 16, 24, True, 8),  # 12 without checkpointing are too few tokens
        (1000 + 10 * 100 * 23, 24, True, 8),
        (1000 + 2 * 100 * 9, 8, True, 8),  # three equal micro-batches, and no larger ones
        (1000 + 2 * 100 * 2, None, True, 8),  # the loss's workspace, or whatever it is that small sizes need
        (1500, 2, True, 8),  # most of one state's peak is fixed, which two tell
        (1200, None, True, 6),
    ],
)
def test_a_plan_is_the_fastest_that_fits(budget: int, states: int | None, checkpointing: bool, sequences: int) -> None:
    """24 states of 100 tokens: what is chosen fits, what is next does not, and the prediction is the truth."""
    probe = Line()
    planner = Planner(probe, budget, 24, 8, workspace_bytes=100)
    plan = planner.plan()
    if states is None:
        assert plan is None and planner.least().training > budget
        return
    assert plan is not None
    assert plan.sizes == Sizes(states, checkpointing, min(8, (budget - 900) // 50), 100)
    assert plan.training == probe.training(states, checkpointing) and plan.training <= budget
    assert plan.decoding == probe.decoding(plan.sizes.sequences_per_forward)
    assert sum(plan.parts().values()) == plan.training


def test_many_tokens_are_enough_without_checkpointing() -> None:
    """From ENOUGH_TOKENS on, keeping activations is faster than larger micro-batches."""
    plan = Planner(Line(), 1000 + 10 * 5000, 100, 8, 100).plan()
    assert plan is not None and plan.sizes.states_per_forward == 50 and not plan.sizes.checkpointing


def test_memory_that_runs_out_in_a_probe_is_a_size_that_does_not_fit() -> None:
    """The card is smaller than the budget says: the plan is for the card, and predicted as measured."""
    probe = Line(most=1000 + 2 * 100 * 9)
    plan = Planner(probe, 1 << 40, 24, 8, 100).plan()
    assert plan is not None and plan.sizes.states_per_forward == 8 and plan.sizes.checkpointing
    assert plan.training == 1000 + 2 * 100 * 8


def test_probes_are_few_and_predicted_to_fit() -> None:
    """No probe is above the budget where peaks are a line, none is asked twice, and large runs take a handful."""
    probe = Line()
    budget = 1000 + 10 * 100 * 3000
    Planner(probe, budget, 4096, 8, 100).plan()
    assert all(peak <= budget for _, _, peak in probe.asked)
    assert len(probe.asked) == len(set(probe.asked)) <= 10


def test_a_curve_is_straight_between_and_behind_what_was_measured() -> None:
    """Points at 0, 1 and 8: predictions at 4 and 16."""
    curve = Curve({1: 20, 8: 90}.get, lambda size: size, 0)
    assert curve.at(1) == 0
    assert curve.largest(1000, [1, 8]) == 8
    assert (curve.at(4), curve.at(8), curve.at(16)) == (50, 90, 170)


def test_even_sizes() -> None:
    """Of ten: 1, 2 (five batches), 3 and 4 (four and three), 5, 10."""
    assert even_sizes(10) == [1, 2, 3, 4, 5, 10]
    assert even_sizes(1) == [1]


# ---- probes ----


measurable = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="a CPU's peaks can't be measured here"
)


@measurable
@pytest.mark.parametrize("reuse", ["none", "prompt", "block"])
def test_no_micro_batch_of_a_run_is_larger_than_a_probe(make_trainer: Make, random_model: Path, reuse: str) -> None:
    """Every micro-batch of real examples computes at most the tokens of the made-up one of its size."""
    trainer = make_trainer(
        *("--model", str(random_model), "--steps", "24", "--reuse", reuse, "--stop_at_eos", "false"), task=Right()
    )
    rows = [row for _, row in trainer.train_dataset]
    options = trainer.rollouts, trainer.teaching, trainer.args
    probe = RunProbe(trainer.method, meter.ResidentMeter(), rows, *options)
    assert probe.states == 2 * 24
    (examples,) = trainer.roll_out([trainer.train_dataset[number] for number in range(4)])
    for size in (1, 2, 5, 24, 40):
        collation = {"reuse": reuse, **trainer.method.collation()}
        tokens = [batch.student.tokens for batch in step_batches(examples, size, **collation)]
        index = [(number, step) for number, example in enumerate(examples) for step in range(len(example.steps))]
        parts = [index[start : start + size] for start in range(len(index) - size + 1)]
        tokens += [collate(examples, part, **collation).student.tokens for part in parts]
        assert max(tokens) == probe.tokens(size) and len(probe.batch(size)) == size


@measurable
def test_a_budget_changes_no_result(make_trainer: Make, random_model: Path) -> None:
    """Dropout and all: with a budget, and without one but with the sizes that it led to, the weights are the same."""
    options = ("--model", str(random_model), "--lora_dropout", "0.2", "--teacher", "ema")
    planned = make_trainer(*options, "--memory_budget", "0.9", task=Right())
    assert planned.memory.plan is not None
    assert all(parameter.grad is None for parameter in planned.student.parameters())
    plain = make_trainer(*options, task=Right())
    plain.method.resize(planned.method.sizes)
    finals = []
    for trainer in (planned, plain):
        torch.manual_seed(3)
        trainer.train()
        finals.append({name: value.detach().clone() for name, value in trainer.student.named_parameters()})
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())
    log = planned.state.log_history[0]
    assert log["peak_gib"] > 0 and log["predicted_peak_gib"] == pytest.approx(planned.memory.plan.peak / GIB)
    assert "peak_gib" not in plain.state.log_history[0]


@measurable
@pytest.mark.parametrize("budget", ["0.9", "none"])
def test_checkpointing_is_as_the_sizes_say(
    make_trainer: Make, random_model: Path, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every probe and update, also where a recipe asks for it and the plan does without."""
    seen: list[tuple[bool, bool]] = []
    distil = Distillation.backward

    def noted(distillation: Distillation, *args: Any, **kwargs: Any) -> Any:
        network = distillation.decoder.model
        layers = [getattr(module, "gradient_checkpointing", False) for module in network.modules()]
        seen.append((distillation.sizes.checkpointing, any(layers)))
        assert not network.get_input_embeddings()._forward_hooks  # which would make them require a gradient
        return distil(distillation, *args, **kwargs)

    monkeypatch.setattr(Distillation, "backward", noted)
    options = ("--model", str(random_model), "--gradient_checkpointing", "true", "--memory_budget", budget)
    trainer = make_trainer(*options, task=Right())
    probes = len(seen)
    trainer.train()
    assert all(asked == actual for asked, actual in seen)
    if budget == "none":
        assert probes == 0 and {asked for asked, _ in seen} == {True}
    else:
        assert {asked for asked, _ in seen[:probes]} == {True, False} and not any(asked for asked, _ in seen[probes:])


# A training command with a budget of 0.6 GiB beside what is persistent when nothing is loaded.
PROGRAM = """
import sys

from dopsd import cli, run
from dopsd.memory.meter import CUDA_ALLOWANCE, ResidentMeter
from dopsd.units import GIB

persistent = CUDA_ALLOWANCE
if sys.argv.pop(1) == "cpu":
    meter = ResidentMeter()
    meter.take_peak()
    persistent = meter.take_peak()
sys.argv += ["--memory_budget", f"{persistent / GIB + 0.6:.2f}GiB"]
cli.run(run.main)
"""


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=measurable),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
        ),
    ],
)
def test_what_is_measured_lies_within_a_tenth_of_what_was_predicted(
    device: str, small_run: list[str], tmp_path: Path
) -> None:
    """An update of a run whose budget asks for two micro-batches; in the report, the plan and both figures."""
    output = tmp_path / "run"
    unseen = meter.CUDA_ALLOWANCE if device == "cuda" else 0
    options = ["--stop_at_eos", "false", "--correct_only", "false", "--steps", "24", "--lora_r", "64", "--pass_k", "1"]
    options += ["--per_device_train_batch_size", "12", "--eval_problems", "2", "--max_steps", "1"]
    options += ["--sequences_per_forward", "8", "--eval_strategy", "no", "--save_strategy", "no", "--bf16", "false"]
    options += ["--use_cpu", str(device == "cpu")]
    words = [sys.executable, "-c", PROGRAM, device, *small_run, *options, "--output_dir", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((output / "report.json").read_text())["memory"]
    assert result["predicted"]["whole"] <= result["budget"]
    assert result["parts"]["activations"] > 0.25 * GIB
    assert result["predicted_peak"] == result["predicted"]["whole"] - unseen
    assert 0.9 * result["predicted_peak"] < result["measured_peak"] < 1.1 * result["predicted_peak"]
    states, rows = result["sizes"]["states_per_forward"], (output / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    for row in rows[1:]:
        log = dict(zip(names, row.split(","), strict=True))
        if log["loss"]:
            assert float(log["states"]) == 12 * 24 > states
            assert float(log["peak_gib"]) == pytest.approx(float(log["predicted_peak_gib"]), rel=0.1)
    assert "predicted, not measured" in done.stdout and "GiB predicted" in " ".join(done.stdout.split())


# ---- running out ----


class Scarce:
    """An objective's forward for which memory runs out above ``most`` states, but for the first ``spared`` calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int, spared: int = 0) -> None:
        self.most, self.failed, calls = most, 0, []
        forward = Objective.forward

        def scarce(objective: Objective, model: Any, teacher: Any, batch: Any, mask_id: int) -> Any:
            calls.append(len(batch))
            output = forward(objective, model, teacher, batch, mask_id)
            if len(batch) > self.most and len(calls) > spared:
                self.failed += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return output

        monkeypatch.setattr(Objective, "forward", scarce)


@pytest.fixture
def exact_trainer(make_trainer: Make, random_model: Path) -> Iterator[Trainer]:
    """In fp64, without dropout, two slices a batch, two prompts of 24 states each."""
    trainer = make_trainer(
        *("--model", str(random_model), "--lora_dropout", "0", "--steps", "24", "--states_per_forward", "8"),
        *("--updates_per_batch", "2", "--stop_at_eos", "false"),
        task=Right(),
    )
    trainer.student.double()
    yield trainer


def update(trainer: Trainer) -> dict[str, Tensor]:
    """The gradient of the first slice of the first two rows."""
    trainer.student.zero_grad()
    trainer.slices = []
    trainer.training_step(trainer.student, {"rows": [trainer.train_dataset[number] for number in (0, 1)]})
    return {name: p.grad.clone() for name, p in trainer.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("most", "expected"), [(4, 4), (3, 2), (1, 1)])
def test_running_out_of_memory_changes_no_gradient(
    exact_trainer: Trainer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    most: int,
    expected: int,
) -> None:
    """The slice is done again as a whole, with half the states, as often as needed; nothing else is touched, and the
    next slice starts with the size that worked."""
    grads = update(exact_trainer)
    capsys.readouterr()
    scarce = Scarce(monkeypatch, most, spared=1)  # whose gradient is there when the second micro-batch fails
    others = update(exact_trainer)
    assert exact_trainer.method.sizes.states_per_forward == expected and scarce.failed == {4: 1, 2: 2, 1: 3}[expected]
    assert exact_trainer.batch_size == 2 and [len(examples) for examples in exact_trainer.slices] == [2]
    assert grads.keys() == others.keys() and any(bool(grad.any()) for grad in grads.values())
    for name, grad in grads.items():
        assert float((grad - others[name]).abs().max()) <= 1e-11 * float(grad.abs().max()) + 1e-300, name
    said = capsys.readouterr().out
    assert said.count("out of memory in training") == scarce.failed and f"states_per_forward is {expected}" in said
    exact_trainer.student.zero_grad()
    exact_trainer.training_step(exact_trainer.student, {"rows": []})
    assert scarce.failed == {4: 1, 2: 2, 1: 3}[expected] and not exact_trainer.slices


def test_after_single_states_come_checkpointing_and_an_error(
    exact_trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing fits: the last resort is tried, and then a sentence says what would help."""
    Scarce(monkeypatch, 0)
    with pytest.raises(RunError, match=r"out of memory at update 1 with one state at a time; .*--reuse block"):
        update(exact_trainer)
    assert exact_trainer.method.sizes.checkpointing and exact_trainer.method.sizes.states_per_forward == 1
    assert "activations are checkpointed" in capsys.readouterr().out
    assert any(
        getattr(module, "gradient_checkpointing", False) for module in exact_trainer.method.decoder.model.modules()
    )


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("can't allocate memory: you tried")])
def test_decoding_goes_on_with_fewer_sequences(
    make_trainer: Make, random_model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """In rollouts and in validation: the same responses, with batches that fit; one sequence too many is an error."""
    trainer = make_trainer("--model", str(random_model), "--pass_k", "3", task=Sudoku())
    rows = [trainer.train_dataset[number] for number in range(5)]
    expected = trainer.roll_out(rows), trainer.decode_rows([row for _, row in rows], trainer.rollouts.decoding(), "x")
    decode, most = rollout.decode, 2

    def scarce(model: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        if len(prompts) > most:
            raise error
        return decode(model, prompts, *args, **kwargs)

    monkeypatch.setattr("dopsd.rollout.decode", scarce)
    trainer.method.resize(replace(trainer.method.sizes, sequences_per_forward=5))
    found = trainer.roll_out(rows), trainer.decode_rows([row for _, row in rows], trainer.rollouts.decoding(), "x")
    assert trainer.method.decoder.batch_size == trainer.method.sizes.sequences_per_forward == 2
    assert [[example.to_json() for example in part] for part in found[0]] == [
        [example.to_json() for example in part] for part in expected[0]
    ]
    assert [one.response for one in found[1]] == [one.response for one in expected[1]]
    most = 0
    with pytest.raises(RunError, match="one sequence at a time"):
        trainer.roll_out(rows)


def test_what_failed_is_let_go_of() -> None:
    """By the time of the next attempt the tensors of the failed one are gone; other errors pass."""
    graphs = []

    def fail() -> int:
        big = torch.ones(3, requires_grad=True) * 2
        graphs.append(weakref.ref(big))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def other() -> int:
        raise RuntimeError("shapes")

    assert unless_out_of_memory(fail) is None
    assert [graph() for graph in graphs] == [None]
    with pytest.raises(RuntimeError, match="shapes"):
        unless_out_of_memory(other)
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 58)
    assert is_out_of_memory(raised.value) == ("allocate" in str(raised.value))


@measurable
def test_a_plan_goes_along_and_sizes_survive_a_resume(
    make_trainer: Make, random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halved sizes have a prediction of their own, and a run that goes on has the sizes that it ended with."""
    options = ("--model", str(random_model), "--save_steps", "1", "--max_steps", "1", "--stop_at_eos", "false")
    trainer = make_trainer(*options, "--memory_budget", "0.9", task=Right())
    assert trainer.memory.plan is not None
    before, states = trainer.memory.plan, trainer.method.sizes.states_per_forward
    assert states == 2 * 12
    Scarce(monkeypatch, states // 2)
    trainer.train()
    assert trainer.memory.plan.sizes == trainer.method.sizes == replace(before.sizes, states_per_forward=states // 2)
    assert trainer.memory.plan.training <= before.training
    monkeypatch.undo()
    resumed = make_trainer(*options, "--max_steps", "2", task=Right())
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")
    assert resumed.method.sizes == trainer.method.sizes
    assert resumed.method.objective.workspace_bytes == trainer.method.sizes.workspace_bytes
    assert files.plain(trainer.memory.plan.to_json())["sizes"]["states_per_forward"] == states // 2


# ---- optimisers ----


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_moments_in_eight_bits(make_trainer: Make, optim: str) -> None:
    """The shipped model's larger adapter weights have moments of one byte, and move."""
    trainer = make_trainer("--optim", optim, "--lora_r", "64", task=Right())
    before = {name: value.detach().clone() for name, value in trainer.student.named_parameters()}
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.student.named_parameters())
    for parameter, state in trainer.optimizer.state.items():
        held = sum(value.nbytes for value in state.values() if torch.is_tensor(value)) - state["qmap1"].nbytes
        assert state["state1"].dtype == state["state2"].dtype == torch.uint8
        assert held - state["qmap2"].nbytes == pytest.approx(
            planner.optimizer_bytes(optim) * parameter.numel(), rel=0.1
        )
