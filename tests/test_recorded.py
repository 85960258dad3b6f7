"""What folders say of how they were made, and that an evaluation goes by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dopsd import report
from dopsd.commands import parse_train
from dopsd.errors import RunError, UsageError
from dopsd.evaluation import command as evaluate
from dopsd.evaluation.options import parse_evaluate
from dopsd.files import write_json
from dopsd.models import add_lora, load_model
from dopsd.recorded import recorded
from dopsd.tasks.sudoku import Sudoku
from dopsd.trainer import Trainer

Command = Callable[..., tuple[int, str, str]]

RUN: dict[str, dict[str, Any]] = {
    "model": {
        "model": "some/model",
        "adapter": "x",
        "dtype": "float32",
        "mask_token_id": 7,
        "shift_logits": True,
    },
    "task": {"task": "sudoku", "grading": "strict", "test_file": None, "eval_problems": 9},
    "rollout": {
        **{"gen_length": 64, "block_length": 16, "steps": 24, "pass_k": 8, "temperature": 0.5, "threshold": 0.75},
        **{"remasking": "low_confidence", "stop_at_eos": False, "sampling_dtype": "float64", "cache": "dual"},
        **{"sequences_per_forward": 3, "eval_tokens_per_step": [1]},
    },
    "training": {"bf16": True, "seed": 11, "output_dir": "elsewhere"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder, as an earlier release left it, with a checkpoint."""
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"id": "0", **RUN}))
    return tmp_path / "run"


def test_an_evaluation_without_options_finds_what_the_run_found(
    command: Command, make_trainer: Callable[..., Trainer], small_run: list[str], tmp_path: Path
) -> None:
    """Model, lengths, steps, what is drawn at random and in which precision: the held-out responses after training to
    the character, from the run's folder alone. It says in a line whose options these are."""
    run, output = tmp_path / "run", tmp_path / "out.json"
    argv = ["--output_dir", str(run), "--eval_problems", "12", "--steps", "20", "--remasking", "random", "--seed", "7"]
    argv += ["--stop_at_eos", "false", "--sampling_dtype", "float64", "--cache", "prefix", "--bf16", "true"]
    argv += ["--eval_tokens_per_step", "8"]
    config = report.configuration(*parse_train([*small_run, *argv]))
    trainer = make_trainer(*argv)
    for name, parameter in trainer.student.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)  # as if it had been trained
    trainer.save_adapter(run)
    write_json(run / "run.json", config)
    report.held_out(trainer, Sudoku().problems("test", 12), "after", run)
    held_out = json.loads((run / "held_out_after.json").read_text())["tokens_per_step"]["2.4"]

    code, out, err = command(evaluate.main, "--adapter", str(run), "--output", str(output))
    assert code == 0, err
    (result,) = json.loads(output.read_text())["results"]
    assert result["responses"] == held_out
    (line,) = [line for line in out.splitlines() if line.startswith(f"as in {run / 'run.json'}: ")]
    for word in ("model=tiny", "task=['sudoku']", "remasking=random", "tokens_per_step=[2.4]", "bf16=True"):
        assert word in line
    code, out, _ = command(evaluate.main, "--compare", str(run / "held_out_after.json"), str(output))
    assert code == 0 and "+0.0 ± 0.0" in out


def test_what_a_run_says_is_taken_and_what_is_given_overrides_it(folder: Path) -> None:
    """Every option of the model, the task and the decoding; those of another model or task are left out."""
    for place in (folder, folder / "checkpoint-2"):
        args = vars(parse_evaluate(["--adapter", str(place)]))
        expected = {**RUN["model"], **RUN["task"], **RUN["rollout"], **RUN["training"], "adapter": str(place)}
        expected |= {"task": ["sudoku"], "gen_length": [64], "tokens_per_step": [64 / 24], "cache": "block"}
        for name in ("steps", "eval_tokens_per_step", "output_dir", "pass_k"):  # which an evaluation does not have
            del expected[name]
        assert {name: args[name] for name in expected} == expected
        assert args["pass_k"] == 1
    argv = ["--adapter", str(folder)]
    assert parse_evaluate(argv).decoding(Sudoku(), 64, 64 / 24).total_steps == 24
    given = parse_evaluate([*argv, "--model", "tiny", "--cache", "none", "--threshold", "none", "--seed", "1"])
    assert (given.model, given.mask_token_id, given.shift_logits, given.dtype) == ("tiny", None, False, "auto")
    assert (given.cache, given.threshold, given.seed, given.gen_length) == ("none", None, 1, [64])
    given = parse_evaluate([*argv, "--task", "countdown", "--threshold", "none", "--tokens_per_step", "1", "2"])
    assert (given.task, given.grading, given.eval_problems) == (["countdown"], "lenient", None)
    assert (given.gen_length, given.block_length, given.model) == (None, None, "some/model")
    given = parse_evaluate([*argv, "--task", "sudoku", "--model", "some/model", "--eval_problems", "2"])
    assert (given.eval_problems, given.grading, given.mask_token_id) == (2, "strict", 7)


def test_every_number_of_steps_is_a_rate() -> None:
    """Tokens a step, as a fraction, give back the steps of which they are the rate."""
    steps = list(range(8, 257))
    rates = [str(256 / count) for count in steps]
    args = parse_evaluate(["--gen_length", "256", "--block_length", "32", "--tokens_per_step", *rates])
    assert [args.decoding(Sudoku(), 256, rate).total_steps for rate in args.tokens_per_step] == steps


def test_a_plain_adapter_says_its_base_model(random_model: Path, tmp_path: Path) -> None:
    """What PEFT writes; nothing where it says none, or where there is no adapter."""
    adapter = tmp_path / "adapter"
    add_lora(load_model(str(random_model))[0], None, 4, 4, 0.0).save_pretrained(str(adapter))
    assert parse_evaluate(["--adapter", str(adapter)]).model == str(random_model)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    assert recorded(adapter) is None and recorded(tmp_path) is None
    assert parse_evaluate(["--adapter", str(adapter)]).model == "tiny"


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"task": {"task": "here/chess.py:Chess"}}, UsageError, ["run.json", "chess.py:Chess", "command line alone"]),
        ({"rollout": []}, RunError, ["run.json is damaged"]),
        ({"rollout": {**RUN["rollout"], "gen_length": "64"}}, RunError, ["run.json is damaged"]),
        ({"model": {"model": "tiny", "dtype": "complex64"}}, UsageError, ["--dtype", "complex64"]),
        (None, RunError, ["run.json: not valid JSON"]),
    ],
)
def test_what_is_wrong_in_a_folder_is_named(
    folder: Path, change: dict[str, Any] | None, kind: type[Exception], said: list[str]
) -> None:
    """Checked as options are; code is run only where the command line names it."""
    (folder / "run.json").write_text("{" if change is None else json.dumps({**RUN, **change}))
    with pytest.raises(kind) as error:
        parse_evaluate(["--adapter", str(folder)])
    for word in said:
        assert word in str(error.value)
