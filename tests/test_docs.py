"""The documents' code runs, their commands parse, their links lead somewhere; docs/extending.md does what it says."""

from __future__ import annotations

import argparse
import itertools
import math
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import PAGES, ROOT, blocks, run_python, write_files
from test_resume import Lottery

from dopsd import parser
from dopsd.assets.pretrain import character_tokenizer
from dopsd.commands import parse_train
from dopsd.methods import METHODS
from dopsd.models import MODELS, STUDENT
from dopsd.objective import Objective
from dopsd.tasks import check_golds, draw, load_task
from dopsd.trainer import Trainer
from dopsd_kernels import fused_step_kl
from dopsd_kernels.step_kl import divergences

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
# Pages whose Python has tests of its own: here, and in kernels/test_trainers_page.py.
TESTED = {"extending", "python", "trainers"}
# Programs of other projects, whose options are theirs to check.
OTHERS = {"ruff", "mypy"}


class Parsed(BaseException):
    """A command's options have been read and found good."""


def commands(text: str) -> list[list[str]]:
    """The words of every command of a block, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    found: list[list[str]] = []
    for line in lines:
        words = [word.removeprefix(".venv/bin/") for word in shlex.split(line, comments=True)]
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found, words = [*found, words[:end]], words[end + 1 :]
    return found


def check(words: list[str]) -> None:
    """Fail unless a command would start: its program is known, and its options are those that it takes."""
    match words:
        case ["python3", "-m", "venv", _] | ["python", "-m", "mkdocs", "build", "--strict"] | ["bash", ".ci/run"]:
            pass
        case ["pip", "install", *options]:
            check_install(options)
        case ["python", "-m", "pytest", *options]:
            known = pytest_help()
            assert all(re.search(rf"{option}\b", known) for option in options if option.startswith("-")), options
        case ["python", "-m", module, *options]:
            check_module(module, options)
        case ["accelerate", "launch", *options]:
            from accelerate.commands.launch import launch_command_parser

            args = launch_command_parser().parse_args(options)
            assert args.module
            check_module(args.training_script, args.training_script_args)
        case ["torchrun", *options]:
            from torch.distributed.run import get_args_parser

            args = get_args_parser().parse_args(options)
            assert args.module
            check_module(args.training_script, args.training_script_args)
        case [program, *_] if program in OTHERS:
            pass
        case _:
            pytest.fail(f"not known how to check: {' '.join(words)}")


def check_install(options: list[str]) -> None:
    """Fail unless an installation names constraints that are there, and extras that there are."""
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for option, value in itertools.pairwise(options):
        assert option != "-c" or (ROOT / value).is_file(), value
    packages = [match for option in options if (match := re.fullmatch(r"(?:dopsd|\.)(?:\[([\w,]+)\])?", option))]
    assert packages, options
    for package in packages:
        assert set(filter(None, (package[1] or "").split(","))) <= extras.keys(), package[0]


def check_module(module: str, options: list[str]) -> None:
    """Fail unless ``python -m module`` takes these options; it is stopped before it does anything with them."""

    def stop_behind(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parsed(*args: Any, **kwargs: Any) -> None:
            parse(*args, **kwargs)
            raise Parsed

        return parsed

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it has been imported before
        patch.setattr(parser.Parser, "parse", stop_behind(parser.Parser.parse))
        patch.setattr(argparse.ArgumentParser, "parse_args", stop_behind(argparse.ArgumentParser.parse_args))
        patch.setattr(sys, "argv", [module, *options])
        if "--help" in options:
            with pytest.raises(SystemExit, match="0"):
                runpy.run_module(module, run_name="__main__")
        else:
            with pytest.raises(Parsed):
                runpy.run_module(module, run_name="__main__")


@cache
def pytest_help() -> str:
    """All options of pytest, its plugins' and the benchmarks' among them."""
    command = [sys.executable, "-m", "pytest", "--help", "benchmarks"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pages
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("max_steps: 1\n")  # a recipe, where a page doesn't show its own
    write_files(page, tmp_path)
    for block in blocks(page):
        if block.language == "bash" and block.not_run is None:
            for words in commands(block.text):
                check(words)


@cache
def options() -> set[str]:
    """Every option of the package's commands, and of any command that a block shows."""
    found: set[str] = set()

    def note(parser: parser.Parser, argv: Any) -> None:
        found.update(parser._option_string_actions)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        patch.setattr(parser.Parser, "parse", note)
        patch.setattr(sys, "argv", ["command"])
        for module in ("train", "evaluate", "plan", "sample", "inspect", "export"):
            with pytest.raises(Parsed):
                runpy.run_module(f"dopsd.{module}", run_name="__main__")
    shown = (
        word for page in PAGES for block in blocks(page) if block.language == "bash" for word in block.text.split()
    )
    return found | {"--debug"} | {word for word in shown if word.startswith("--")}


@pages
def test_options_in_the_text_are_options(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    spans = [span for span in re.findall(r"`([^`\n]+)`", text) if "--" in span]
    unknown = {word for span in spans for word in re.findall(r"(?<!\S)--[\w-]+", span)} - options()
    assert not unknown


@pytest.mark.parametrize(
    "command",
    [
        "python -m dopsd.train --no_such_option 1",
        "python -m dopsd.train --divergence no_such",
        "python -m dopsd.evaluate --tokens_per_step 0",
        "python -m dopsd.plan --gpu big",
        "python -m dopsd.no_such_command",
        "python -m benchmarks.gpu --out DIR --only nothing",
        "accelerate launch --num_processes 4 -m dopsd.train --max_step 1",
        "torchrun --nnodes 2 -m dopsd.train --max_step 1",
        "python -m pytest --no-such-option",
        "pip install .[no_such_extra]",
        "pip install -c no_such_file.txt .",
        "no_such_program",
    ],
)
def test_a_wrong_command_would_show(command: str) -> None:
    (words,) = commands(command)
    with pytest.raises((SystemExit, ImportError, AssertionError, pytest.fail.Exception)) as error:
        check(words)
    assert not isinstance(error.value, SystemExit) or error.value.code == 2


@pages
def test_every_block_is_of_a_kind_that_is_checked(page: Path, tmp_path: Path) -> None:
    """No fence without a language, which nothing would look at; recipes are recipes."""
    assert page.read_text().count("```") == 2 * len(blocks(page))
    for block in blocks(page):
        assert block.language in ("python", "bash", "yaml", "toml", "text", "bibtex"), block
        if block.language == "yaml":
            recipe = tmp_path / "recipe.yaml"
            recipe.write_text(block.text)
            parse_train(["--recipe", str(recipe), "--output_dir", str(tmp_path)])


@pages
def test_links_lead_somewhere(page: Path) -> None:
    """Files of the project are there, and so are the headings that links name."""
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], link


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in TESTED], ids=lambda page: page.stem)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, in a folder with a run's metrics."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "metrics.csv").write_text("step,loss,kl\n1,0.3,0.4\n2,0.2,0.3\n")
    run_python(page, tmp_path)


def test_every_metric_is_explained(make_trainer: Callable[..., Trainer]) -> None:
    """What a run logs is in the table of docs/commands.md, and nothing else is but what only some runs log."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    every = (
        "--correct_only",
        "false",
        "--eval_steps",
        "1",
        "--eval_strategy",
        "steps",
    )  # some response trains
    trainer = make_trainer("--reuse", "prompt", "--max_steps", "1", *every)
    trainer.train()
    logged = {name for row in trainer.state.log_history if "train_runtime" not in row for name in row}
    assert logged <= names
    assert names - logged == {"collapse", "peak_gib", "predicted_peak_gib", "wait_seconds"}


# ---- docs/extending.md ----


@pytest.fixture
def extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page defines, in a folder with its files; the tables that it adds to lose that again."""
    page = ROOT / "docs" / "extending.md"
    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    monkeypatch.setitem(MODELS, "small", None)
    monkeypatch.setitem(METHODS, "later_tries", None)
    if find_spec("triton"):
        from dopsd_kernels.step_kl import divergence_kernels

        for module in (divergences, divergence_kernels):
            monkeypatch.setitem(module.DIVERGENCES, "jeffreys", None)
    return run_python(page, tmp_path)


def test_the_task(extended: dict[str, Any]) -> None:
    task = load_task("my_task.py:Reverse")
    rows = {split: draw(task, split, 50) for split in ("train", "validation", "test")}
    words = [row["word"] for some in rows.values() for row in some]
    assert len(set(words)) == 150
    check_golds(task, rows["test"])
    assert task.score({"word": "abc"}, " cba") == 1 and task.score({"word": "abc"}, "abc") == 0
    assert all(task.score(row, task.solution(row) or "") == 1 for row in rows["train"])
    Path("rows.jsonl").write_text('{"word": "abc"}\n')
    assert task.read(Path("rows.jsonl")) == [{"word": "abc"}]


def test_the_model_trains(extended: dict[str, Any], make_trainer: Callable[..., Trainer]) -> None:
    """It is saved, loaded with its tokenizer, gets an adapter, decodes and learns; padding changes nothing."""
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    model = extended["SmallModel"](extended["SmallConfig"](mask_token_id=tokenizer.mask_token_id))
    model.save_pretrained("small")
    tokenizer.save_pretrained("small")
    trainer = make_trainer("--model", "small", "--max_steps", "1", "--correct_only", "false", "--eval_strategy", "no")
    network = trainer.method.decoder.model
    ids = torch.randint(2, 25, (1, 9))
    padded = torch.cat([ids[:, :3], ids], dim=1)
    with torch.no_grad():
        alone, mask = network.hidden_states(ids), torch.arange(12)[None] >= 3
        torch.testing.assert_close(network.hidden_states(padded, mask)[:, 3:], alone)
        torch.testing.assert_close(network.hidden_states(ids, None, torch.tensor([[4, 2]])), alone[:, [4, 2]])
    before = {name: x.clone() for name, x in trainer.student.named_parameters() if f"lora_B.{STUDENT}" in name}
    trainer.train()
    changed = [not torch.equal(x, before[name]) for name, x in trainer.student.named_parameters() if name in before]
    assert len(changed) == 4 and all(changed)


def test_the_variant_chooses_otherwise(extended: dict[str, Any], make_trainer: Callable[..., Trainer]) -> None:
    differ = []

    class Watched(extended["LeastConfident"]):
        def choose(self, *args: Any) -> torch.Tensor:
            chosen, usual, batch = super().choose(*args), Objective.choose(self, *args), args[2]
            assert bool((chosen <= batch.candidates).all()) and torch.equal(chosen.sum(-1), usual.sum(-1))
            differ.append(not torch.equal(chosen, usual))
            return chosen

    trainer = make_trainer("--max_steps", "1", "--correct_only", "false", "--eval_strategy", "no")
    trainer.method.objective = Watched(**vars(trainer.method.objective))
    trainer.train()
    assert any(differ)


def test_the_method_learns_what_later_tries_solve(
    extended: dict[str, Any], make_trainer: Callable[..., Trainer], random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rows that rejection learns those that took another try, in the states that it has them in."""
    options = ("--model", str(random_model), "--method", "rejection", "--pass_k", "2")
    usual = make_trainer(*options, task=Lottery())
    monkeypatch.setitem(METHODS, "rejection", METHODS["later_tries"])
    trainer = make_trainer(*options, task=Lottery())
    assert isinstance(trainer.method, extended["LaterTries"])
    rows = [row for _, row in usual.train_dataset][:8]
    seeds = torch.arange(8)
    rollouts = usual.method.rollouts(usual.method.decoder, rows, seeds, lambda count: None)
    right = [rollout for rollout in rollouts if rollout.score == 1]
    expected, found = (
        [example.to_json() for example in one.method.examples(rows, rollouts, seeds)] for one in (usual, trainer)
    )
    assert found == [json for json, rollout in zip(expected, right, strict=True) if rollout.tries > 1]
    assert 0 < len(found) < len(expected) < 8
    trainer.train()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_divergence(extended: dict[str, Any], backend: Any, clip: float | None) -> None:
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    x, y, weight = (torch.randn(*shape, generator=generator) for shape in ((5, 8), (5, 8), (19, 8)))
    x.requires_grad_()
    bias = torch.zeros(19)
    bias[3] = -math.inf  # an entry that neither side has
    options = {"divergence": "jeffreys", "clip": clip, "reduction": "sum", "backend": backend}
    out = fused_step_kl(x, y, weight, bias=bias, **options)
    kept = weight[bias == 0].T
    s, t = ((rows @ kept).double().softmax(-1) for rows in (x, y))
    terms = (s - t) * (s / t).log()
    torch.testing.assert_close(out.row_kl.double(), terms.detach().sum(-1), rtol=1e-4, atol=1e-5)
    loss = terms.sum() if clip is None else terms.clamp(max=clip).sum()
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(value, x)[0] for value in (out.loss, loss))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
