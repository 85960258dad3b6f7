"""The collapse of a run: told from noise, said, and gone back from, with the same bits after a kill."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Mapping
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from dopsd import checkpoints, collapse, plots, report, run
from dopsd.collapse import CollapseGuard, Tally, first_try_fall, fisher, tallies_of, validation_fall
from dopsd.commands import parse_train
from dopsd.errors import UsageError
from dopsd.tasks.sudoku import Sudoku
from dopsd.trainer import Trainer

Make = Callable[..., Trainer]


def validations(*accuracies: float) -> list[dict[str, float]]:
    """A log with one evaluation an update, from update 0 on."""
    return [{"step": step, "eval_accuracy": accuracy} for step, accuracy in enumerate(accuracies)]


# ---- what a collapse is ----


def test_a_fall_of_validation_accuracy() -> None:
    """Three standard errors of a difference of two shares, at least five points, or what is asked for; of the first
    best, however long ago. One evaluation is no fall, nor is one of nothing."""
    # 0.6 and 0.45 of 100: 3 sqrt(2 x 0.525 x 0.475 / 100) = 0.21186. Of 200 it is 0.149808.
    assert validation_fall(validations(0.6, 0.45), 100, None) is None
    fall = validation_fall(validations(0.3, 0.6, 0.5, 0.6, 0.45), 200, None)
    assert fall == ("validation accuracy", 1, 0.6, 0.45)
    # Of a million, five points.
    assert validation_fall(validations(0.5, 0.4501), 1_000_000, None) is None
    assert validation_fall(validations(0.5, 0.4499), 1_000_000, None) is not None
    # All of five or none, and all of four or none: a standard error taken from each alone would be 0.
    assert validation_fall(validations(1.0, 0.0), 5, None) is not None
    assert validation_fall(validations(1.0, 0.0), 4, None) is None
    assert validation_fall(validations(0.6, 0.5), 10, 0.09) is not None
    assert validation_fall(validations(0.6, 0.5), 1_000_000, 0.11) is None
    for nothing in ([], validations(0.5), validations(0.5, math.nan), validations(0.5, 0.6), [{"step": 1, "loss": 1}]):
        assert validation_fall(nothing, 1_000_000, None) is None
    assert validation_fall(validations(0.9, 0.0), 0, None) is None


def test_fishers_test_counts_ways() -> None:
    """The share of all ways to deal out what is right that leave so few to the second, counted one by one; the lady
    who tells eight cups apart is one of 70."""
    assert fisher(Tally(0, 4, 4), Tally(1, 0, 4)) == pytest.approx(1 / 70)
    for first, second, right in product((1, 3, 5), (2, 4), range(5)):
        ways = [sum(one >= first for one in dealt) for dealt in combinations(range(first + second), right)]
        for few in range(max(0, right - first), min(second, right) + 1):
            expected = sum(way <= few for way in ways) / len(ways)
            assert fisher(Tally(0, right - few, first), Tally(1, few, second)) == pytest.approx(expected)


def test_noise_is_no_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 runs of 100 updates of 32 prompts, at each of four constant rates: no alarm at any update. With the third
    alone, the lowest rate gives one in most runs. From a half, a fall to 3% is seen within eight updates."""
    torch.manual_seed(0)

    def alarms(rate: float, runs: int, start: int = 8) -> int:
        right = torch.binomial(torch.full((runs, 100), 32.0), torch.tensor(rate)).int().tolist()
        logs = [[Tally(update, count, 32) for update, count in enumerate(run, 1)] for run in right]
        # What a later window is compared with only grows, so every 4th update, where new windows begin, shows enough.
        return sum(any(first_try_fall(log[:end], 0) for end in range(start, 101, 4)) for log in logs)

    assert [alarms(rate, 200) for rate in (0.03, 0.15, 0.5, 0.9)] == [0, 0, 0, 0]
    with monkeypatch.context() as changed:
        changed.setattr(collapse, "CHANCE", 1.1)
        assert alarms(0.03, 20) > 10
    rates = torch.tensor([0.5] * 20 + [0.03] * 8).expand(50, 28)
    for counts in torch.binomial(torch.full((50, 28), 32.0), rates).int().tolist():
        log = [Tally(update, count, 32) for update, count in enumerate(counts, 1)]
        fall = first_try_fall(log, 0)
        assert fall is not None and fall.best_update <= 20 and fall.now <= fall.best / 3
        assert first_try_fall(log[:20], 0) is None and first_try_fall(log, 25) is None


def test_a_window_is_of_tries_and_not_of_rows() -> None:
    """As few rows as have 128 tries; the best one does not share a row with the last."""
    rows = [(1, 100, 100), (2, 28, 28), (3, 100, 500), (4, 0, 60), (5, 0, 60), (6, 0, 8)]
    log = [Tally(*row) for row in rows]
    assert [(first, *window) for first, window in collapse.windows(log)] == [
        (1, 2, 128, 128),
        (3, 3, 100, 500),
        (3, 4, 100, 560),
        (3, 5, 100, 620),
        (4, 6, 0, 128),
    ]
    assert first_try_fall(log, 0) == ("first-try accuracy", 2, 1.0, 0.0)
    assert first_try_fall(log, 3) is not None and first_try_fall(log, 4) is None
    # 0.2 of the third is a fall from all of the first two, which by themselves are no news.
    assert first_try_fall(log[:3], 0) == ("first-try accuracy", 2, 1.0, 0.2) and first_try_fall(log[:2], 0) is None


def test_logged_means_become_counts() -> None:
    """By the updates behind each row, of which every ``slices`` have one rollout; evaluations in between are none."""
    log = [{"step": 0, "eval_accuracy": 0.5}]
    log += [{"step": step, "loss": 0.1, "first_try": 0.25} for step in (2, 5)] + [{"step": 5, "eval_accuracy": 0.5}]
    assert tallies_of(log, prompts=4, slices=1) == [(2, 2, 8), (5, 3, 12)]
    sliced: list[dict[str, float]] = [{"step": step, "loss": 0.1} for step in range(1, 6)]
    for step in (1, 5):
        sliced[step - 1]["first_try"] = 1.0
    assert tallies_of(sliced, prompts=4, slices=4) == [(1, 4, 4), (5, 4, 4)]
    assert tallies_of([{"step": 3, "loss": 1.0, "first_try": 0.5}, *sliced[3:]], 4, 2) == [(3, 4, 8), (5, 4, 4)]


def test_how_far_a_collapse_is() -> None:
    """What is followed of a run is what is acted on: the two windows, and the fall with its limit; nothing without."""
    args = SimpleNamespace(train_batch_size=64, world_size=1, collapse_threshold=None)
    trainer: Any = SimpleNamespace(args=args, train_dataset=range(1000), eval_dataset=range(200))
    guard = CollapseGuard(trainer, updates_per_batch=1)
    log: list[dict[str, Any]] = validations(0.6)
    assert guard.figures(log) == {}
    for step, share in enumerate((0.5, 0.75, 0.25, 0.125), 1):
        log.append({"step": step, "loss": 0.0, "first_try": share})
        assert bool(guard.figures(log)) == (step == 4)  # whose window shares no update with the first one
    assert guard.figures(log) == {"first_try_best": 0.625, "first_try_last": 0.1875}
    log.append({"step": 4, "eval_accuracy": 0.45})
    assert guard.figures(log) == pytest.approx({"validation_fall": 0.15, "fall_limit": 0.149812}, abs=1e-6)
    args.collapse_threshold = 0.2
    assert guard.figures(log) == pytest.approx({"validation_fall": 0.15, "fall_limit": 0.2})
    assert guard.figures([*log, {"step": 4, "collapse": "validation accuracy"}]) == {}


def test_a_task_that_nothing_solves_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Behind 3 updates, or as many more as have 8 prompts, or the last; not if one try was right; never again."""

    def said(prompts: int, updates: int, right: int = -1, logging: int = 1) -> list[int]:
        args = SimpleNamespace(train_batch_size=prompts, world_size=1)
        trainer: Any = SimpleNamespace(args=args, train_dataset=range(100), is_world_process_zero=lambda: True)
        state = SimpleNamespace(log_history=[], max_steps=updates)
        found = []
        for step in range(logging, updates + 1, logging):
            state.log_history.append({"step": step, "loss": 0.0, "pass_rate": float(step == right)})
            CollapseGuard(trainer, updates_per_batch=1).warn_of_nothing(args, state)
            if "no try at the first" in (text := capsys.readouterr().out):
                assert f"first {prompts * step} prompts" in text and "held_out_before.json" in text
                found.append(step)
        return found

    assert said(4, 9) == [3] and said(1, 9) == [8] and said(2, 9) == [4] and said(4, 2) == [2] and said(4, 9, 2) == []
    assert said(4, 9, right=4) == [3] and said(4, 9, logging=2) == [4]


# ---- what is done about it ----


class Scripted(Sudoku):
    """Validation and training problems of which all are right or none, by the update behind which they are tried."""

    def __init__(self, validation: str, training: str = "1") -> None:
        self.scripts, self.update = {True: validation, False: training}, 0
        self.validated = {row["puzzle"] for row in self.problems("validation", 8)}

    def score(self, row: Mapping[str, str], response: str) -> float:
        script = self.scripts[row["puzzle"] in self.validated]
        return float(script[min(self.update, len(script) - 1)])


class Updates(TrainerCallback):
    """Tells a task the update, and keeps what training has come to behind each, as what follows finds it."""

    def __init__(self, task: Scripted) -> None:
        self.task, self.seen = task, {}
        self.rates: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task.update = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen[state.global_step] = state_of(kwargs["model"], kwargs["optimizer"])
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task.update = state.global_step


def state_of(model: Any, optimizer: Any) -> list[Tensor]:
    """Copies of both adapters and of what the optimiser remembers."""
    adapters = [value.detach().clone() for name, value in model.named_parameters() if ".lora_" in name]
    return adapters + [value.clone() for state in optimizer.state.values() for value in state.values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether all bits are."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def log_of(trainer: Trainer) -> list[dict[str, Any]]:
    """A log without what the clock says."""
    log = [row for row in trainer.state.log_history if "train_runtime" not in row]
    return [{name: value for name, value in row.items() if not name.endswith("_seconds")} for row in log]


@pytest.fixture
def build(make_trainer: Make, random_model: Path) -> Callable[..., tuple[Trainer, Updates]]:
    """A trainer whose accuracies are scripted."""

    def make(*argv: str, validation: str, training: str = "1") -> tuple[Trainer, Updates]:
        line = "--max_steps 6 --eval_strategy steps --eval_steps 1 --save_steps 1 --save_total_limit 20 --teacher ema "
        line += "--validation_problems 8 --load_best_model_at_end none --correct_only false --steps 6 --pass_k 1"
        task = Scripted(validation, training)
        trainer = make_trainer("--model", str(random_model), *line.split(), *argv, task=task)
        updates = Updates(task)
        trainer.callback_handler.callbacks.insert(0, updates)  # before the start is evaluated
        return trainer, updates

    return make


def test_stop_leaves_the_best_adapter(
    build: Callable[..., tuple[Trainer, Updates]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Right behind updates 2 and 3, wrong behind 4: that was the last, and the adapter is that of update 2. A Trainer
    that is built anew restores it without an update. ``ignore`` makes the same updates, to the end, and says it once.
    With nothing saved there is nothing to go back to, and the run says that."""
    trainer, updates = build(validation="001100")
    trainer.train()
    output = Path(trainer.args.output_dir or "")
    (event,) = collapse.events(trainer.state.log_history)
    assert event == {
        **{"update": 4, "measure": "validation accuracy", "from": 1.0, "to": 0.0, "best_update": 2},
        **{"action": "stop", "back_to": 2},
    }
    said = "collapse at update 4: validation accuracy fell from 100.0% (update 2) to 0.0%; training stops and goes back"
    assert capsys.readouterr().out.count(said) == 1
    assert trainer.state.global_step == 4 and max(updates.seen) == 3
    student = slice(0, None, 2)  # each lora_A and lora_B has the teacher's behind it
    adapters = [name for name, _ in trainer.student.named_parameters() if ".lora_" in name]
    assert all(".default." in name for name in adapters[student]) and ".teacher." in adapters[1]
    count = len(adapters)
    kept = state_of(trainer.student, trainer.optimizer)[:count]
    assert same(kept[student], updates.seen[2][:count][student])
    assert not same(kept[student], updates.seen[3][:count][student])

    restored, _ = build(validation="0")
    restored.args.output_dir = str(output)
    restored.restore(str(output / "checkpoint-4"))
    assert [checkpoints.has_ended(output / f"checkpoint-{number}") for number in (3, 4)] == [False, True]
    adapters_then = [value for name, value in restored.student.named_parameters() if ".default." in name]
    assert same(adapters_then, kept[student]) and collapse.events(restored.state.log_history) == [event]

    ignored, others = build("--on_collapse", "ignore", validation="001100")
    ignored.train()
    assert ignored.state.global_step == 6
    assert all(same(seen, others.seen[update]) for update, seen in updates.seen.items())
    (event,) = collapse.events(ignored.state.log_history)
    assert (event["update"], event["action"], event["back_to"]) == (4, "ignore", None)

    capsys.readouterr()
    blind, _ = build("--save_strategy", "no", validation="010")
    blind.train()
    out = capsys.readouterr().out
    assert "no checkpoint is chosen by validation (load_best_model_at_end): the last adapter" in out
    assert "with nothing to go back to" in out and blind.state.global_step == 2


def test_rollback_goes_on_from_the_best_with_the_same_bits_after_a_kill(
    build: Callable[..., tuple[Trainer, Updates]], tmp_path: Path
) -> None:
    """Best at update 1; wrong behind 3 and 6 of 8: adapters (the teacher's too) and AdamW's moments are those of update
    1 again, at a half and a quarter of the learning rate that the schedule asks for, and the updates that follow are
    not those that followed before. From each checkpoint a new Trainer goes on to the same bits and log."""
    argv = ("--on_collapse", "rollback", "--max_steps", "8", "--weight_decay", "0.1")
    script = "010011011"
    plain, steady = build(*argv, validation="1")
    plain.train()
    whole, updates = build(*argv, validation=script)
    whole.train()
    assert [(one["update"], one["back_to"]) for one in collapse.events(whole.state.log_history)] == [
        (2, 1),
        (3, 1),
        (6, 1),
    ]
    assert whole.state.global_step == 8
    for update in (2, 3, 6):
        assert same(updates.seen[update], updates.seen[1]) and len(updates.seen[1]) > len(steady.seen[0])
    assert not same(updates.seen[4], steady.seen[2]) and not same(updates.seen[4], updates.seen[1])
    factors = [1, 1, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125]
    assert updates.rates == pytest.approx([rate * factor for rate, factor in zip(steady.rates, factors, strict=True)])
    assert steady.rates[0] > steady.rates[-1] > 0
    logged = [row["learning_rate"] for row in whole.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx(updates.rates)

    end = state_of(whole.student, whole.optimizer)
    for kill in (0, 2, 5):
        copy = tmp_path / f"copy-{kill}"
        for number in {kill, 1} if kill else {0}:
            name = f"checkpoint-{number}"
            shutil.copytree(Path(whole.args.output_dir or "") / name, copy / name)
        torch.manual_seed(kill)
        resumed, _ = build(*argv, "--output_dir", str(copy), validation=script)
        resumed.train(resume_from_checkpoint=str(copy / f"checkpoint-{kill}"))
        assert log_of(resumed) == log_of(whole)
        assert same(state_of(resumed.student, resumed.optimizer), end), kill


def test_first_tries_collapse_between_evaluations(
    build: Callable[..., tuple[Trainer, Updates]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """First tries that are right in updates 1 to 3 and wrong from then on, logged every other update: a window of four
    rows' tries here, so that it is seen behind update 8, when no evaluation is due; the checkpoint that is then saved
    has it. A resume from between two logged updates counts what was not logged yet, and sees the same."""
    monkeypatch.setattr(collapse, "WINDOW", 8)
    monkeypatch.setattr(collapse, "CHANCE", 0.05)
    argv = ("--max_steps", "12", "--logging_steps", "2", "--eval_steps", "3", "--save_steps", "3")
    whole, _ = build(*argv, validation="1", training="111" + 12 * "0")
    whole.train()
    (event,) = collapse.events(whole.state.log_history)
    assert event == {
        **{"update": 8, "measure": "first-try accuracy", "from": 0.75, "to": 0.0, "best_update": 4},
        **{"action": "stop", "back_to": 0},
    }
    assert checkpoints.has_ended(Path(whole.args.output_dir or "") / "checkpoint-8")
    for name in ("checkpoint-0", "checkpoint-3"):
        shutil.copytree(Path(whole.args.output_dir or "") / name, tmp_path / "copy" / name)
    resumed, _ = build(*argv, "--output_dir", str(tmp_path / "copy"), validation="1", training="111" + 12 * "0")
    resumed.train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-3"))

    def shares(trainer: Trainer) -> list[tuple[int, float]]:
        return [(row["step"], row["first_try"]) for row in log_of(trainer) if "first_try" in row]

    assert shares(resumed) == shares(whole) == [(2, 1.0), (4, 0.5), (6, 0.0), (8, 0.0)]
    assert collapse.events(resumed.state.log_history) == [event]


def test_a_run_that_collapses_says_so_and_has_finished(
    small_run: list[str],
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The shipped model, ruined by one update: exit status 0, the sentence twice, the event in the report and in
    metrics.csv, a line in the curves; after is before, because the best adapter is the one it began with. A resume
    that finds no report makes one of the checkpoint, without an update."""
    lines: list[float] = []
    if plots.why_no_picture() is None:
        from matplotlib.axes import Axes

        draw = Axes.axvline
        monkeypatch.setattr(Axes, "axvline", lambda self, x, **options: lines.append(x) or draw(self, x, **options))
    monkeypatch.setattr(report, "draw_trajectory", lambda *_: None)
    output = tmp_path / "run"
    argv = [*small_run, "--max_steps", "3", "--eval_steps", "1", "--save_steps", "1", "--learning_rate", "3"]
    argv += ["--load_best_model_at_end", "none", "--validation_problems", "64", "--correct_only", "false"]
    argv += ["--steps", "24", "--eval_tokens_per_step", "8", "--output_dir", str(output)]
    status, out, _ = command(run.main, *argv)
    assert status == 0
    assert " ".join(out.split()).count("collapse at update 1: validation accuracy fell from ") == 2
    assert "the adapter is that of update 0 of 1, the best by validation" in " ".join(out.split())
    result = json.loads((output / "report.json").read_text())
    (event,) = result["collapse"]
    assert (event["update"], event["action"], event["back_to"]) == (1, "stop", 0)
    assert 0.2 < event["from"] < 0.7 and event["to"] == 0 and result["updates"] == 1
    assert result["accuracy_before"] == result["accuracy_after"]
    with (output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["collapse"]) for row in rows if row["collapse"]] == [("1", "validation accuracy")]
    fallen = [row for row in run.Run(output, result).metrics if "collapse" in row]
    assert [(row["step"], row["collapse"], row["collapse_action"]) for row in fallen] == [
        (1.0, "validation accuracy", "stop")
    ]
    assert set(lines) <= {1} and bool(lines) == (plots.why_no_picture() is None)

    kept = {name: (output / name).read_bytes() for name in ("adapter_model.safetensors", "held_out_after.json")}
    for name in (*kept, "report.json", "metrics.csv"):
        (output / name).unlink()
    monkeypatch.setattr(Trainer, "training_step", None)
    status, out, _ = command(run.main, *argv, "--resume_from_checkpoint", "true")
    assert status == 0 and "collapse at update 1" in out
    assert all((output / name).read_bytes() == content for name, content in kept.items())
    assert json.loads((output / "report.json").read_text())["collapse"] == [event]


# ---- options ----


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        *(("--collapse_threshold " + given, "collapse_threshold must be") for given in ("nan", "0", "-0.1", "1.5")),
        ("--collapse_threshold 0.1 --eval_strategy no", "collapse_threshold=0.1 can't be used: validation accuracy"),
        ("--on_collapse rollback --save_strategy no", "on_collapse='rollback' can't be used: it goes back to a"),
        ("--on_collapse rollback --load_best_model_at_end false", "on_collapse='rollback' can't be used"),
        ("--on_collapse rollback --save_only_model true", "on_collapse='rollback' can't be used"),
        ("--on_collapse restart", "invalid choice: 'restart'"),
    ],
)
def test_nonsense_is_refused(argv: str, said: str) -> None:
    """In one sentence that names the option."""
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        parse_train(argv.split())


@pytest.mark.parametrize("recipe", ["tiny", "paper", "reference"])
def test_every_recipe_keeps_the_best_and_stops(recipe: str) -> None:
    """By default, and without saving not."""
    args = parse_train(["--recipe", recipe])[-1]
    assert args.load_best_model_at_end and args.metric_for_best_model == "accuracy" and args.greater_is_better
    assert (args.on_collapse, args.collapse_threshold, args.save_only_model) == ("stop", None, False)
    assert not parse_train(["--recipe", recipe, "--save_strategy", "no"])[-1].load_best_model_at_end
    assert not parse_train(["--recipe", recipe, "--eval_strategy", "no"])[-1].load_best_model_at_end


def test_the_best_is_kept_wherever_transformers_can(tmp_path: Path) -> None:
    """Left to itself the option is true exactly where transformers accepts that it is."""
    (tmp_path / "mine.yaml").write_text("max_steps: 60\n")
    cases = [*product(("steps", "epoch", "no"), ("steps", "epoch", "no"), [("12", "12")])]
    cases += [("steps", "steps", pair) for pair in (("24", "12"), ("12", "24"), ("18", "12"), ("0.3", "0.1"))]
    cases += [("steps", "steps", pair) for pair in (("0.25", "0.1"), ("12", "0.1"))] + [("best", "steps", ("7", "3"))]
    chosen = []
    for save, evaluate, (save_steps, eval_steps) in cases:
        argv = ["--recipe", str(tmp_path / "mine.yaml"), "--save_strategy", save, "--eval_strategy", evaluate]
        argv += ["--save_steps", save_steps, "--eval_steps", eval_steps]
        chosen.append(parse_train(argv)[-1].load_best_model_at_end)
        try:
            parse_train([*argv, "--load_best_model_at_end", "true"])
            accepted = (save, evaluate) != ("no", "no")  # where there is nothing to choose from
        except UsageError:
            accepted = False
        assert chosen[-1] == accepted, (save, evaluate, save_steps, eval_steps)
    assert {True, False} == set(chosen)
