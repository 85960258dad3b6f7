"""Bad input: one sentence on standard error that names the cause, the exit status, and nothing on disk damaged."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dopsd import limits, run
from dopsd.assets.pretrain import character_tokenizer
from dopsd.errors import RunError
from dopsd.evaluation import command as evaluate
from dopsd.models import add_lora, load_adapter, load_model
from dopsd.tasks import load_task
from dopsd.trainer import Trainer

Command = Callable[..., tuple[int, str, str]]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def the_error(err: str) -> str:
    """The one sentence on standard error, after checking that there is one and no traceback."""
    lines = err.strip().splitlines()
    assert "Traceback" not in err
    assert lines[-1].startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1, err
    return lines[-1]


@pytest.fixture
def broken_model(tmp_path: Path, random_model: Path) -> Callable[..., str]:
    """A copy of a small checkpoint with something wrong."""

    def build(kind: str) -> str:
        folder = tmp_path / kind
        if kind == "absent":
            return str(folder)
        shutil.copytree(random_model, folder)
        config = json.loads((folder / "config.json").read_text())
        weights = folder / "model.safetensors"
        if kind == "no config":
            (folder / "config.json").unlink()
        elif kind == "no json":
            (folder / "config.json").write_text("{model_type: llada")
        elif kind == "unknown type":
            (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
        elif kind == "no type":
            del config["model_type"]
            (folder / "config.json").write_text(json.dumps(config))
        elif kind == "no mask":
            (folder / "config.json").write_text(json.dumps({**config, "mask_token_id": None}))
            tokenizer = character_tokenizer()
            tokenizer.mask_token = None
            tokenizer.save_pretrained(folder)
        elif kind == "mask outside":
            (folder / "config.json").write_text(json.dumps({**config, "mask_token_id": 1000}))
        elif kind == "no eos":
            tokenizer = character_tokenizer()
            tokenizer.eos_token = None
            tokenizer.save_pretrained(folder)
        elif kind == "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        elif kind == "no weights":
            weights.unlink()
        elif kind in ("missing tensor", "nan"):
            tensors = load_file(weights)
            name = "model.transformer.blocks.1.q_proj.weight"
            if kind == "nan":
                tensors[name][0, 0] = torch.nan
            else:
                del tensors[name]
            save_file(tensors, weights, {"format": "pt"})
        elif kind == "other shape":
            (folder / "config.json").write_text(json.dumps({**config, "mlp_hidden_size": 32}))
        elif kind == "odd heads":
            (folder / "config.json").write_text(json.dumps({**config, "n_heads": 3}))
        elif kind == "short context":
            (folder / "config.json").write_text(json.dumps({**config, "max_sequence_length": 64}))
        else:
            raise AssertionError(kind)
        return str(folder)

    return build


@pytest.fixture
def small_adapter(random_model: Path, tmp_path: Path) -> Path:
    """The folder of an adapter of rank 4 for the small checkpoint, on its seven kinds of layers, two of each."""
    folder = tmp_path / "adapter"
    add_lora(load_model(str(random_model))[0], None, 4, 4, 0.0).save_pretrained(str(folder))
    return folder


# ---- models ----


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        ("absent", 2, ["model=", "config.json"]),
        ("no config", 2, ["model=", "config.json"]),
        ("no json", 1, ["config.json", "not valid JSON"]),
        ("unknown type", 2, ["model=", "model_type='gpt2'", "llada"]),
        ("no type", 2, ["model=", "model_type=None", "llada"]),
        ("no mask", 1, ["model=", "no mask token", "mask_token_id"]),
        ("mask outside", 1, ["model=", "no mask token", "1000"]),
        ("no eos", 1, ["model=", "eos_token"]),
        ("truncated", 1, ["model=", "can't be loaded"]),
        ("no weights", 1, ["model=", "can't be loaded", "model.safetensors"]),
        ("missing tensor", 1, ["model=", "missing", "blocks.1.q_proj.weight"]),
        ("other shape", 1, ["model=", "mismatched"]),
        ("odd heads", 1, ["model=", "n_heads=3"]),
        ("short context", 1, ["16 of 16 prompts", "row 0 has 17 tokens", "gen_length=48", "context of 64"]),
    ],
)
def test_a_bad_model_is_named_and_leaves_no_output_folder(
    kind: str,
    status: int,
    said: list[str],
    broken_model: Callable[..., str],
    command: Command,
    small_run: list[str],
    tmp_path: Path,
) -> None:
    """The sentence holds what is wrong; the same output_dir is then free for the corrected command."""
    model, output = broken_model(kind), tmp_path / "output"
    before = contents(tmp_path)
    code, _, err = command(run.main, *small_run, "--output_dir", str(output), "--model", model)
    sentence = the_error(err)
    assert code == status, sentence
    for word in said:
        assert word in sentence
    assert model in sentence or kind == "short context"
    assert "unexpected" not in sentence
    assert not output.exists() or not list(output.iterdir())
    assert contents(tmp_path) == before


def test_a_hub_name_that_cannot_be_read_is_a_usage_error(
    command: Command, small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A misspelt shipped name is taken for a hub model; the sentence says what it could have been."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, err = command(run.main, *small_run, "--output_dir", str(tmp_path / "output"), "--model", "tyni")
    assert code == 2
    for word in ("model='tyni'", "neither tiny, tiny-causal, nor a folder, nor a hub model"):
        assert word in the_error(err)


@pytest.mark.parametrize("model", ["absent", "gpt2", "tyni"])
def test_a_model_that_is_not_there_is_said_before_any_rows_are_fetched(
    model: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, an architecture or a hub id that can't be used, and an adapter: no dataset is asked for."""
    import huggingface_hub.constants

    def fetch(*_: object) -> None:
        raise AssertionError("rows were fetched")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("dopsd.tasks.benchmark.hub_rows", fetch)
    folder = tmp_path / model
    if model == "gpt2":
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    name = model if model == "tyni" else str(folder)
    code, _, err = command(evaluate.main, "--task", "gsm8k", "--model", name)
    assert code == 2 and f"model={name!r}" in the_error(err)
    code, _, err = command(evaluate.main, "--task", "gsm8k", "--adapter", str(tmp_path))
    assert code == 2 and f"but is {str(tmp_path)!r}" in the_error(err)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lora_r", "100000"], "lora_r must be at most "),
        (["--train_problems", "100000000"], "train_problems must be at most 32768"),
        (["--eval_problems", "100000000"], "eval_problems must be at most 32768"),
        (["--gen_length", "4000000000"], "the model's context of"),
    ],
)
def test_absurd_sizes_are_refused_at_once(
    argv: list[str], said: str, command: Command, small_run: list[str], tmp_path: Path
) -> None:
    """Before memory is asked for, or problems are made up."""
    output, start = tmp_path / "output", time.process_time()
    code, _, err = command(run.main, *small_run, "--steps", "none", "--output_dir", str(output), *argv)
    assert code and said in the_error(err)
    assert time.process_time() - start < 10 and not output.exists()


def test_a_tokenizer_mask_is_used_when_the_config_names_none(random_model: Path, tmp_path: Path) -> None:
    """A config.json without mask_token_id is completed from the tokenizer, not from another model's default."""
    folder = tmp_path / "model"
    shutil.copytree(random_model, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["mask_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    model, tokenizer = load_model(str(folder))
    assert model.config.mask_token_id == tokenizer.mask_token_id == character_tokenizer().mask_token_id


# ---- adapters ----


def test_an_adapter_of_another_width_is_refused(
    make_trainer: Callable[..., Trainer], random_model: Path, command: Command, small_run: list[str], tmp_path: Path
) -> None:
    """Both commands name the tensor and both sizes; a folder that is no adapter is told what one holds."""
    adapter = tmp_path / "adapter"
    make_trainer("--model", str(random_model)).save_adapter(adapter)
    before = contents(adapter)
    for main, options in ((run.main, small_run), (evaluate.main, ["--eval_problems", "2"])):
        output = ["--output_dir", str(tmp_path / "output")] if main is run.main else []
        code, _, err = command(main, *options, *output, "--model", "tiny", "--adapter", str(adapter))
        assert code == 2
        sentence = the_error(err)
        for word in (f"adapter='{adapter}'", "(4, 16)", "(4, 128)", "blocks.0."):
            assert word in sentence
        code, _, err = command(main, *options, *output, "--adapter", str(random_model))
        assert code == 2
        for word in ("adapter must be", repr(str(random_model)), "adapter_config.json", "adapter_model.safetensors"):
            assert word in the_error(err)
    (adapter / "adapter_model.safetensors").write_bytes(b"no tensors")
    code, _, err = command(evaluate.main, "--model", str(random_model), "--adapter", str(adapter))
    assert code == 1 and str(adapter) in the_error(err) and "unexpected" not in err
    assert not (tmp_path / "output").exists()
    assert before == {**contents(adapter), "adapter_model.safetensors": before["adapter_model.safetensors"]}


Q = "base_model.model.model.transformer.blocks.1.q_proj.lora_B.weight"


def with_tensor(tensors: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """An adapter's tensors with some of the one named Q's entries, or itself, replaced."""
    changed = tensors[Q].clone()
    changed[0, 0] = changes.get("entry", 0.0)
    return {**tensors, Q: changes.get("tensor", changed)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: {}, ["has no ", "and 27 others"]),
        (lambda tensors: {key: tensors[key] for key in list(tensors)[::2]}, ["has no ", "and 13 others"]),
        (lambda tensors: {key: tensors[key] for key in tensors if key != Q}, [f"has no {Q}"]),
        (lambda tensors: with_tensor(tensors, entry=torch.nan), [Q, "no finite numbers"]),
        (lambda tensors: with_tensor(tensors, entry=-torch.inf), [Q, "no finite numbers"]),
        (lambda tensors: with_tensor(tensors, tensor=torch.zeros(16, 4, dtype=torch.int8)), [Q, "no finite numbers"]),
        (lambda tensors: with_tensor(tensors, tensor=torch.zeros(16, 5)), [Q, "(16, 5)", "(16, 4)"]),
        (
            lambda tensors: {**tensors, Q.replace("q_proj", "norm"): torch.zeros(1)},
            ["blocks.1.norm", "no linear layer"],
        ),
    ],
    ids=["none", "half", "one", "nan", "inf", "integers", "rank", "other"],
)
def test_every_tensor_of_an_adapter_is_checked(
    change: Callable[[dict[str, Any]], dict[str, Any]],
    said: list[str],
    small_adapter: Path,
    random_model: Path,
    command: Command,
    small_run: list[str],
    tmp_path: Path,
) -> None:
    """Training from it and evaluating it are refused with the file and the tensor; nothing is written."""
    weights = small_adapter / "adapter_model.safetensors"
    save_file(change(load_file(weights)), weights, {"format": "pt"})
    output = ["--output_dir", str(tmp_path / "output")]
    options = ["--model", str(random_model), "--adapter", str(small_adapter)]
    for main, argv in ((run.main, [*small_run, *output]), (evaluate.main, ["--eval_problems", "2"])):
        code, out, err = command(main, *argv, *options)
        assert code == 2 and "accuracy" not in out
        for word in (f"adapter='{small_adapter}'", *said):
            assert word in the_error(err)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"target_modules": "(.+)+-"}, 1, ["finding the layers", "takes more than"]),
        ({"rank_pattern": {"(.+)+-": 4}}, 1, ["finding the layers", "takes more than"]),
        ({"target_modules": "("}, 1, ["adapter_config.json", "none"]),
        ({"target_modules": None}, 1, ["adapter_config.json", "none"]),
        ({"target_modules": ["gate"]}, 2, ["names no layer"]),
        ({"target_modules": ["q_proj"]}, 2, ["attn_out", "does not name"]),
        ({"r": 999999999999}, 2, ["lora_A.weight is (4, 16)", "(999999999999, 16)"]),
        ({"lora_alpha": float("nan")}, 2, ["rank, alpha or dropout"]),
        ({"lora_alpha": "many"}, 1, ["adapter_config.json"]),
        ({"layer_replication": [[0, 2], [0, 2]]}, 2, ["layer_replication"]),
        ({"init_lora_weights": "pissa"}, 2, ["init_lora_weights='pissa'"]),
        ({"peft_type": "LOHA"}, 2, ["peft_type='LOHA'"]),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else None,
)
def test_an_adapters_config_is_not_trusted(
    changes: dict[str, Any],
    status: int,
    said: list[str],
    small_adapter: Path,
    random_model: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Patterns that take for ever, sizes that are none, and whatever would change more than the adapter's own part."""
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    config = small_adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    code, _, err = command(evaluate.main, "--model", str(random_model), "--adapter", str(small_adapter))
    assert code == status, err
    for word in (f"adapter='{small_adapter}'", *said):
        assert word in the_error(err)
    assert "unexpected" not in err


def test_an_adapter_with_ranks_of_its_own_is_read(small_adapter: Path, random_model: Path) -> None:
    """Ranks and scales by pattern, and names instead of a pattern, as PEFT itself reads them."""
    weights, config = (small_adapter / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    tensors = {
        key: (value[:2] if "lora_A" in key else value[:, :2]) if "q_proj" in key else value
        for key, value in load_file(weights).items()
        if "q_proj" in key or "ff_proj" in key
    }
    save_file({key: value.contiguous() for key, value in tensors.items()}, weights, {"format": "pt"})
    changes = {"target_modules": ["q_proj", "ff_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    student = load_adapter(load_model(str(random_model))[0], str(small_adapter), trainable=True)
    trained = {name.replace(".default", ""): p for name, p in student.named_parameters() if p.requires_grad}
    assert trained.keys() == tensors.keys() and all(torch.equal(trained[key], tensors[key]) for key in tensors)
    layer = student.get_submodule(Q.partition(".lora_B")[0])
    assert layer.scaling == {"default": 3 / 2}


# ---- tasks and rows ----


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("empty.csv", "", ["no rows"]),
        ("header.csv", "puzzle,solution\n", ["no rows"]),
        ("empty.jsonl", "\n", ["no rows"]),
        ("columns.csv", "puzzle,answer\n12,34\n", ["missing column solution", "puzzle, answer"]),
        ("columns.jsonl", '{"question": "1"}\n', ["missing column puzzle, solution", "question"]),
        ("value.csv", "puzzle,solution\n,1234341221434321\n", ["row 0", "puzzle"]),
        ("wrong.csv", "puzzle,solution\n1200341221434321,1111222233334444\n", ["row 0", "no solved grid"]),
        ("other.csv", "puzzle,solution\n4200341221434321,1234341221434321\n", ["row 0", "disagree"]),
        ("more.csv", "puzzle,solution\n1200341221434321,1234341221434321,3\n", ["row 0 has more values"]),
        ("quotes.csv", 'puzzle,solution\n"12"34,5\n', ["can't be read as csv"]),
        ("garbage.jsonl", "no json\n", ["can't be read as jsonl"]),
        ("words.json", '["puzzle"]', ["row 0 is no object"]),
        ("garbage.parquet", "no parquet\n", ["can't be read as parquet"]),
        ("rows.txt", "x\n", [".csv", ".jsonl", ".parquet"]),
        ("absent.csv", None, ["no such file"]),
    ],
)
def test_bad_rows_name_the_file(
    name: str, text: str | None, said: list[str], command: Command, small_run: list[str], tmp_path: Path
) -> None:
    """Exit status 1, the path, the reason, and for one row its number."""
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    output = tmp_path / "output"
    code, _, err = command(run.main, *small_run, "--output_dir", str(output), "--train_file", str(path))
    assert code == 1
    for word in (str(path), *said):
        assert word in the_error(err)
    assert "unexpected" not in err
    assert not output.exists()
    assert text is None or path.read_text() == text


# ---- options ----


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--task", "sudok"], ["task='sudok'", "sudoku"]),
        (["--lora_targets", "q_proj", "k_prox"], ["lora_targets='k_prox'", "q_proj, k_proj"]),
        (["--clip", "-1"], ["clip must be", "but is -1.0", "at least 0, or none"]),
        (["--retain_ratio", "1.5"], ["retain_ratio must be", "but is 1.5", "[0, 1]"]),
        (["--pass_k", "0"], ["pass_k must be", "but is 0", "at least 1"]),
        (["--temperature", "0"], ["temperature must be", "but is 0.0", "pass_k=2"]),
        (["--gen_length", "50"], ["block_length must be", "gen_length=50, but is 8"]),
        (["--gradient_accumulation_steps", "2"], ["gradient_accumulation_steps=2", "per_device_train_batch_size"]),
        (["--learning_rat", "1"], ["--learning_rat", "--learning_rate"]),
        (["--recipe", "nano"], ["recipe must be", "but is 'nano'", "tiny"]),
        (["--load_best_model_at_end", "true", "--eval_strategy", "no"], ["load_best_model_at_end"]),
        (["--memory_budget", "24x"], ["memory_budget must be", "but is '24x'", "24GiB", "80%"]),
        (["--memory_budget", "120%"], ["memory_budget must be", "but is '120%'", "share"]),
        (["--resume_from_checkpoint", "true"], ["resume_from_checkpoint='true'", "holds no run"]),
    ],
    ids=lambda part: part[0].removeprefix("--") if part[0].startswith("--") else "",
)
def test_an_unusable_option_exits_with_2(
    argv: list[str], said: list[str], command: Command, small_run: list[str], tmp_path: Path
) -> None:
    """Named together with what is accepted; no folder is made."""
    output = tmp_path / "output"
    code, _, err = command(run.main, *small_run, "--output_dir", str(output), *argv)
    assert code == 2
    for word in said:
        assert word in the_error(err)
    assert not output.exists()


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("9999GiB", ["memory_budget must be at most", "the device has, but is '9999GiB'"]),
        ("0.01GiB", ["memory_budget='0.01GiB'", "weights 0.0", "--reuse block", "--optim adamw_8bit"]),
    ],
)
def test_a_budget_that_does_not_do_is_said_before_the_run(
    budget: str, said: list[str], command: Command, small_run: list[str], tmp_path: Path
) -> None:
    """What is needed, what for and what would help; nothing is decoded or written."""
    output = tmp_path / "output"
    code, out, err = command(run.main, *small_run, "--output_dir", str(output), "--memory_budget", budget)
    assert code == 2 and "held-out" not in out
    for word in said:
        assert word in the_error(err)
    assert not output.exists() or not list(output.iterdir())


def test_an_optimiser_that_is_not_installed_is_said_before_the_run(
    command: Command, small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra that brings it is named, and nothing is decoded or written."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    output = tmp_path / "output"
    code, _, err = command(run.main, *small_run, "--output_dir", str(output), "--optim", "adamw_8bit")
    assert code == 2
    for word in ("optim='adamw_8bit'", "dopsd[quant]"):
        assert word in the_error(err)
    assert not output.exists()


def test_an_evaluation_that_could_not_write_its_result_does_not_start(command: Command, tmp_path: Path) -> None:
    """A missing folder is told before anything is decoded, in no time at all."""
    path = tmp_path / "absent" / "result.json"
    code, _, err = command(evaluate.main, "--output", str(path))
    assert code == 2
    assert f"output='{path}'" in the_error(err) and "response" not in err


# ---- folders and checkpoints ----


def test_folders_of_others_are_left_alone_and_runs_go_on_only_as_they_began(
    command: Command, small_run: list[str], random_model: Path, tmp_path: Path
) -> None:
    """A folder that holds anything is refused, so is another option or a cut checkpoint on resume: no byte changes."""
    output = tmp_path / "run"
    options = [*small_run, "--model", str(random_model), "--correct_only", "false", "--save_steps", "1"]
    options += ["--output_dir", str(output)]
    # A failed start is no obstacle to the corrected command.
    assert command(run.main, *options, "--model", str(tmp_path / "absent"))[0] == 2
    code, out, _ = command(run.main, *options)
    assert code == 0 and "held-out accuracy" in out
    before = contents(output)
    assert "report.json" in before and "checkpoint-2/trainer_state.json" in before

    def refused(status: int, *argv: str, said: list[str]) -> None:
        code, _, err = command(run.main, *options, *argv)
        assert code == status
        for word in said:
            assert word in the_error(err)
        assert contents(output) == before

    resume = ["--resume_from_checkpoint"]
    refused(2, said=[f"output_dir='{output}'", "empty or new folder", "--resume_from_checkpoint true"])
    refused(2, *resume, "true", "--clip", "0.5", said=["clip=0.5", "clip=None", str(output)])
    refused(2, *resume, "true", "--learning_rate", "1", said=["learning_rate=1.0", "learning_rate=0.002"])
    refused(2, *resume, "true", "--seed", "5", said=["seed=5", "seed=42"])
    refused(1, *resume, str(tmp_path / "checkpoint-9"), said=["checkpoint-9", "no complete checkpoint"])
    (output / "checkpoint-2" / "trainer_state.json").rename(tmp_path / "state")
    before = contents(output)
    refused(1, *resume, str(output / "checkpoint-2"), said=["checkpoint-2", "no complete checkpoint"])

    other = tmp_path / "notes"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("also years")
    for taken in (other, file):
        code, _, err = command(run.main, *options, "--output_dir", str(taken))
        assert code == 2 and f"output_dir='{taken}'" in the_error(err)
    assert contents(other) == {"thesis.txt": b"years of work"} and file.read_text() == "also years"


# ---- while training ----


def test_a_loss_that_is_no_number_ends_the_run_with_its_update(
    command: Command, small_run: list[str], broken_model: Callable[..., str], tmp_path: Path
) -> None:
    """A NaN among the weights: exit status 1, the number of the update, and no adapter that looks like a result."""
    output = tmp_path / "output"
    argv = [*small_run, "--model", broken_model("nan"), "--correct_only", "false", "--output_dir", str(output)]
    code, _, err = command(run.main, *argv)
    assert code == 1
    for word in ("the loss is nan", "update 1", str(output)):
        assert word in the_error(err)
    assert not (output / "adapter_model.safetensors").exists() and not (output / "report.json").exists()


def test_a_later_nan_leaves_the_last_checkpoint_unharmed(
    make_trainer: Callable[..., Trainer], random_model: Path
) -> None:
    """A LoRA weight set to NaN after update 1: update 2 is named, checkpoint-1 has the bytes it had and is named; one
    that has not is not said to be unharmed."""
    from transformers import TrainerCallback

    trainer = make_trainer("--model", str(random_model), "--correct_only", "false", "--save_steps", "1")
    checkpoint = Path(trainer.args.output_dir or "") / "checkpoint-1"
    kept: dict[str, bytes] = {}

    class Poison(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            kept.update(contents(checkpoint))
            name, weight = next((n, p) for n, p in trainer.student.named_parameters() if p.requires_grad)
            assert "lora_A" in name
            weight.data[0, 0] = torch.nan

    trainer.add_callback(Poison())
    with pytest.raises(RunError, match=r"the loss is nan at update 2; .*checkpoint-1, .*, is unharmed"):
        trainer.train()
    assert kept and contents(checkpoint) == kept
    assert not (checkpoint.parent / "checkpoint-2").exists()
    (checkpoint / "optimizer.pt").write_bytes(kept["optimizer.pt"][:-1])
    assert "there is no complete checkpoint" in str(trainer.not_finite("the loss is nan at"))


# ---- the rest ----


def boom(argv: Any) -> None:
    """A command with a fault of its own."""
    raise ZeroDivisionError("no\nreason")


def test_an_unexpected_exception_is_one_line(command: Command) -> None:
    """Its type, its text and how to see more; exit status 1."""
    code, _, err = command(boom)
    assert code == 1
    assert re.fullmatch(r"error: ZeroDivisionError: no reason \(unexpected; --debug shows where\)", the_error(err))
    assert len(err.strip().splitlines()) == 1


def test_a_large_row_is_not_quoted_whole(command: Command, tmp_path: Path) -> None:
    """What an error quotes of a file of megabytes is its beginning and its end."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"puzzle": "0" * 5_000_000, "solution": "1234"}]))
    code, _, err = command(evaluate.main, "--test_file", str(path))
    assert code == 1 and f"{path}: row 0" in the_error(err) and "is no solved grid" in the_error(err)
    assert len(err) < 2100


def test_debug_shows_where(command: Command) -> None:
    """With --debug an unexpected exception is raised as it is, and a usage error prints its traceback as well."""
    with pytest.raises(ZeroDivisionError) as raised:
        command(boom, "--debug")
    assert raised.traceback[-1].name == "boom"
    code, _, err = command(run.main, "--debug", "--pass_k", "0")
    assert code == 2
    assert "Traceback" in err and "UsageError" in err
    assert err.strip().splitlines()[-1].startswith("error: pass_k must be at least 1, but is 0")


def test_an_interrupt_is_no_error(command: Command) -> None:
    """Ctrl-C ends with the shell's usual status and without a word."""

    def interrupted(argv: Any) -> None:
        raise KeyboardInterrupt

    assert command(interrupted)[::2] == (130, "")


def test_an_unknown_task_names_the_known() -> None:
    """Also for callers of the library."""
    with pytest.raises(ValueError, match=r"task='chess' can't be used: known are .*sudoku"):
        load_task("chess")
