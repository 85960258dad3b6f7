"""The Trainer: what an update does to the weights, what it logs, which adapter it keeps."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

import dopsd.rollout
from dopsd import sampler
from dopsd.cache import BlockCache
from dopsd.models import adapter_parameters
from dopsd.prompt_sampler import PromptSampler
from dopsd.tasks.sudoku import Sudoku
from dopsd.teacher import STUDENT, TEACHER
from dopsd.trainer import Trainer
from dopsd.trajectory import Trajectory

Make = Callable[..., Trainer]


class Graded(Sudoku):
    """Sudoku with a teacher's pet: every response gets ``grade``."""

    def __init__(self, grade: float) -> None:
        self.grade = grade

    def score(self, row: Mapping[str, str], response: str) -> float:
        return self.grade


class After(TrainerCallback):
    """Calls ``action(update)`` at the end of each update."""

    def __init__(self, action: Callable[[int], None]) -> None:
        self.action = action

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.action(state.global_step)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of every parameter, adapters included."""
    return {name: value.detach().clone() for name, value in trainer.student.named_parameters()}


def optimizer_state(trainer: Trainer) -> list[dict[str, Tensor]]:
    """A copy of what the optimiser remembers of each parameter."""
    return [{key: value.clone() for key, value in state.items()} for state in trainer.optimizer.state.values()]


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Names of tensors that are not the same bits."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def batch_of(trainer: Trainer, *numbers: int) -> dict[str, Any]:
    """Training rows of these numbers, as the data loader hands them over."""
    return {"rows": [trainer.train_dataset[number] for number in numbers]}


@pytest.fixture
def model_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Trainer], list[str]]:
    """Starts a list of the trainer's forward passes: ``decode``, ``teacher`` or ``student``."""

    def watch(trainer: Trainer) -> list[str]:
        calls: list[str] = []
        decoding: list[bool] = []
        decode, hidden_states = dopsd.rollout.decode, trainer.method.decoder.model.hidden_states

        def watched_decode(*args: Any, **kwargs: Any) -> Any:
            decoding.append(True)
            try:
                return decode(*args, **kwargs)
            finally:
                decoding.pop()

        def watched_states(*args: Any, **kwargs: Any) -> Any:
            calls.append("decode" if decoding else "student" if torch.is_grad_enabled() else "teacher")
            return hidden_states(*args, **kwargs)

        monkeypatch.setattr(dopsd.rollout, "decode", watched_decode)
        monkeypatch.setattr(trainer.method.decoder.model, "hidden_states", watched_states)
        return calls

    return watch


# ---- what trains ----


def test_an_update_that_accepts_nothing_touches_nothing(
    make_trainer: Make, random_model: Path, model_calls: Callable[[Trainer], list[str]]
) -> None:
    """Update 1 accepts all, update 2 nothing, update 3 all: the second has no forward but the rollout's, and weights,
    averaged teacher and AdamW's state are the same bits behind it, in spite of momentum and weight decay."""
    task = Graded(1.0)
    trainer = make_trainer(
        *("--model", str(random_model), "--max_steps", "3", "--teacher", "ema", "--weight_decay", "0.1"), task=task
    )
    calls = model_calls(trainer)
    seen: dict[int, tuple[dict[str, Tensor], list[dict[str, Tensor]], set[str]]] = {}

    def snapshot(update: int) -> None:
        seen[update] = weights(trainer), optimizer_state(trainer), set(calls)
        calls.clear()
        task.grade = 0.0 if update == 1 else 1.0

    start = weights(trainer)
    trainer.add_callback(After(snapshot))
    trainer.train()
    assert [seen[update][2] for update in (1, 2, 3)] == [
        {"decode", "teacher", "student"},
        {"decode"},
        {"decode", "teacher", "student"},
    ]
    adapters = {name for name in start if "lora_" in name}
    assert {TEACHER in name for name in changed(start, seen[1][0])} == {True, False}
    assert changed(start, seen[1][0]) <= adapters
    assert not changed(seen[1][0], seen[2][0])
    assert seen[1][1] and len(seen[1][1]) == len(seen[2][1])
    for first, second in zip(seen[1][1], seen[2][1], strict=True):
        assert first.keys() >= {"exp_avg", "exp_avg_sq", "step"}
        assert not changed(first, second)
    assert changed(seen[2][0], seen[3][0])
    assert [log["accepted"] for log in trainer.state.log_history[:3]] == [1.0, 0.0, 1.0]


def test_wrong_responses_train_only_when_asked_to(make_trainer: Make, random_model: Path) -> None:
    """correct_only false accepts a grade of 0; a threshold accepts from it on."""
    for options, grade, expected in (
        (("--correct_only", "false"), 0.0, 1.0),
        (("--correct_only", "true"), 0.9, 0.0),
        (("--score_threshold", "0.25"), 0.25, 1.0),
        (("--score_threshold", "0.25"), 0.24, 0.0),
    ):
        trainer = make_trainer("--model", str(random_model), "--max_steps", "1", *options, task=Graded(grade))
        before = weights(trainer)
        trainer.train()
        log = trainer.state.log_history[0]
        assert (log["accepted"], log["pass_rate"]) == (expected, 0.0)
        assert bool(changed(before, weights(trainer))) == bool(expected)


@pytest.fixture
def exact_trainer(make_trainer: Make, random_model: Path) -> Iterator[Trainer]:
    """In fp64, no dropout, LoRA B away from its zeros so that every adapter weight has a gradient."""
    trainer = make_trainer(
        *("--model", str(random_model), "--lora_dropout", "0", "--steps", "24", "--states_per_forward", "1000"),
        task=Graded(1.0),
    )
    trainer.student.double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.student.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
    yield trainer


def gradients(trainer: Trainer, *numbers: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the first update on these rows."""
    trainer.student.zero_grad()
    trainer.slices = []
    loss = trainer.training_step(trainer.student, batch_of(trainer, *numbers))
    grads = {name: p.grad.clone() for name, p in trainer.student.named_parameters() if p.grad is not None}
    assert grads and all("lora_" in name and bool(grad.abs().max() > 0) for name, grad in grads.items())
    return float(loss), grads


def test_accumulation_over_micro_batches_is_one_big_batch(exact_trainer: Trainer) -> None:
    """Three states at a time or all of them: the same loss and gradients, to fp64 rounding."""
    loss, grads = gradients(exact_trainer, 0, 1, 2)
    exact_trainer.method.resize(replace(exact_trainer.method.sizes, states_per_forward=3))
    other_loss, other_grads = gradients(exact_trainer, 0, 1, 2)
    assert other_loss == pytest.approx(loss, rel=1e-12)
    for name, grad in grads.items():
        assert float((grad - other_grads[name]).abs().max()) <= 1e-11 * float(grad.abs().max()), name


def test_every_accepted_trajectory_counts_the_same(exact_trainer: Trainer) -> None:
    """An update's loss and gradient are the means of those of its rows taken alone, however many states each has."""
    loss, grads = gradients(exact_trainer, 0, 1, 2)
    alone = [gradients(exact_trainer, number) for number in (0, 1, 2)]
    assert loss == pytest.approx(sum(value for value, _ in alone) / 3, rel=1e-12)
    for name, grad in grads.items():
        mean = (alone[0][1][name] + alone[1][1][name] + alone[2][1][name]) / 3
        assert float((grad - mean).abs().max()) <= 1e-11 * float(grad.abs().max()), name


def test_slices_are_updates_of_their_own(
    make_trainer: Make, random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """updates_per_batch=2: two optimiser steps per rollout, and between them every state of it exactly once."""
    trainer = make_trainer(
        *("--model", str(random_model), "--max_steps", "4", "--updates_per_batch", "2", "--states_per_forward", "5"),
        *("--stop_at_eos", "false"),
        task=Graded(1.0),
    )
    roll_out, batches = trainer.roll_out, trainer.method.batches
    rollouts: list[list[str]] = []  # the prompts of each
    trained: list[dict[str, list[int]]] = []  # the steps of each prompt, per update

    def watched_roll_out(rows: Any) -> Any:
        rollouts.append([row["puzzle"] for _, row in rows])
        return roll_out(rows)

    def watched_batches(examples: Any, *args: Any) -> Any:
        decode = trainer.method.decoder.tokenizer.decode
        trained.append({decode(one.trajectory.prompt_ids)[:-1]: one.steps.tolist() for one in examples})
        return batches(examples, *args)

    monkeypatch.setattr(trainer, "roll_out", watched_roll_out)
    monkeypatch.setattr(trainer.method, "batches", watched_batches)
    seen = [weights(trainer)]
    trainer.add_callback(After(lambda update: seen.append(weights(trainer))))
    trainer.train()
    assert len(rollouts) == 2 and len(trained) == 4
    for number, prompts in enumerate(rollouts):
        first, second = trained[2 * number : 2 * number + 2]
        assert set(first) == set(second) == set(prompts) and len(prompts) == 2
        for prompt in prompts:
            assert first[prompt] and second[prompt]
            assert first[prompt] + second[prompt] == list(range(12))
    assert all(changed(before, after) for before, after in pairwise(seen))
    assert rollouts[0] != rollouts[1]


@pytest.mark.parametrize("kind", ["none", "prefix", "block"])
def test_rollouts_and_evaluations_use_the_cache(
    make_trainer: Make, random_model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block of each decoding has one of the kind that is asked for."""
    used: list[str] = []

    class Noted(BlockCache):
        def __init__(self, model: Any, kind: Any, *args: Any) -> None:
            used.append(kind)
            super().__init__(model, kind, *args)

    monkeypatch.setattr(sampler, "BlockCache", Noted)
    trainer = make_trainer("--model", str(random_model), "--cache", kind, "--pass_k", "1", task=Graded(1.0))
    trainer.roll_out([(0, trainer.train_dataset[0][1])])
    rolled_out = len(used)
    trainer.evaluate()
    assert set(used) == (set() if kind == "none" else {kind})
    assert kind == "none" or (0 < rolled_out < len(used))


@pytest.mark.parametrize("reuse", ["prompt", "block"])
def test_reuse_and_its_drift(
    make_trainer: Make, random_model: Path, reuse: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with reuse makes packed passes only, measures how far they drift, and says so when it is too far."""
    options = ("--model", str(random_model), "--steps", "24", "--reuse", reuse, "--lora_dropout", "0.1")
    finals = []
    for more, measured in ((("--drift_samples", "0"), False), (("--drift_samples", "2"), True)):
        trainer = make_trainer(*options, *more, task=Graded(1.0))
        before = weights(trainer)
        trainer.train()
        finals.append(weights(trainer))
        assert changed(before, finals[-1])
        logs = [log for log in trainer.state.log_history if "kl" in log]
        assert len(logs) == 2 and all(("drift" in log) == measured for log in logs)
    assert all(log["drift"] > 0 for log in logs)
    assert not changed(*finals)  # measuring draws nothing that training draws
    capsys.readouterr()
    trainer = make_trainer(*options, "--drift_limit", "0", task=Graded(1.0))
    trainer.train()
    assert capsys.readouterr().out.count("drift_limit=0.0") == 1
    assert changed(finals[0], weights(trainer))


def test_a_trajectory_that_drifts_too_far_is_computed_exactly(exact_trainer: Trainer) -> None:
    """With every trajectory above the limit the update is that without reuse, with none above it, that with reuse."""
    teaching = exact_trainer.teaching
    loss, grads = gradients(exact_trainer, 0, 1, 2)
    distillation = exact_trainer.method
    distillation.objective = replace(distillation.objective, reuse="prompt")
    teaching.drift_samples = 24
    for limit, exact in ((0.0, True), (1e6, False), (None, False)):
        teaching.drift_limit = limit
        other_loss, other_grads = gradients(exact_trainer, 0, 1, 2)
        assert (other_loss == pytest.approx(loss, rel=1e-12)) == exact
        far = [float((grad - other_grads[name]).abs().max()) > 1e-11 for name, grad in grads.items()]
        assert any(far) != exact


# ---- what it is taught by ----


def test_a_fixed_teacher_stays_and_an_averaged_one_follows(make_trainer: Make, random_model: Path) -> None:
    """Over three updates: the base never moves, a fixed teacher over an adapter keeps the adapter's bits, and an
    averaged one is the average written out, 0.75 teacher + 0.25 student after each update."""
    first = make_trainer("--model", str(random_model), "--max_steps", "1", task=Graded(1.0))
    first.train()
    adapter = Path(first.args.output_dir or "") / "adapter"
    first.save_adapter(adapter)
    assert not [path for path in adapter.iterdir() if path.is_dir()]  # the student's only

    words = ("--model", str(random_model), "--adapter", str(adapter), "--max_steps", "3")
    assert TEACHER not in make_trainer(*words, "--method", "rejection").student.peft_config  # which asks none
    for kind in ("fixed", "ema"):
        trainer = make_trainer(
            *words,
            *("--teacher", kind, "--ema_decay", "0.75"),
            task=Graded(1.0),
        )
        start = weights(trainer)
        average = {name: value.detach().clone() for name, value in adapter_parameters(trainer.student, STUDENT).items()}
        assert not changed(average, adapter_parameters(trainer.student, TEACHER))
        students: list[dict[str, Tensor]] = []

        def keep(update: int, trainer: Trainer = trainer, students: list[dict[str, Tensor]] = students) -> None:
            student = adapter_parameters(trainer.student, STUDENT)
            students.append({name: value.detach().clone() for name, value in student.items()})

        trainer.add_callback(After(keep))
        trainer.train()
        assert len(students) == 3 and changed(average, students[0]) and changed(students[1], students[2])
        teacher = adapter_parameters(trainer.student, TEACHER)
        assert all(not value.requires_grad for value in teacher.values())
        assert not {name for name in changed(start, weights(trainer)) if "lora_" not in name}
        if kind == "fixed":
            assert not changed(average, teacher)
        else:
            for student in students:
                average = {name: 0.75 * value + 0.25 * student[name] for name, value in average.items()}
            for name, value in teacher.items():
                # Three multiply-adds in fp32.
                bound = 3 * 2**-23 * float(max(one[name].abs().max() for one in students))
                assert float((value.detach() - average[name]).abs().max()) <= bound, name


# ---- what it logs ----


def test_metrics_are_those_of_the_rollouts(make_trainer: Make, random_model: Path) -> None:
    """One log per update with every metric; tries, rates and lengths are those of the same rows decoded here."""
    trainer = make_trainer(
        *("--model", str(random_model), "--train_problems", "2", "--max_steps", "1", "--clip", "0.001"),
        *("--stop_at_eos", "false"),
        task=Graded(1.0),
    )
    rows = [row for _, row in trainer.train_dataset]
    once = trainer.method.decoder.once(rows, trainer.rollouts.decoding(), torch.zeros(2, dtype=torch.int64))
    eos = trainer.method.decoder.eos_id
    lengths = [([*one.trajectory.tokens.tolist(), eos]).index(eos) for one in once]
    trainer.train()
    (log,) = [one for one in trainer.state.log_history if "loss" in one]
    assert all(math.isfinite(value) for value in log.values())
    assert log.keys() >= {"loss", "kl", "clip_fraction", "overlap_top20", "grad_norm", "learning_rate"}
    assert (log["pass_rate"], log["first_try"], log["accepted"], log["tries"]) == (1, 1, 1, 1)
    assert log["completion_length"] == sum(lengths) / 2
    assert log["states"] == 24
    assert 0 < log["clip_fraction"] < 1 and 0 < log["overlap_top20"] <= 1 and log["kl"] > log["loss"]

    wrong = make_trainer("--model", str(random_model), "--max_steps", "1", "--pass_k", "3", task=Graded(0.0))
    wrong.train()
    (log,) = [one for one in wrong.state.log_history if "loss" in one]
    assert (log["pass_rate"], log["first_try"], log["accepted"], log["tries"], log["loss"]) == (0, 0, 0, 3, 0)
    assert not log.keys() & {"kl", "overlap_top20"}


# ---- which adapter is kept ----


def test_the_best_adapter_by_validation_is_kept(
    make_trainer: Make, random_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validation grades 0.5, 0.5, 1.0, 0.25 after updates 0 to 3: what remains is the adapter of update 2."""
    task = Graded(0.5)
    options = "--max_steps 3 --correct_only false --eval_strategy steps --eval_steps 1 --save_steps 1 --teacher ema "
    options += "--load_best_model_at_end true"
    trainer = make_trainer("--model", str(random_model), *options.split(), task=task)
    grades = {1: 0.5, 2: 1.0, 3: 0.25}
    seen: dict[int, dict[str, Tensor]] = {}

    def grade(update: int) -> None:
        task.grade = grades[update]  # the evaluation follows
        seen[update] = weights(trainer)

    trainer.add_callback(After(grade))
    trainer.train()
    evaluations = {log["step"]: log for log in trainer.state.log_history if "eval_accuracy" in log}
    assert {step: log["eval_accuracy"] for step, log in evaluations.items()} == {0: 0.5, **grades}
    assert all(log["eval_standard_error"] == 0 for log in evaluations.values())
    assert (trainer.state.best_model_checkpoint or "").endswith("checkpoint-2")
    kept = adapter_parameters(trainer.student, STUDENT)
    ours = {name: value for name, value in seen[2].items() if f".{STUDENT}." in name}
    assert len(kept) == len(ours) > 0
    for name, value in ours.items():
        assert torch.equal(kept[name.replace(f".{STUDENT}.", ".")], value)
    assert {name for name in changed(seen[2], seen[3]) if f".{STUDENT}." in name}
    folder = Path(trainer.args.output_dir or "") / "final"
    trainer.save_adapter(folder)
    saved, best = (load_file(path / "adapter_model.safetensors") for path in (folder, folder.parent / "checkpoint-2"))
    assert saved.keys() == best.keys() and not changed(saved, best)

    # A best checkpoint that is not what was saved is not loaded, and not said to be what is left.
    file = folder.parent / "checkpoint-2" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with torch.no_grad():
        for value in kept.values():
            value.zero_()
    trainer._load_best_model()
    assert trainer.state.best_model_checkpoint is None and not any(value.any() for value in kept.values())
    assert (
        "checkpoint-2, the best by validation, can't be used: its adapter_model.safetensors" in capsys.readouterr().out
    )


# ---- what it is shown ----


def test_each_epoch_is_a_new_order_of_all_rows() -> None:
    """Every row once an epoch, in an order that depends on seed and epoch alone; slices repeat whole batches."""
    sampler = PromptSampler(rows=10, chunk=4, times=1, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(10)) and len(sampler) == 10
    assert orders[0] == orders[2] != orders[1]
    assert list(PromptSampler(rows=10, chunk=4, times=1, seed=4)) != orders[0]
    twice = list(PromptSampler(rows=10, chunk=4, times=2, seed=3))
    assert len(PromptSampler(rows=10, chunk=4, times=2, seed=3)) == len(twice) == 16
    assert twice == orders[0][:4] * 2 + orders[0][4:8] * 2


def test_what_a_rollout_teaches(make_trainer: Make, random_model: Path) -> None:
    """Its teacher reads the student's prompt, or the row's encoded one with the reference; what it is shown is drawn
    from the rollout's seed, whatever it is beside; a rollout all of whose steps are left out teaches nothing."""
    trainer = make_trainer("--model", str(random_model), "--stop_at_eos", "false", "--correct_only", "false")
    distillation, rows = trainer.method, [row for _, row in trainer.train_dataset][:2]
    decoder = distillation.decoder
    first, second = decoder.once(rows, trainer.rollouts.decoding(), torch.zeros(2, dtype=torch.int64))
    whole = first.trajectory
    block = Trajectory(whole.prompt_ids, whole.tokens[:8], whole.reveal_step[:8], 8)
    distillation.objective = replace(distillation.objective, skip_last_block=True)
    one, other = distillation.examples(
        [rows[0], *rows], [first, replace(first, trajectory=block), second], torch.tensor([5, 6, 7])
    )
    assert [one.trajectory, other.trajectory] == [whole, second.trajectory]
    (alone,) = distillation.examples(rows[1:], [second], torch.tensor([7]))
    (otherwise,) = distillation.examples(rows[1:], [second], torch.tensor([8]))
    assert torch.equal(alone.reveal, other.reveal) and not torch.equal(alone.reveal, otherwise.reveal)
    assert torch.equal(one.teacher_prompt_ids, whole.prompt_ids)
    distillation.objective = replace(distillation.objective, teacher_context="reference")
    reference = decoder.encode(decoder.task.reference_prompt(rows[0]))
    assert torch.equal(distillation.example(first, 5).teacher_prompt_ids, reference)
    assert len(reference) > len(whole.prompt_ids)


class Lottery(Sudoku):
    """Sudoku with grades below 1 that depend on the response and say nothing about it, so that any try may be kept."""

    def score(self, row: Mapping[str, str], response: str) -> float:
        return zlib.crc32(response.encode()) % 1000 / 1001


def test_what_is_drawn_for_a_row_does_not_depend_on_its_batch(make_trainer: Make, random_model: Path) -> None:
    """The best of three tries at a row, and what its teacher is shown, are the same alone and beside other rows; at the
    next update they are others."""
    options = ("--pass_k", "3", "--correct_only", "false", "--stop_at_eos", "false")
    trainer = make_trainer("--model", str(random_model), *options, task=Lottery())
    numbers = (3, 5, 6, 9)
    (beside,) = trainer.roll_out(batch_of(trainer, *numbers)["rows"])
    alone = [trainer.roll_out(batch_of(trainer, number)["rows"])[0][0] for number in numbers]
    greedy = trainer.method.decoder.once(
        [trainer.train_dataset[number][1] for number in numbers], trainer.rollouts.decoding(), torch.zeros(4).long()
    )
    trainer.state.global_step = 1
    (later,) = trainer.roll_out(batch_of(trainer, *numbers)["rows"])
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one.trajectory.tokens, other.trajectory.tokens)
        assert torch.equal(one.trajectory.reveal_step, other.trajectory.reveal_step)
        assert torch.equal(one.reveal, other.reveal)
    assert any(
        not torch.equal(one.trajectory.tokens, first.trajectory.tokens)
        for one, first in zip(beside, greedy, strict=True)
    ), "some later try was kept"
    assert any(not torch.equal(one.reveal, other.reveal) for one, other in zip(beside, later, strict=True))
    assert any(
        not torch.equal(one.trajectory.tokens, other.trajectory.tokens)
        for one, other in zip(beside, later, strict=True)
    )


@pytest.mark.parametrize("reuse", ["none", "block"])
def test_tokens_and_tries_are_counted(make_trainer: Make, random_model: Path, reuse: str) -> None:
    """Two prompts of 17 tokens, two tries each of 48 in 12 steps, both sides of every state; no drift is measured."""
    options = ("--pass_k", "2", "--correct_only", "false", "--stop_at_eos", "false", "--steps", "12")
    sizes = ("--states_per_forward", "5", "--reuse", reuse, "--drift_samples", "0", "--max_steps", "1")
    trainer = make_trainer("--model", str(random_model), *options, *sizes, task=Graded(0.0))
    trained: list[Any] = []
    backward = trainer.method.backward
    trainer.method.backward = lambda batches, *args, **kwargs: backward(  # type: ignore[method-assign]
        (trained.append(batch) or batch for batch in batches), *args, **kwargs
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rollouts"] == 2 * 2 and logged["decode_tokens"] == 2 * 2 * 12 * (17 + 48)
    assert logged["states"] == sum(map(len, trained)) == 2 * 12
    assert logged["tokens"] == sum(batch.student.tokens for batch in trained)
    assert logged["forward_tokens"] == sum(batch.teacher.tokens for batch in trained)
    assert (logged["tokens"] == 24 * (17 + 48)) == (reuse == "none")
