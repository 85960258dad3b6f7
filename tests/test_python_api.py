"""``dopsd.train``, ``load``, ``evaluate``, ``export``: what the commands do, without a word; the commands too."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dopsd
from dopsd import completions
from dopsd.errors import RunError, UsageError
from tests.test_imports import python

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL | re.MULTILINE)
PUZZLE = "0400002002101040:"

Command = Callable[..., tuple[int, str, str]]


def test_every_block_of_the_page_runs_and_nothing_else_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One after the other, in a new folder; what is printed is the table that the page prints."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    assert len(BLOCKS) == 8
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), names)
    out, err = capfd.readouterr()
    results, run, model = names["results"], names["run"], names["model"]
    assert err == "" and out == f"{results}\n"
    # What the objects say is what the files do, and the run decodes as it was trained to.
    assert results.accuracy == run.report["accuracy_after"]  # type: ignore[attr-defined]
    assert [row["step"] for row in run.metrics if "loss" in row] == [1.0, 2.0]  # type: ignore[attr-defined]
    assert (run.adapter / "adapter_model.safetensors").is_file()  # type: ignore[attr-defined]
    one = results.content["results"][0]["responses"][0]  # type: ignore[attr-defined]
    (again,) = model.generate([f"{one['puzzle']}:"])  # type: ignore[attr-defined]
    assert again.text == one["response"]


def test_importing_is_light() -> None:
    """None of what takes seconds is imported, and the version is the package's."""
    program = "import sys, dopsd; print(sorted(sys.modules)); print(dopsd.__version__)"
    loaded, version = python(program).splitlines()
    for package in ("torch", "transformers", "numpy", "tqdm", "yaml", "dopsd.config"):
        assert f"'{package}'" not in loaded
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()


def test_what_takes_seconds_is_said_before_it_is_imported() -> None:
    """By every command, on a terminal; in a pipe standard error is for what goes wrong."""
    program = """
import io, runpy, sys

sys.modules["torch"] = None
for name in ("train", "evaluate", "plan", "sample", "export"):
    for terminal in (True, False):
        sys.stderr = io.StringIO()
        sys.stderr.isatty = lambda: terminal
        try:
            runpy.run_module(f"dopsd.{name}", run_name="__main__")
        except SystemExit as end:
            assert end.code == 1
        print(*(word for word in sys.stderr.getvalue().split() if word in ("importing", "error:")))
"""
    assert python(program) == "importing error:\nerror:\n" * 5


@pytest.mark.parametrize(
    ("name", "arguments", "argv", "said"),
    [
        ("train", {"pass_k": 0}, ["--pass_k", "0"], "pass_k must be"),
        ("evaluate", {"source": "tiny", "pass_k": 0}, ["--pass_k", "0"], "pass_k must be"),
        ("export", {"source": "none", "output_dir": "out"}, ["none", "--output_dir", "out"], "adapter must be"),
    ],
)
def test_a_function_and_a_command_have_one_name(
    name: str,
    arguments: dict[str, Any],
    argv: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both work, one after the other in one process, and no module of the package takes the function's place."""
    for _ in range(2):
        with pytest.raises(UsageError, match=said):
            getattr(dopsd, name)(**arguments)
        monkeypatch.setattr(sys, "argv", ["command", *argv])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(f"dopsd.{name}", run_name="__main__")
        assert end.value.code == 2 and said in capsys.readouterr().err


def test_options_are_checked_as_the_commands_are(random_model: Path) -> None:
    """An unknown one is answered with the nearest; a value out of range, or one that can't be, is named."""
    for call, said in (
        (lambda: dopsd.train(recipe="nano"), "recipe must be one of"),
        (lambda: dopsd.train(lora_r="many"), "lora_r"),
        (lambda: dopsd.train(gen_length=50, block_length=8), "gen_length=50"),
        (lambda: dopsd.evaluate("tiny", tokens_per_stp=2), "did you mean tokens_per_step"),
        (lambda: dopsd.load("tiny", dtyp="float32"), "did you mean dtype"),
        (lambda: dopsd.load("tiny", attn_implementation="none"), "attn_implementation"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            call()
    model = dopsd.load(random_model)
    for call, said in (
        (lambda: model.generate(PUZZLE), "it is one prompt"),
        (lambda: model.generate([PUZZLE], gen_lenght=8), "did you mean gen_length"),
        (lambda: model.generate([PUZZLE], gen_length=32, block_length=12), "block_length"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            call()
    with pytest.raises(RunError, match="prompts don't fit"):
        model.generate([PUZZLE], gen_length=128, block_length=32)
    assert model.generate([], gen_length=32, block_length=8) == []


def test_a_sample_depends_on_its_seed_and_place_alone(random_model: Path) -> None:
    """Not on what is generated beside it; another length keeps the tokens a step."""
    model = dopsd.load(random_model)
    options = {"temperature": 1.0, "gen_length": 16, "block_length": 8}
    first, second = model.generate([PUZZLE, "12="], seed=3, **options)
    (alone,) = model.generate([PUZZLE], seed=3, **options)
    (other,) = model.generate([PUZZLE], seed=4, **options)
    assert alone.trajectory.tokens.equal(first.trajectory.tokens)
    assert not other.trajectory.tokens.equal(first.trajectory.tokens)
    assert second.trajectory.num_steps <= 8 and model.decoding.total_steps == model.decoding.gen_length / 2


def test_the_command_completes_prompts_and_shows_how(command: Command, tmp_path: Path, random_model: Path) -> None:
    """Piped, ``--show`` gives a line a step: dots, of which each step leaves fewer, and at last the text."""
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PUZZLE}\n\n12=\n")
    lengths = ["--gen_length", "16", "--block_length", "8", "--steps", "8"]
    status, out, err = command(completions.main, "--model", str(random_model), "--prompt_lines", str(file), *lengths)
    texts = [one.text for one in dopsd.load(random_model).generate([PUZZLE, "12="], gen_length=16, block_length=8)]
    assert (status, err) == (0, "") and out.split("\n") == [PUZZLE, texts[0], "12=", texts[1], ""]

    status, out, _ = command(completions.main, "--model", str(random_model), "--prompt", PUZZLE, "--show", *lengths)
    prompt, *steps, text, _ = out.split("\n")
    assert (status, prompt, text) == (0, PUZZLE, texts[0])
    masked = [line.count(completions.MASKED) for line in steps]
    assert masked == sorted(masked, reverse=True) and len(set(masked)) == len(masked)
    assert steps[-1][4:].replace(completions.MASKED, completions.END).partition(completions.END)[0] == text
    status, _, err = command(completions.main)
    assert status == 2 and "prompt" in err
    status, _, err = command(completions.main, "--prompt_lines", str(tmp_path / "absent"))
    assert status == 2 and "prompt_lines must be" in err
