"""Fixtures: a small random LLaDA, the shipped model, and one decoder for it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():
    # Where no GPU compiles the Triton kernels, their interpreter runs them. Triton looks when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import set_seed

from dopsd.console import console
from dopsd.models import load_model
from dopsd.models.llada import LLaDAConfig, LLaDAModelLM
from dopsd.rollout import Decoder
from dopsd.tasks import load_task

if TYPE_CHECKING:
    from dopsd.trainer import Trainer

# Imported once, in the process that those of tests are forked from, and not for seconds in each.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["dopsd.run", "dopsd.evaluation.command", "matplotlib.backends.backend_agg", "rich.table"]
)


def pytest_configure(config: pytest.Config) -> None:
    """Files start in their order: xdist would start those of few tests last, which here are the slow ones."""
    config.option.loadscopereorder = False


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """`pytest --benchmark-only` is about the benchmarks."""
    return True if config.getoption("benchmark_only", False) else None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors: more threads only cost, and results are then the same bits everywhere."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def printed() -> Iterator[None]:
    """What the package says goes to standard output, as in its commands."""
    with console(sentences=True, bars=False):
        yield


@pytest.fixture
def small_llada() -> Callable[..., LLaDAModelLM]:
    """Builds a random LLaDA (V=37, d=32, 2 layers, 4 heads, fp64 by default) in evaluation mode."""

    def build(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object) -> LLaDAModelLM:
        torch.manual_seed(seed)
        config = LLaDAConfig(
            **{
                "vocab_size": 37,
                "d_model": 32,
                "n_layers": 2,
                "n_heads": 4,
                "mlp_hidden_size": 48,
                "max_sequence_length": 128,
                "rope_theta": 10000.0,
                "weight_tying": False,
                "init_std": 0.3,
                "mask_token_id": 36,
                "eos_token_id": 0,
                "pad_token_id": 0,
                **changes,
            }
        )
        return LLaDAModelLM(config).to(dtype).eval()

    return build


@pytest.fixture
def shipped() -> Decoder:
    """The model that ships with the package, with its tokenizer and task."""
    model, tokenizer = load_model("tiny")
    return Decoder(model, tokenizer, load_task("sudoku"), model.config.mask_token_id, tokenizer.eos_token_id, 64)


@pytest.fixture
def small_run() -> list[str]:
    """Options of a training run that takes about a second with the shipped model."""
    options = {
        "recipe": "tiny",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "train_problems": 16,
        "validation_problems": 4,
        "eval_problems": 4,
        "gen_length": 48,
        "block_length": 8,
        "steps": 12,
        "pass_k": 2,
        "lora_r": 4,
        "bf16": "false",
        "report_to": "none",
        "inspect_samples": 0,
        "load_best_model_at_end": "false",  # which validates, and saves, what it begins with too
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random checkpoint with the character tokenizer; read only."""
    from dopsd.assets.pretrain import character_tokenizer

    folder = tmp_path_factory.mktemp("random") / "model"
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = LLaDAConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        n_layers=2,
        n_heads=2,
        mlp_hidden_size=24,
        max_sequence_length=128,
        rope_theta=10000.0,
        weight_tying=False,
        init_std=0.3,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LLaDAModelLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bare_path() -> str:
    """PYTHONPATH of processes in which nothing is installed that isn't needed to start."""
    tests = Path(__file__).parent
    return os.pathsep.join([str(tests / "without"), str(tests.parent)])


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command as ``python -m`` would, in this process: its exit status, standard output and standard error."""
    from dopsd import cli

    def run(main: Callable[[Sequence[str]], None], *argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *argv])
        status = 0
        capsys.readouterr()
        try:
            cli.run(main)
        except SystemExit as error:
            status = int(error.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def make_trainer(tmp_path: Path, small_run: list[str]) -> Callable[..., Trainer]:
    """Builds a Trainer as ``dopsd.train`` does, writing to a new folder unless ``argv`` names one."""
    from dopsd.commands import parse_train
    from dopsd.tasks.sudoku import Sudoku
    from dopsd.trainer import Trainer

    def make(*argv: str, task: Sudoku | None = None) -> Trainer:
        folder = str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        options = small_run.copy()
        if "--full_finetune" in argv:
            place = options.index("--lora_r")
            del options[place : place + 2]
        model_arguments, tasks, rollouts, teaching, args = parse_train([*options, "--output_dir", folder, *argv])
        set_seed(args.seed)
        task = task or Sudoku()
        base, tokenizer = load_model(model_arguments.model)
        decoder = Decoder(base, tokenizer, task, base.config.mask_token_id, tokenizer.eos_token_id, 64)
        student = model_arguments.student(base)
        rows = (task.problems("train", tasks.train_problems), task.problems("validation", tasks.validation_problems))
        return Trainer(student, args, model_arguments, rollouts, teaching, decoder, *rows, processing_class=tokenizer)

    return make
