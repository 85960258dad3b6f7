"""sft, rejection and off_policy: what an update learns, in which states, and what is asked of options and rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_memory import measurable
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dopsd.baselines.masked import MaskedBatch
from dopsd.baselines.off_policy import window
from dopsd.commands import parse_train
from dopsd.errors import RunError, UsageError
from dopsd.memory import command as plan
from dopsd.memory.meter import ResidentMeter
from dopsd.memory.probe import RunProbe
from dopsd.seeds import MASKING, mix_seeds
from dopsd.tasks.sudoku import Sudoku
from dopsd.trainer import Trainer
from dopsd_kernels.confidence import chunked

Make = Callable[..., Trainer]
METHODS = ("sft", "rejection", "off_policy")


class Right(Sudoku):
    """Sudoku in which every response is right."""

    def score(self, row: Mapping[str, str], response: str) -> float:
        return 1.0


@pytest.fixture
def small_run(small_run: list[str]) -> list[str]:
    """Without an option that only one of them has."""
    at = small_run.index("--pass_k")
    return [*small_run[:at], *small_run[at + 2 :]]


def words_of(method: str) -> tuple[str, ...]:
    """Options of a run by this method."""
    return ("--method", method, *(("--pass_k", "2") if method == "rejection" else ()))


@pytest.fixture
def exact(make_trainer: Make, random_model: Path) -> Callable[..., Trainer]:
    """Builds a trainer in fp64, without dropout, with LoRA B away from its zeros, behind update 1 of 3."""

    def build(method: str, *argv: str, task: Sudoku | None = None) -> Trainer:
        trainer = make_trainer(
            *("--model", str(random_model), *words_of(method), "--lora_dropout", "0", *argv), task=task or Right()
        )
        trainer.student.double()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in trainer.student.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
        trainer.state.global_step, trainer.state.max_steps = 1, 3
        return trainer

    return build


def gradients_of(trainer: Trainer) -> dict[str, Tensor]:
    """The adapter's gradients, which are there and are not 0."""
    grads = {name: p.grad.clone() for name, p in trainer.student.named_parameters() if p.grad is not None}
    assert grads and all("lora_" in name and bool(grad.any()) for name, grad in grads.items())
    return grads


def update(trainer: Trainer, numbers: tuple[int, ...]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of an update on these rows."""
    trainer.student.zero_grad()
    trainer.slices = []
    rows = [trainer.train_dataset[number] for number in numbers]
    loss = trainer.training_step(trainer.student, {"rows": rows})
    return float(loss), gradients_of(trainer)


def logits_of(trainer: Trainer, prompt: list[int], response: list[int]) -> Tensor:
    """(L, V) of a response that is not cut, padded or batched."""
    trainer.student.train()
    return trainer.student(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) :]


def denoising(trainer: Trainer, prompt: list[int], tokens: list[int], draw: torch.Generator, tail: bool) -> Tensor:
    """LLaDA's loss of one response, token by token."""
    mask, eos = trainer.method.decoder.mask_id, trainer.method.decoder.eos_id
    t = torch.rand((), generator=draw).item()
    p = (1 - 1e-3) * t + 1e-3
    hidden = [value < p for value in torch.rand(len(tokens), generator=draw).tolist()]
    logits = logits_of(trainer, prompt, [mask if h else token for h, token in zip(hidden, tokens, strict=True)])
    end = len(tokens) if tail or eos not in tokens else tokens.index(eos) + 1
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(end):
        if hidden[i]:
            loss = loss - logits[i].log_softmax(-1)[tokens[i]] / p
    return loss / end


def in_the_teachers_order(
    trainer: Trainer, prompt: list[int], tokens: list[int], steps: list[int], draw: torch.Generator
) -> Tensor:
    """d3LLM's loss of one solution, at a third of the run: a window of six of a block's eight positions."""
    mask, eos, width = trainer.method.decoder.mask_id, trainer.method.decoder.eos_id, 6
    windows = [s for s in range(0, len(tokens), width) if s == 0 or eos not in tokens[:s]]
    start = windows[int(torch.randint(len(windows), (), generator=draw))]
    places = list(range(start, min(start + width, len(tokens))))
    low, high = 0.8 / 3, 0.8
    ratio = low + (high - low) * torch.rand((), generator=draw).item()
    early = sorted(places, key=lambda i: (steps[i], i))[: int((1 - ratio) * len(places))]
    late = [i for i in places if i not in early]
    assert early and late
    terms = torch.zeros((), dtype=torch.float64)
    for learnt in (late, early):
        seen = [mask if i in learnt or i > places[-1] else token for i, token in enumerate(tokens)]
        logits = logits_of(trainer, prompt, seen)
        terms = terms - sum(logits[i].log_softmax(-1)[tokens[i]] for i in learnt) / len(learnt)
        right = [i for i in learnt if int(logits[i].argmax()) == tokens[i]]
        for i in right:
            log_p = (logits[i] / 0.5).log_softmax(-1)
            terms = terms - 1.5 * (log_p.exp() * log_p).sum() / len(right)
    return terms / 4


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sft", ()),
        ("sft", ("--learn_tail", "false")),
        ("rejection", ()),
        ("rejection", ("--learn_tail", "false")),
        ("off_policy", ("--model", "tiny", "--entropy_weight", "1.5")),  # which predicts something right
    ],
)
def test_an_update_is_its_definition(method: str, options: tuple[str, ...], exact: Callable[..., Trainer]) -> None:
    """Loss and gradients against one response after the other with all its logits, for micro-batches of any size."""
    trainer, tail = exact(method, *options), "--learn_tail" not in options
    decoder, numbers = trainer.method.decoder, (0, 3, 4, 9)
    rows = [trainer.train_dataset[number][1] for number in numbers]
    with trainer.student.disable_adapter() if method == "off_policy" else ExitStack():
        responses = decoder.once(rows, trainer.rollouts.decoding(), torch.zeros(len(rows), dtype=torch.int64))
    trainer.student.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for number, row, response in zip(numbers, rows, responses, strict=True):
        seed = mix_seeds(mix_seeds(trainer.args.seed, 1, number), MASKING)
        draw = torch.Generator().manual_seed(int(seed))
        prompt = decoder.tokenizer(row["puzzle"] + ":")["input_ids"]
        solution = decoder.tokenizer(Sudoku().solution(row))["input_ids"]
        tokens = solution + [decoder.eos_id] * (48 - len(solution))
        if method == "rejection":
            tokens = response.trajectory.tokens.tolist()
        if method == "off_policy":
            loss = in_the_teachers_order(trainer, prompt, tokens, response.trajectory.reveal_step.tolist(), draw)
        else:
            loss = denoising(trainer, prompt, tokens, draw, tail)
        total = total + loss / len(rows)
    total.backward()
    expected = gradients_of(trainer)
    for size in (1000, 3):
        trainer.method.resize(replace(trainer.method.sizes, states_per_forward=size))
        loss, grads = update(trainer, numbers)
        # Weights of states are fp32, all else fp64.
        assert loss == pytest.approx(total.item(), rel=1e-6)
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert float((grad - expected[name]).abs().max()) <= 1e-6 * float(expected[name].abs().max()), name
    if method == "off_policy":
        (found,) = {log.values["masked_accuracy"] for log in trainer.update_metrics if "masked_accuracy" in log.values}
        assert 0.1 < found < 0.9


def test_a_state_in_which_nothing_is_learnt(exact: Callable[..., Trainer]) -> None:
    """Alone in its micro-batch too: it adds nothing."""
    trainer = exact("sft")
    ((example,),) = trainer.roll_out([trainer.train_dataset[0]])
    nothing = torch.zeros_like(example.learnt)
    empty = replace(example, masked=nothing, learnt=nothing)
    trainer.method.resize(replace(trainer.method.sizes, states_per_forward=1))
    losses = []
    for examples in ([example], [empty, example]):
        trainer.student.zero_grad()
        batches = trainer.method.batches(examples, torch.tensor(0), trainer.note)
        losses.append((float(trainer.method.backward(batches, 1, seed=0)[1]), gradients_of(trainer)))
    assert losses[0][0] == losses[1][0]
    assert all(torch.equal(grad, losses[1][1][name]) for name, grad in losses[0][1].items())


def test_the_order_of_what_was_never_decoded(exact: Callable[..., Trainer]) -> None:
    """It comes last, from left to right; a window does not begin behind the end of the solution's text."""
    trainer = exact("off_policy")
    method: Any = trainer.method
    row = trainer.train_dataset[0][1]
    (rollout,) = method.rollouts(method.decoder, [row], torch.zeros(1, dtype=torch.int64), lambda count: None)
    trajectory = rollout.trajectory
    never = torch.where(torch.arange(48) < 5, 4 - torch.arange(48), torch.iinfo(torch.int64).max)
    rollout = replace(rollout, trajectory=replace(trajectory, reveal_step=never))
    tokens = torch.tensor([3] * 10 + [method.decoder.eos_id] * 38)
    method.progress, seen = 1.0, set()
    for seed in range(20):
        example = method.example(rollout, tokens, torch.tensor(seed))
        late, early = (learnt.nonzero().flatten().tolist() for learnt in example.learnt)
        assert sorted(late + early) in (list(range(8)), list(range(8, 16)))
        # A share of .8 is masked: of eight, one is shown.
        assert early in ([4], [8])
        seen.add(early[0])
        stop = 8 if early == [4] else 16
        shown = ~example.masked
        assert shown[:, : stop - 8].all() and not shown[:, stop:].any()
    assert seen == {4, 8}


def test_windows_grow() -> None:
    """From half a block to a whole one, with two rests."""
    assert [window(share / 12, 32) for share in range(13)] == [16, 16, 16, 20, 24, 24, 24, 28, 32, 32, 32, 32, 32]
    assert window(0, 1) == 1


# ---- no logits ----


@pytest.mark.parametrize("method", METHODS)
def test_no_tensor_has_the_logits_of_all_rows(
    method: str, exact: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of a large micro-batch."""
    trainer = exact(method)
    rows, vocab = [row for _, row in trainer.train_dataset], len(trainer.method.decoder.model.lm_head_weight)
    probe = RunProbe(trainer.method, ResidentMeter(), rows, trainer.rollouts, trainer.teaching, trainer.args)
    monkeypatch.setattr(chunked, "_TILE_LOGITS", 10 * vocab)
    monkeypatch.setattr(chunked, "_SMALL", 0)
    trainer.method.resize(replace(trainer.method.sizes, workspace_bytes=10 * 8 * vocab))
    batch = probe.batch(6)
    assert isinstance(batch, MaskedBatch)
    count, seen = len(batch.targets), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for one in torch.utils._pytree.tree_leaves(out):
                if isinstance(one, Tensor) and vocab in one.shape:
                    seen.append(one.numel())
            return out

    with Watch():
        trainer.method.backward([batch], 1, seed=0)
    assert seen and max(seen) < count * vocab / 2


# ---- memory ----


@measurable
@pytest.mark.parametrize("method", METHODS)
def test_no_micro_batch_is_larger_than_a_probe(method: str, make_trainer: Make, random_model: Path) -> None:
    """In tokens, positions that are read and learnt; a budget is kept to, and a run with one learns."""
    words = ("--model", str(random_model), *words_of(method), "--memory_budget", "0.9", "--max_steps", "1")
    trainer = make_trainer(*words, task=Right())
    rows = [row for _, row in trainer.train_dataset]
    probe = RunProbe(trainer.method, ResidentMeter(), rows, trainer.rollouts, trainer.teaching, trainer.args)
    states = 2 if method == "off_policy" else 1
    assert probe.states == 2 * states and trainer.method.sizes.states_per_forward == 2 * states
    trainer.method.progress = 1.0
    seeds = torch.arange(40)
    drawn = [rows[number % 16] for number in range(40)]
    rollouts = trainer.method.rollouts(trainer.method.decoder, drawn, seeds, lambda count: None)
    examples = trainer.method.examples(drawn, rollouts, seeds)
    for size in (1, 2, 5):
        trainer.method.resize(replace(trainer.method.sizes, states_per_forward=size))
        largest: Any = probe.batch(size)
        assert len(largest) == size
        for batch in trainer.method.batches(examples, torch.tensor(0), trainer.note):
            assert batch.tokens <= largest.tokens
            assert len(batch.targets) <= len(largest.targets) and batch.columns.shape[1] <= largest.columns.shape[1]
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["states"] == 2 * states and log["peak_gib"] > 0


# ---- what is refused ----


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            "--method sft --pass_k 2",
            "pass_k=2 can't be used: it goes with method=d_opsd or rejection or diffu_grpo or vrpo, and not with sft",
        ),
        ("--learn_tail false", "learn_tail=False can't be used: it goes with method=sft or rejection"),
        ("--method rejection --clip 0.1", "clip=0.1 can't be used: it goes with method=d_opsd, and not with rejection"),
        ("--method sft --mask_ratio 0.5", "mask_ratio=0.5 can't be used: it goes with method=off_policy"),
        ("--method off_policy --mask_ratio 0", "mask_ratio must be above 0 and at most 1, but is 0"),
        ("--method off_policy --entropy_weight -1", "entropy_weight must be at least 0, but is -1"),
        ("--method sfd", "invalid choice: 'sfd'"),
    ],
)
def test_bad_options(argv: str, said: str) -> None:
    """By name; a recipe may have another method's."""
    with pytest.raises(UsageError) as raised:
        parse_train(argv.split())
    assert said in str(raised.value)
    assert parse_train(["--method", "sft"])[2].pass_k == parse_train(["--method", "off_policy"])[2].pass_k


def test_solutions_are_there_and_fit(make_trainer: Make, random_model: Path) -> None:
    """Before anything is decoded: a task or a row without one, and one that is too long."""

    class Unsolved(Sudoku):
        def solution(self, row: Mapping[str, str]) -> str | None:
            return None if row["puzzle"][0] == "0" else super().solution(row)

    rows = Sudoku().problems("train", 16)
    missing = [number for number, row in enumerate(rows) if row["puzzle"][0] == "0"]
    for method in ("sft", "off_policy"):
        with pytest.raises(
            RunError, match=rf"method={method} .* Unsolved has none of {len(missing)} of 16 .* row {missing[0]}:"
        ):
            make_trainer("--model", str(random_model), "--method", method, task=Unsolved())
        lengths = [len(Sudoku().solution(row) or "") for row in rows]
        long = sum(length > 32 for length in lengths)
        said = rf"{long} of 16 solutions are longer than gen_length=32: .* longest {max(lengths)}; .* never cut"
        with pytest.raises(RunError, match=said):
            make_trainer("--model", str(random_model), "--method", method, "--gen_length", "32")
    make_trainer("--model", str(random_model), "--method", "rejection", task=Unsolved())


def test_other_methods_are_not_planned_without_weights(command: Callable[..., tuple[int, str, str]]) -> None:
    """With a sentence that says what plans them."""
    code, _, err = command(plan.main, "--recipe", "tiny", "--method", "sft")
    assert code == 2 and "method='sft' can't be used" in err and "--memory_budget" in err
