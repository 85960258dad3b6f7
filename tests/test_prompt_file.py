"""Prompts of one's own, and what responses go on from: read, filled in, decoded, recorded and taken over."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, write_files
from test_tasks import ChatTokenizer

import dopsd
from dopsd import report, run
from dopsd.baselines.solutions import solution_ids
from dopsd.commands import parse_train
from dopsd.errors import RunError, UsageError
from dopsd.evaluation import command as evaluate
from dopsd.evaluation import journal
from dopsd.evaluation import run as evaluation
from dopsd.evaluation.options import parse_evaluate
from dopsd.evaluation.settings import identity
from dopsd.prompt_file import COPY, LONGEST, PromptFile
from dopsd.rollout import Decoder
from dopsd.sampler import Decoding, decode
from dopsd.seeds import mix_seeds
from dopsd.tasks import load_task
from dopsd.tasks.sudoku import Sudoku

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], str]:
    """Writes a prompt file; its name."""

    def written(content: str | bytes) -> str:
        path = tmp_path / "mine.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return written


# ---- the file ----


@pytest.mark.parametrize(
    ("content", "user", "system"),
    [
        ("{a} and {b}, {a}", "x and {b}!r, x", None),
        ("\\boxed{{...}} {{{a}}} }}{{\n\n{a}\n\n", "\\boxed{...} {x} }{\n\nx\n", None),
        (b"\xef\xbb\xbf{a}\r\n\r\nSo:\r\n", "x\n\nSo:", None),
        ("[system]\nBe brief.\n\nAlways.\n[user]\n{a}\n", "x", "Be brief.\n\nAlways."),
        ("[system]\n{b}\n[user]\n[user]\nGo.", "[user]\nGo.", "{b}!r"),
        ("Be brief.\n\n{a}\n---\n[user]\n", "Be brief.\n\nx\n---\n[user]", None),
        ("{the column}", "y", None),
    ],
)
def test_a_file_is_filled_in(write: Callable[..., str], content: str | bytes, user: str, system: str | None) -> None:
    """Braces that are doubled are braces, in a value too; a system's turn is one that is called so."""
    name = write(content)
    found = PromptFile.read(name)
    assert found.turns({"a": "x", "b": "{b}!r", "the column": "y"}) == (user, system)
    assert found.sha256 == hashlib.sha256(Path(name).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it is empty"),
        (" \n\t\n", "it is empty"),
        (b"\xff{a}", "no UTF-8 text"),
        ("{a}" + "." * LONGEST, f"it has {LONGEST + 3} bytes, and at most {LONGEST} are read"),
        ("Solve it. {{a}}", "it names no column"),
        ("[system]\n{a}\n", "no line [user]"),
        ("\\boxed{a", "expected '}'"),
        ("{a} }", "Single '}' encountered in format string (a brace that is meant is written twice"),
        ("{a:>9}", "more than a name stands between the braces of 'a'"),
        ("{a!r}", "more than a name"),
        ("{a:{b}}", "more than a name"),
    ],
)
def test_a_file_that_can_not_be_used_is_named(write: Callable[..., str], content: str | bytes, said: str) -> None:
    name = write(content)
    with pytest.raises(UsageError, match=rf"^prompt_file='{re.escape(name)}' .*{re.escape(said)}"):
        parse_train(["--prompt_file", name])
    for missing in ("/dev/zero", str(Path(name).parent), "absent.txt"):
        with pytest.raises(UsageError, match="prompt_file must be a text file"):
            parse_evaluate(["--prompt_file", missing])


@pytest.mark.parametrize("column", ["puzle", "", "0", "puzzle.__class__", "puzzle[0]", " puzzle"])
def test_a_column_that_is_not_there_is_named(
    command: Command,
    write: Callable[..., str],
    small_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    column: str,
) -> None:
    """With those that are, before a model is loaded; nothing but a whole name is looked up."""
    name, output = write(f"{{puzzle}}{{{column}}}"), tmp_path / "run"
    for module, main, argv in (
        (run, run.main, [*small_run, "--output_dir", str(output)]),
        (evaluation, evaluate.main, []),
    ):
        monkeypatch.setattr(module, "load_model", None)
        status, _, err = command(main, *argv, "--prompt_file", name)
        assert status == 2 and not output.exists()
        assert f"prompt_file={name!r} can't be used: row 0 has no column {column!r}; it has puzzle, solution" in err


def test_the_example_of_the_page_asks_as_the_page_says(tmp_path: Path) -> None:
    """Of ``countdown``, whose numbers are also there with blanks between them; they are no column of its rows."""
    page, task = ROOT / "docs" / "commands.md", load_task("countdown")
    write_files(page, tmp_path)
    row = {"input": "30,100,93", "output": "23"}
    user, system = PromptFile.read(str(tmp_path / "countdown.txt")).turns(task.fields(row))
    assert system is None and f"```text\n{user}\n```" in page.read_text()
    assert task.key(row) == "[30, 93, 100] 23" and row.keys() == {"input", "output"}


# ---- what the model is shown ----


def test_turns_and_what_responses_go_on_from(write: Callable[..., str], shipped: Decoder) -> None:
    """One user's turn, behind the system's if there is one; the prefill is behind the template's header."""
    row = {"puzzle": "12", "solution": "34"}
    for content, shown in (
        ("Fill it in.\n\n{puzzle}", "<user>Fill it in.\n\n12<assistant><reasoning>\n"),
        ("[system]\nFill it in.\n[user]\n{puzzle}", "<system>Fill it in.<user>12<assistant><reasoning>\n"),
    ):
        asking: Any = {"prompt_file": PromptFile.read(write(content)), "prefill": "<reasoning>\n"}
        decoder = replace(shipped, tokenizer=ChatTokenizer(), **asking)
        assert "".join(map(chr, decoder.prompt_ids(row))) == shown
    assert "".join(map(chr, decoder.reference_ids(row))) == "<user>34:12:<assistant><reasoning>\n"
    with pytest.raises(RunError, match=r"a system's turn, and the tokenizer has no chat template"):
        replace(shipped, **asking).prompt_ids(row)


def test_a_teacher_with_a_reference_has_the_tasks_own_prompt(write: Callable[..., str]) -> None:
    argv = ["--teacher_context", "reference", "--prefill", "a"]
    assert parse_train(argv)[1].prefill == "a"
    with pytest.raises(UsageError, match=r"teacher_context='reference' can't be used: .*prompt_file"):
        parse_train([*argv, "--prompt_file", write("{puzzle}")])


def test_solutions_are_learnt_from_behind_the_prefill(shipped: Decoder) -> None:
    """All tokens of one behind it; a solution that begins otherwise would never be said there."""
    (row,) = Sudoku().problems("train", 1)
    text = Sudoku().solution(row) or ""
    ids = solution_ids(replace(shipped, prefill=text[:2]), row)
    assert ids is not None and shipped.tokenizer.decode(ids) == text[2:]
    with pytest.raises(RunError, match=f"prefill='=': .* one begins with '{text[:4]}"):
        solution_ids(replace(shipped, prefill="="), row)


# ---- evaluations ----


def test_an_evaluation_says_how_it_asked(
    command: Command, write: Callable[..., str], shipped: Decoder, tmp_path: Path
) -> None:
    """The task's rows, decoded from the file's words and the prefill; JSON and page name the protocol."""
    name, path = write("{solution}:{puzzle}:"), tmp_path / "result.json"
    argv = ["--prompt_file", name, "--prefill", "a1", "--eval_problems", "3", "--tokens_per_step", "8"]
    assert command(evaluate.main, *argv, "--output", str(path))[0] == 0
    content = json.loads(path.read_text())
    (result,) = content["results"]
    sha256 = hashlib.sha256(Path(name).read_bytes()).hexdigest()
    asked = {"prompt_file": name, "prompt_sha256": sha256, "prefill": "a1", "test_file": None}
    assert {key: result[key] for key in asked} == asked and result["grading"] == "lenient"
    assert {key: content["config"]["evaluation"][key] for key in asked} == asked
    assert f"prompts of {name}, responses from 'a1' on" in path.with_suffix(".md").read_text()

    rows = Sudoku().problems("test", 3)
    prompts = [shipped.tokenize(f"{row['solution']}:{row['puzzle']}:a1") for row in rows]
    special = {"mask_id": shipped.mask_id, "eos_id": shipped.eos_id, "seeds": mix_seeds(0, torch.arange(3))}
    trajectories = decode(shipped.model, prompts, Decoding(48, 8, 6), **special)
    assert [one["response"] for one in result["responses"]] == [shipped.text(one) for one in trajectories]
    assert [{"puzzle": one["puzzle"], "solution": one["solution"]} for one in result["responses"]] == rows

    context = shipped.model.config.max_position_embeddings
    status, _, err = command(evaluate.main, *argv, "--prefill", "a" * (context - 81))
    assert status == 1 and f"row 0 has {context - 47} tokens" in err


def test_an_evaluation_does_not_go_on_with_other_prompts(
    write: Callable[..., str], shipped: Decoder, tmp_path: Path
) -> None:
    """Nor with other words in a file of the same name, nor from another prefill."""
    argv, folder = ["--prompt_file", write("{puzzle}:"), "--prefill", "a1"], tmp_path / "journal"

    def settings(*more: str) -> dict[str, Any]:
        return identity(parse_evaluate([*argv, *more]), shipped.model, {})

    journal.claim(folder, settings())
    journal.check(folder, settings())
    with pytest.raises(UsageError, match=r"prefill='a2' can't be used: the unfinished run in .* has prefill='a1'"):
        journal.check(folder, settings("--prefill", "a2"))
    write("{puzzle}:\n")
    with pytest.raises(UsageError, match=r"prompt_sha256=.* can't be used: the unfinished run in"):
        journal.check(folder, settings())


# ---- runs ----


def test_a_run_keeps_its_prompts(
    command: Command,
    write: Callable[..., str],
    small_run: list[str],
    random_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Evaluations and what is generated ask as it did, without the file; it does not go on with another one."""
    monkeypatch.setattr(report, "why_no_picture", lambda: "they take seconds")
    name, output = write("{puzzle}:\n"), tmp_path / "run"
    options = [*small_run, "--model", str(random_model), "--method", "rejection", "--correct_only", "false"]
    options += ["--max_steps", "1", "--eval_strategy", "no", "--eval_problems", "2", "--output_dir", str(output)]
    options += ["--prompt_file", name, "--prefill", "a1"]
    assert command(run.main, *options)[0] == 0
    asked = {"prompt_file": name, "prompt_sha256": hashlib.sha256(b"{puzzle}:\n").hexdigest(), "prefill": "a1"}
    for file in ("report.json", "run.json"):
        found = json.loads((output / file).read_text())
        assert {key: found.get("config", found)["task"][key] for key in asked} == asked
    card = (output / "README.md").read_text()
    assert f"`prompt_file`: `mine.txt`, sha256 {asked['prompt_sha256']}" in card and str(tmp_path) not in card
    assert "dopsd.load('run', prefill='a1')" in card and (output / COPY).read_bytes() == b"{puzzle}:\n"
    write("{puzzle}")
    status, _, err = command(run.main, *options, "--resume_from_checkpoint", "true")
    assert status == 2 and "the run in" in err and f"has prompt_sha256='{asked['prompt_sha256']}'" in err

    Path(name).unlink()
    held_out = json.loads((output / "held_out_after.json").read_text())["tokens_per_step"]["4"]
    results = dopsd.evaluate(output)
    assert results is not None
    (result,) = results.content["results"]
    assert result["prompt_file"] == str(output / COPY) and result["prompt_sha256"] == asked["prompt_sha256"]
    assert [one["response"] for one in result["responses"]] == [one["response"] for one in held_out]
    other = dopsd.load(output, prefill=None).generate([f"{held_out[0]['puzzle']}:a1"])
    model = dopsd.load(output)
    for prompts in ([f"{held_out[0]['puzzle']}:"], [{"puzzle": held_out[0]["puzzle"]}]):
        (sample,) = model.generate(prompts)
        assert sample.text == held_out[0]["response"] == other[0].text


def test_rows_are_generated_from_with_a_prompt_file_alone(random_model: Path, write: Callable[..., str]) -> None:
    for options, prompts, said in (
        ({}, [{"puzzle": "1"}], "no prompt_file"),
        ({"prompt_file": write("{puzzle}")}, [{"puzzle": "1"}, "1"], "the others are rows"),
        ({"prompt_file": write("{puzzle}")}, [{"puzle": "1"}], "row 0 has no column 'puzzle'; it has puzle"),
    ):
        with pytest.raises(UsageError, match=said):
            dopsd.load(random_model, **options).generate(prompts)  # type: ignore[arg-type]
