"""The card beside an adapter, and that it and the adapter alone are published."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub.utils import filter_repo_objects

from dopsd import model_card, report, run
from dopsd.commands import parse_train

COLLAPSE = {"update": 5, "measure": "validation accuracy", "from": 0.9, "best_update": 4, "to": 0.1, "action": "stop"}


def result(*argv: str, **changes: Any) -> dict[str, Any]:
    """A report as a run writes it."""
    own = report.compare([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0])
    return {
        "config": report.configuration(*parse_train(argv)),
        "tokens_per_step": {"2": own},
        "eval_problems": 4,
        "collapse": [],
        "updates": 6,
        "seconds": 12.3,
        "device": "cpu",
        "versions": report.versions(),
        **changes,
    }


def test_what_a_card_says(tmp_path: Path) -> None:
    """The hub's id of the base, the interval of each accuracy, the curves if there are some, a collapse if there was
    one; no license, which nobody has given, and no code that isn't Python."""
    (tmp_path / "curves.png").touch()
    falls = [{**COLLAPSE, "back_to": 4}]
    text = model_card.card(tmp_path, result("--model", "somebody/base", "--clip", "0.04", collapse=falls), 7)
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == "somebody/base" and head["library_name"] == "peft" and "license" not in head
    assert "# license: to be filled in" in text and "arXiv" not in text
    # Wilson's intervals of 1 and 3 of 4; the gain's is the normal one of differences 0, 1, 1, 0.
    assert "| 2 | 25.0 (4.6 to 69.9) | 75.0 (30.1 to 95.4) | +50.0 (-6.6 to +100.0) |" in text
    assert "collapse at update 5" in text and "![Training curves](curves.png)" in text and "`clip`: 0.04" in text
    assert "recipe `paper`" in text.lower() and "id 7" in text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "card", "exec")
    (tmp_path / "curves.png").unlink()
    assert "curves" not in model_card.card(tmp_path, result(), 7)


def test_a_card_names_no_local_path(tmp_path: Path) -> None:
    """Neither of a base model nor of a recipe or a task; the model that ships is called so."""
    base, recipe, task = tmp_path / "base", tmp_path / "mine.yaml", tmp_path / "chess.py"
    base.mkdir()
    recipe.write_text("gen_length: 64\nsteps: 32\n")
    argv = ["--model", str(base), "--recipe", str(recipe), "--task", f"{task}:Chess"]
    text = model_card.card(tmp_path, result(*argv), 7)
    assert str(tmp_path) not in text and "base_model:" not in text
    for word in ("`base`", "`mine.yaml`", "`chess.py:Chess`"):
        assert word in text
    text = model_card.card(tmp_path, result(), 7)
    assert "`tiny`, the small model that ships" in text and "base_model:" not in text


def test_the_adapter_and_its_card_are_published_and_nothing_else(
    command: Callable[..., tuple[int, str, str]],
    small_run: list[str],
    random_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the end, though the run has saved checkpoints; if it fails the run stands, and the same command publishes."""
    said: list[dict[str, Any]] = []
    faults = [OSError("no network")]

    class Hub:
        def __init__(self, token: str | None) -> None:
            assert token is None

        def create_repo(self, name: str, **options: Any) -> Any:
            assert options == {"private": None, "exist_ok": True}
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **options: Any) -> None:
            if faults:
                raise faults.pop()
            said.append(options)

    monkeypatch.setattr(model_card, "HfApi", Hub)
    output = tmp_path / "mine"
    argv = [*small_run, "--model", str(random_model), "--correct_only", "false", "--output_dir", str(output)]
    argv += ["--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1", "--eval_strategy", "no"]
    status, _, err = command(run.main, *argv, "--push_to_hub", "true")
    assert status == 1 and "has finished, but can't be published as me/mine: no network" in err
    assert (output / "checkpoint-1").is_dir() and (output / "report.json").is_file()
    assert command(run.main, *argv, "--push_to_hub", "true", "--resume_from_checkpoint", "true")[0] == 0
    (upload,) = said
    assert upload["repo_id"] == "me/mine" and upload["folder_path"] == output
    every = [str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(every, allow_patterns=upload["allow_patterns"]))
    assert sent == {"README.md", "adapter_config.json", "adapter_model.safetensors", "curves.png"}
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(random_model)
    assert "d-OPSD" in (output / "README.md").read_text()
