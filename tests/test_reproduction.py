"""The paper's tables on the tiny model: what is run, what is kept of it, and what is said of it."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from benchmarks import plots, reproduce, reproduction
from benchmarks.reproduce import (
    CAUSAL,
    CAUSAL_BASE,
    CAUSAL_EXACT,
    FIXED,
    METHODS,
    OURS,
    TOY,
    VARIANTS,
    Cell,
    Keeper,
    Variant,
    record,
)
from benchmarks.reproduction import Estimate, estimate, student, variance_of_mean, verdict
from dopsd.commands import parse_train
from dopsd.config import MethodName
from dopsd.evaluation.options import parse_evaluate
from dopsd.files import write_json
from dopsd.teacher import RevealScope

# A run of seconds.
SIZES = {"train_problems": 4, "per_device_train_batch_size": 2, "validation_problems": 4, "eval_problems": 8}
SHORT = {"max_steps": 1, "eval_steps": 1, "pass_k": 1, "correct_only": False, "eval_tokens_per_step": []}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(reproduce, "FOLDER", tmp_path)
    return tmp_path


# ---- intervals ----


def test_students_quantiles() -> None:
    """To the width of a cell of the grid that they are found on."""
    for freedom, known in ((1, 12.7062), (2, 4.30265), (4, 2.77645), (30, 2.04227), (1e4, 1.96020)):
        assert student(freedom) == pytest.approx(known, rel=5e-4)


@pytest.mark.parametrize("sizes", [(1.0, 3.0, 4.0), (0.5, 0.0, 4.0), (0.0, 4.0, 1.0)])
def test_an_interval_is_over_seeds_and_problems(sizes: tuple[float, float, float]) -> None:
    """Of scores with known effects of seeds and problems, within four standard errors of so many trials.

    The variance is right where both effects are there, and where one of them is not, it is no smaller; 95 % of the
    intervals, or more, hold the mean.
    """
    of_seed, of_problem, residual = sizes
    torch.manual_seed(0)
    seeds, problems, trials = 5, 40, 600
    drawn = torch.randn(trials, seeds, problems).double() * residual
    drawn += torch.randn(trials, seeds, 1) * of_seed + torch.randn(trials, 1, problems) * of_problem
    true = of_seed**2 / seeds + of_problem**2 / problems + residual**2 / seeds / problems
    assert float(drawn.mean((1, 2)).var()) == pytest.approx(true, rel=4 * math.sqrt(2 / trials))
    variances = torch.tensor([variance_of_mean(scores)[0] for scores in drawn]).double()
    error = float(variances.std()) / math.sqrt(trials)
    assert variances.mean() > true - 4 * error
    assert variances.mean() < true + 4 * error or not (of_seed and of_problem)
    covered = sum(one.low < 0 < one.high for one in map(estimate, drawn)) / trials
    assert covered > 0.95 - 4 * math.sqrt(0.05 * 0.95 / trials)


def test_an_interval_of_one_seed_or_one_problem_is_of_the_other() -> None:
    scores = torch.tensor([1.0, 2.0, 4.0, 5.0]).double()
    half = 3.182446 * math.sqrt(10 / 3 / 4)
    for shape in ((1, 4), (4, 1)):
        assert estimate(scores.view(shape)) == pytest.approx((3, 3 - half, 3 + half), abs=2e-3)
    assert estimate(scores[:1, None]) == (1, -math.inf, math.inf)
    assert estimate(scores.expand(3, 4)[:, :1]) == (1, 1, 1)
    assert estimate(torch.zeros(3, 4).double()) == (0, 0, 0)


def test_a_verdict_is_of_the_whole_interval() -> None:
    assert verdict(Estimate(1, 0.1, 2)) == "holds"
    assert verdict(Estimate(-1, -2, -0.1)) == "does not hold"
    assert verdict(Estimate(1, -0.1, 2)) == verdict(Estimate(0, 0, 0)) == "undecided"
    assert verdict(None) == "not run"


# ---- cells ----


@pytest.mark.parametrize("name", VARIANTS)
def test_options_are_options(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    if not variant.rates:
        parse_evaluate(**Cell(name, None, 0).options)
        return
    for option, kinds in (("method", MethodName), ("reveal_scope", RevealScope)):
        if variant.options.get(option, get_args(kinds)[0]) not in get_args(kinds):
            pytest.skip(f"{option} {variant.options[option]} is not there")
    groups = parse_train(**Cell(name, 1e-3, 0).options, output_dir=str(tmp_path))
    steps, every = groups[-1].max_steps, groups[-1].eval_steps
    assert steps % every == 0 and groups[-1].lr_scheduler_kwargs in ({}, {"lr_end": 1e-4, "power": 1.0})


def test_names_are_of_one_cell() -> None:
    everything = [Cell(name, rate, seed) for name in VARIANTS for rate in (None, 1e-3) for seed in (0, 1)]
    assert len({cell.name for cell in everything}) == len(everything)


def test_the_best_adapter_by_validation_is_graded() -> None:
    """One update at a rate that destroys the model: what is graded is the model as it was, as an evaluation does."""
    row = reproduce.train({**Cell(OURS, 0.3, 0).options, **SIZES, **SHORT}, 0)
    base = reproduce.evaluate({**Cell("base", None, 0).options, "tokens_per_step": [2], "eval_problems": 8}, 0)
    assert row["chosen_update"] == 0 < row["updates"]
    assert row["curve"][0]["accuracy"] > 0 == row["curve"][-1]["accuracy"]
    assert row["scores"] == base["scores"] and set(row["scores"]["greedy, 2"]) == {"0", "1"}


def test_a_curve_has_sums_and_means() -> None:
    log = [{"step": 1, "loss": 1.0, "tokens": 10, "kl": 2.0}, {"step": 2, "loss": 3.0, "tokens": 5, "kl": math.nan}]
    log += [{"step": 2, "eval_accuracy": 0.5}, {"step": 3, "loss": 4.0, "kl": 1.0}]
    points = reproduce.curve([{"update": 0}, {"update": 2}, {"update": 3}], log, prompts=8, slices=2)
    nothing = dict.fromkeys(reproduce.COSTS, 0)
    assert points == [
        {"update": 0, "prompts": 0, **nothing},
        {"update": 2, "prompts": 8, **nothing, "tokens": 15, "loss": 2.0, "kl": 2.0},
        {"update": 3, "prompts": 16, **nothing, "tokens": 15, "loss": 4.0, "kl": 1.0},
    ]


def test_the_first_of_equal_adapters_is_kept() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    keeper = Keeper(SimpleNamespace(student=layer))
    for update, accuracy in enumerate((0.2, 0.7, 0.7, 0.1)):
        torch.nn.init.constant_(layer.weight, update)
        keeper.on_evaluate(None, SimpleNamespace(global_step=update), None, {"eval_accuracy": accuracy})
    keeper.restore()
    assert layer.weight.item() == keeper.best["update"] == 1


def made(cell: Cell, share: float = 0.5, **others: Any) -> dict[str, Any]:
    """A file's content: every (1 / ``share``)-th answer right, other ones for each seed."""
    variant = VARIANTS.get(cell.variant, Variant())
    scores = "".join(str(int((number * share + cell.seed / 10) % 1 < share)) for number in range(200))
    tokens = {"tokens": 10, "forward_tokens": 5, "decode_tokens": 20, "rollouts": 4, "states": 8}
    points = [
        {"update": update, "accuracy": accuracy, "seconds": 1.0 * update, "prompts": 8 * update, "overlap_top20": 0.5}
        | {name: count * update for name, count in tokens.items()}
        for update, accuracy in ((0, 0.5), (10, 0.6), (20, 0.7))
    ]
    names = [f"{measure}, 2" for measure in ("greedy", "pass@8", *map(reproduction.revealed, (0.1, 0.25, 0.5)))]
    about = {"name": cell.name, "seed": cell.seed, "options": cell.options, "weights": cell.weights}
    about |= {"bf16": True, "machine": {"device": "some CPU", "versions": {"torch": "2"}}}
    about |= {"curve": points, "updates": 20, "collapse": [], "ended": None} if variant.rates else {}
    return {**about, "seconds": {"train": 1.0, "greedy, 2": 1.0}, "scores": dict.fromkeys(names, scores), **others}


def stand_in(cell: Cell, path: Path) -> None:
    """Instead of a run: the second of three rates is best; a run may be killed once, or fail."""
    if cell.name.startswith("killed") and not path.with_suffix(".once").exists():
        path.with_suffix(".once").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.name.startswith("wrong"):
        raise SystemExit(2)
    curve = [{"accuracy": 0.5 if cell.rate is None else {0.1: 0.3, 0.2: 0.8, 0.3: 0.8}.get(cell.rate, 0.5)}]
    about = {"options": cell.options, "weights": cell.weights}
    write_json(path, {**about, "curve": curve, "seconds": {"all": 7.0}})


def test_what_is_missing_is_run_and_what_was_killed_is_run_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rates first; then, with the best, seeds and the variants that take it; once run, nothing is run again."""
    variants = {
        "searched": Variant({}, (0.1, 0.2, 0.3)),
        "follows": Variant({"clip": 0.05}, "searched"),
        "killed": Variant({}, (0.5,)),
        "wrong": Variant({"method": "none"}, (0.1, 0.2)),
        "shipped": Variant({}),
    }
    monkeypatch.setattr(reproduce, "VARIANTS", variants)
    monkeypatch.setattr(reproduce, "TABLES", {1: (variants, 2)})
    monkeypatch.setattr(reproduce, "run", stand_in)
    fork = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))
    monkeypatch.setattr(reproduce, "multiprocessing", fork)
    assert reproduce.main(["--dry_run"]) == 0
    assert "\n12 cells, about" in capsys.readouterr().out
    assert reproduce.main([]) == 1
    missing = re.findall("^not run: (.+)$", capsys.readouterr().out, re.MULTILINE)
    assert missing == ["killed_0.5_0", "wrong_0.1_0", "wrong_0.2_0", "killed_0.5_1", "wrong_1"]
    names = {path.stem for path in folder.glob("*.json")}
    searched = {f"searched_{rate}_{seed}" for rate, seed in ((0.1, 0), (0.2, 0), (0.3, 0), (0.2, 1))}
    assert names == {*searched, "follows_0.2_0", "follows_0.2_1", "shipped_0"}
    (folder / "follows_0.2_1.json").write_text('{"options": {}, "weights": ""}')  # of other options
    assert reproduce.main(["--jobs", "3"]) == 1
    ran = re.findall(r"^(\S+): \d+ s; ", capsys.readouterr().out, re.MULTILINE)
    assert sorted(ran) == ["follows_0.2_1", "killed_0.5_0", "killed_0.5_1"]


# ---- the page ----


def test_before_anything_is_run_the_page_says_so() -> None:
    text = {name: section() for name, section in reproduction.SECTIONS.items()}
    assert all(name == "missing" or section.startswith("Not run.") for name, section in text.items())
    assert not any(word in "".join(text.values()) for word in ("holds", "does not hold", "undecided", ".png"))
    assert "| not run |" in text["methods"] and "SFT 9," in text["missing"]


def test_the_page_says_what_the_files_say(folder: Path) -> None:
    """Methods of known accuracies: what is above, below and no different, and by how much."""
    shares = {FIXED: 0.75, OURS: 0.5, "SFT": 0.5, "VRPO": 0.25}
    for name, variant in METHODS.items():
        for rate in variant.rates or (None,):
            for seed in range(5):
                cell = Cell(name, rate, seed)
                others: dict[str, Any] = {}
                if name == "diffu-GRPO":
                    others["curve"] = [{**p, "update": 10 * p["update"]} for p in made(cell)["curve"]]
                if name in shares or name in ("base", "diffu-GRPO"):
                    write_json(folder / f"{cell.name}.json", made(cell, shares.get(name, 0.5), **others))
    for seed in range(5):
        cell = Cell(TOY, None, seed)
        write_json(folder / f"{cell.name}.json", made(cell, 0.75))
    for name, share in ((CAUSAL_BASE, 0.25), (CAUSAL, 0.5), (CAUSAL_EXACT, 0.5)):
        for seed in range(3 if VARIANTS[name].rates else 1):
            cell = Cell(name, reproduce.chosen(name), seed)
            write_json(folder / f"{cell.name}.json", made(cell, share))
    text = {name: section() for name, section in reproduction.SECTIONS.items()}
    assert re.search(rf"\| {CAUSAL} \| 3 \| 50\.0 .* \| \+25\.0 \(", text["causal"])
    assert f"| {CAUSAL} is above {CAUSAL_BASE} | +25.0" in text["causal"]
    assert re.search(rf"\| {CAUSAL} \| 50\.0 \(.*\) \| \+0\.0 \(\+0\.0 to \+0\.0\) \| 1 \|", text["savings"])
    assert re.search(rf"\| {CAUSAL_EXACT} \| 50\.0 \(.*\) \|  \| 1 \|", text["savings"])
    assert re.search(rf"\| {FIXED} \| 5 \| 75\.0 \(7\d\.\d to [78]\d\.\d\) \|.* 20.6 \| 82.2 \|", text["methods"])
    said = dict(re.findall(r"^\| (.+?) \| .*? \| ([a-z ]+) \|$", text["methods"], re.MULTILINE))
    assert said[f"{FIXED} is above SFT"] == said[f"{FIXED} is above VRPO"] == "holds"
    assert said[f"{OURS} is above SFT"] == said[f"{OURS} is above base"] == "undecided"
    assert said[f"{OURS} is above off-policy"] == "not run"
    rates = ", ".join(f"{rate}: 70.0" for rate in (0.0001, 0.0003, 0.001, 0.003, 0.01))
    assert f"| SFT | {rates} | 0.0001 (an end of" in text["rates"]
    assert f"| {FIXED} | 5 of 5 | 20 | 160 | 80 | 1,100 | 20 | 425 |" in text["costs"]
    assert f"| {FIXED} takes fewer updates than diffu-GRPO | +1.0 (+1.0 to +1.0) | holds |" in text["costs"]
    assert f"| {FIXED} takes fewer prompts than diffu-GRPO | +0.0 (+0.0 to +0.0) | undecided |" in text["costs"]
    assert "| 50 % revealed is less than 5 points below the best of 8 | +5.0 (+5.0 to +5.0) | holds |" in text["toy"]
    assert re.search(r"\| greedy \| 75\.0 \(.*\) \| 100\.0 \(100\.0 to 100\.0\) \|", text["toy"])
    assert "SFT 9" not in text["missing"] and "rejection 9, off-policy 9\n" in text["missing"]
    assert "Each on one thread: some CPU, torch 2, bf16." in text["missing"]
    plots.draw_reproduction(reproduction.curves(), reproduction.UNITS, folder)
    assert (folder / "reproduction.png").stat().st_size > 1000


def test_a_file_about_other_weights_is_none(folder: Path) -> None:
    cell = Cell("base", None, 0)
    write_json(folder / f"{cell.name}.json", made(cell))
    assert record(cell) is not None
    write_json(folder / f"{cell.name}.json", made(cell, weights="others"))
    assert record(cell) is None
