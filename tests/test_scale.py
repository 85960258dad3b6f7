"""Several processes: what is planned of each, and what can't be had, without any of them; real ones are in
test_distributed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import dopsd.assets
from dopsd.commands import parse_train
from dopsd.errors import UsageError
from dopsd.memory import command as plan
from dopsd.memory.dry_run import DryRun
from dopsd.memory.options import parse_plan
from dopsd.memory.planner import Plan
from dopsd.memory.scale import rounds, share_of, turns
from dopsd.method import Sizes
from dopsd.trainer import Trainer

TINY = Path(dopsd.assets.__file__).parent / "tiny"
Make = Callable[..., Trainer]


def test_what_a_process_holds_computes_and_receives() -> None:
    """Of the tiny model, whose weights and adapter are fp32, against the sums by hand, in two micro-batches."""
    options = ["--recipe", "tiny", "--per_device_train_batch_size", "4", "--teacher", "fixed", "--steps", "12"]
    found = {}
    for sharing in (1, 4):
        _, model, _, rollouts, teaching, args = parse_plan(["--model-config", str(TINY), *options])
        config = plan.read_architecture(str(TINY))
        run = DryRun(config, model, rollouts, teaching, args, 17, 1 << 20, sharing)
        assert run.states() == 4 * 12
        made = Plan(0, Sizes(24, False, 4), 24 * (17 + 48), run.persistent("none"), 0, 0)
        found[sharing] = share_of(run, made, 4, "none"), run.persistent("none"), run.gathered("none"), run

    (alone, whole, nothing, run), (shared, part, gathered, _) = found[1], found[4]
    every = sum(p.numel() for p in run.network.parameters())
    layers = sum(p.numel() for p in run.network.layers.parameters())
    trained = sum(p.numel() for p in run.network.parameters() if p.requires_grad)
    assert (alone.held, alone.parameters, shared.held, shared.parameters) == (every, every, -(-every // 4), every)
    assert alone.received == pytest.approx(2 * 3 / 4 * 4 * trained)
    assert shared.received == pytest.approx(3 / 4 * 4 * (2 * (2 * layers + every + trained) + every))
    # 12 states of each of 4 trajectories: teacher, student and its gradient; and 12 steps of decoding each.
    assert alone.operations == shared.operations == pytest.approx(layers * 4 * 12 * (17 + 48) * (6 + 2))
    assert alone.seconds(1.0, 2.0) == pytest.approx(alone.operations / 1e12 + alone.received / 2e9)
    assert part.weights + part.trained + part.gradients + part.optimizer == pytest.approx(
        (whole.weights + whole.trained + whole.gradients + whole.optimizer) / 4, abs=4
    )
    assert nothing == (0, 0) and gathered == (
        4 * (every - layers) + 2 * 4 * layers // len(run.network.layers),
        3 * every,
    )


@pytest.mark.parametrize(
    ("prompts", "rate", "most", "expected"),
    [
        (12, 1.0, 8, [12]),
        (8, 0.5, 8, [8, 4, 2 * 2, 0.5 * 4]),
        (8, 0.5, 5, [8, 4, 2 * 2, 0.5 * 1]),
        (3, 0.25, 1, [3]),
    ],
)
def test_rounds_of_tries(prompts: float, rate: float, most: int, expected: list[float]) -> None:
    assert rounds(prompts, rate, most) == expected


def test_turns_are_those_of_the_process_that_has_most() -> None:
    """Against things that are handed out one by one."""
    for processes in (1, 2, 3, 8):
        for things in (0, 0.5, 1, 2, 2.5, 3, 7.25, 16):
            done = [0.0] * processes
            for number in range(int(things) + 1):
                done[number % processes] += min(1, things - number)
            assert turns(things, processes) == max(done), (things, processes)


def test_waiting_for_tries() -> None:
    """One prompt of each of eight processes, half of whose tries are right: four rounds of one try at most, where
    2.25 tries would do; with the learning in even shares."""
    _, model, _, rollouts, teaching, args = parse_plan(["--model-config", str(TINY), "--recipe", "tiny"])
    args.per_device_train_batch_size, rollouts.pass_k = 1, 8
    run = DryRun(plan.read_architecture(str(TINY)), model, rollouts, teaching, args, 17, 1 << 20)
    made = Plan(0, Sizes(run.states(), False, 4), run.states() * (17 + 48), run.persistent("none"), 0, 0)
    once, often = share_of(run, made, 8), share_of(run, made, 8, pass_rate=0.5)
    assert once.longest == once.operations
    one_try = once.operations - 3 * (once.operations / 4)  # as many states as steps, and four times the work of one
    assert often.longest - often.operations == pytest.approx((4 - 2.25) * one_try + (1 - 255 / 256) * 3 * one_try)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--fsdp full", "fsdp must be full_shard, or none, but is 'full'"),
        ("--fsdp full_shard --fsdp_config {}", "--fsdp full_shard is how"),
        ("--deepspeed zero.json", "deepspeed='zero.json' can't be used: --fsdp full_shard is how"),
    ],
)
def test_what_is_not_the_engine_is_refused(argv: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_train(argv.replace("{}", '{"version":2}').split())
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_a_launcher_asks_for_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(UsageError, match=f"{name}='true' can't be used: launch without it"):
        parse_train()


def test_one_process_shares_nothing(make_trainer: Make, random_model: Path) -> None:
    with pytest.raises(UsageError, match="fsdp='full_shard' can't be used: one process has none to share weights with"):
        make_trainer("--model", str(random_model), "--fsdp", "full_shard")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--fsdp full_shard", "one process has none to share weights with: --nodes or --gpus"),
        ("--fsdp full_shard --gpus 2 --quantize int8", "such weights can't be shared"),
        ("--tflops 100", "a time takes --tflops and --network"),
        ("--gpus 0", "gpus must be at least 1"),
        ("--tflops 0 --network 1", "tflops must be above 0, or none"),
    ],
)
def test_what_cannot_be_planned(argv: str, said: str, command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = command(
        plan.main, "--model-config", str(TINY), "--recipe", "tiny", "--prompt_length", "17", *argv.split()
    )
    assert code == 2 and said in err
