"""Long evaluations: stopped and gone on with, shared out among processes, and never mixed with another run's."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_all, start
from safetensors.torch import load_file, save_file

from dopsd.errors import RunError
from dopsd.evaluation import command as evaluate
from dopsd.evaluation import journal, run
from dopsd.evaluation.journal import Journal
from dopsd.models import add_lora, load_model
from dopsd.rollout import Decoder

Command = Callable[..., tuple[int, str, str]]

# A task whose grades, some of them partial, any model gets.
LOTTERY = """
import zlib

from dopsd.tasks.sudoku import Sudoku

class Lottery(Sudoku):
    eval_problems = 5

    def score(self, row, response):
        return zlib.crc32(response.encode()) % 4 / 3
"""


def content(path: Path) -> dict[str, Any]:
    """A file of results without what may differ between runs of the same command: times, and where it is."""
    found = json.loads(path.read_text())
    for result in found["results"]:
        del result["seconds"]
    del found["processes"], found["config"]["evaluation"]["output"]
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of ``Decoder.once`` has decoded."""
    counts: list[int] = []
    once = Decoder.once

    def counting(self: Decoder, rows: Sequence[Any], *args: Any, **options: Any) -> Any:
        counts.append(len(rows))
        return once(self, rows, *args, **options)

    monkeypatch.setattr(Decoder, "once", counting)
    return counts


@pytest.fixture
def lottery(tmp_path: Path) -> str:
    """The name of that task."""
    (tmp_path / "lottery.py").write_text(LOTTERY)
    return f"{tmp_path / 'lottery.py'}:Lottery"


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """The next evaluation is interrupted when it has kept so many batches."""
    add, kept = Journal.add, []

    def interrupted(self: Journal, entries: Sequence[Any]) -> None:
        add(self, entries)
        kept.append(len(entries))
        if len(kept) == batches:
            monkeypatch.setattr(Journal, "add", add)
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", interrupted)


@pytest.fixture
def unfinished(
    command: Command, random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], Path]:
    """A command that was stopped when it had kept two of three batches, and the folder of its journal."""
    path = tmp_path / "unfinished.json"
    argv = ["--model", str(random_model), "--eval_problems", "6", "--tokens_per_step", "8"]
    argv += ["--sequences_per_forward", "2", "--output", str(path)]
    stop_after(monkeypatch, 2)
    assert command(evaluate.main, *argv)[0] == 130
    return argv, tmp_path / "unfinished.json.partial"


def test_a_killed_evaluation_goes_on_where_it_was(
    command: Command, tmp_path: Path, random_model: Path, lottery: str, decoded: list[int]
) -> None:
    """SIGKILL amid the batches, a last line cut short on top: the same command decodes the rest, and what it writes is
    what an uninterrupted run writes, to the bit."""
    path, fresh = tmp_path / "killed.json", tmp_path / "fresh.json"
    line = ["--model", str(random_model), "--task", lottery, "--eval_problems", "40", "--sequences_per_forward", "4"]
    line += ["--pass_k", "2", "--reveal", "0.5"]
    process = start("dopsd.evaluate", [*line, "--output", str(path)], tmp_path / "printed")
    own = tmp_path / "killed.json.partial" / "process-0.jsonl"
    deadline = time.monotonic() + 600
    while not (own.is_file() and own.read_bytes().count(b"\n") >= 8):
        assert process.is_alive() and time.monotonic() < deadline, (tmp_path / "printed").read_text()
        time.sleep(0.002)
    process.kill()
    process.join()
    kept = own.read_bytes().splitlines(keepends=True)
    assert not path.exists() and len(kept) < 120
    own.write_bytes(b"".join(kept[:-1]) + kept[-1][:50])

    code, _, err = command(evaluate.main, *line, "--output", str(path))
    assert code == 0, err
    continued = sum(decoded)
    decoded.clear()
    assert not own.parent.exists()
    assert command(evaluate.main, *line, "--output", str(fresh))[0] == 0
    assert content(path) == content(fresh)
    assert path.with_suffix(".md").read_text() == fresh.with_suffix(".md").read_text()
    # All but the kept batches; the one whose last line was cut is decoded again.
    assert 0 < continued <= sum(decoded) - 4


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_find_what_one_finds(tmp_path: Path, random_model: Path, lottery: str) -> None:
    """An odd number of rows, two tasks, all measures: the same responses in the same order."""
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    argv = ["--model", str(random_model), "--task", "sudoku", lottery, "--eval_problems", "9", "--pass_k", "3"]
    argv += ["--reveal", "0.5", "--sequences_per_forward", "2"]
    printed = run_all("dopsd.evaluate", [*argv, "--output", str(two)], tmp_path)
    assert [text.count("greedy") for text in printed] == [2, 0]
    assert not (tmp_path / "two.json.partial").exists()
    evaluate.main([*argv, "--output", str(one)])
    assert json.loads(two.read_text())["processes"] == 2
    assert content(one) == content(two)
    assert len(content(one)["results"]) == 6


def test_partial_grades(tmp_path: Path, random_model: Path, lottery: str) -> None:
    """A task with its own number of problems; normal intervals, fully correct ones apart, named in both files."""
    path = tmp_path / "result.json"
    evaluate.main(["--model", str(random_model), "--task", lottery, "--output", str(path)])
    (result,) = json.loads(path.read_text())["results"]
    assert result["problems"] == 5 and result["interval_method"] == "normal"
    scores = [one["score"] for one in result["responses"]]
    assert any(0 < score < 1 for score in scores)
    assert result["fully_correct"] == sum(score == 1 for score in scores) / 5
    page = path.with_suffix(".md").read_text()
    assert "fully correct (%)" in page and "mean ± 1.96" in page and "published" not in page


def test_a_grade_that_is_none_is_named(command: Command, random_model: Path, lottery: str) -> None:
    """A task of one's own that counts to ten."""
    file = Path(lottery.partition(":")[0])
    file.write_text(file.read_text().replace("% 4 / 3", "% 4 + 7"))
    code, _, err = command(evaluate.main, "--model", str(random_model), "--task", lottery)
    assert code == 1 and "Lottery.score must be from 0 to 1, but is" in err


def test_an_unfinished_run_goes_on_only_as_it_began(
    command: Command, tmp_path: Path, random_model: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[int]
) -> None:
    """Another option, other problems or other weights under the same name are named and nothing changes; the batch size
    is free; --overwrite starts anew, also where a result is already."""
    model, path = tmp_path / "model", tmp_path / "result.json"
    shutil.copytree(random_model, model)
    options = ["--model", str(model), "--eval_problems", "6", "--tokens_per_step", "8", "--output", str(path)]
    folder = tmp_path / "result.json.partial"
    stop_after(monkeypatch, 1)
    assert command(evaluate.main, *options, "--sequences_per_forward", "2")[0] == 130
    before = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    assert set(before) == {"settings.json", "process-0.jsonl"} and not path.exists()

    def refused(*argv: str, said: Sequence[str]) -> None:
        code, _, err = command(evaluate.main, *options, *argv)
        assert code == 2
        for word in (*said, str(folder), "--overwrite"):
            assert word in err
        assert {entry.name: entry.read_bytes() for entry in folder.iterdir()} == before

    refused("--seed", "5", "--pass_k", "2", said=["pass_k=2", "pass_k=1"])
    refused("--eval_problems", "5", said=["eval_problems=5", "eval_problems=6"])
    refused("--model", "tiny", said=["model='tiny'", f"model='{model}'"])
    weights = load_file(model / "model.safetensors")
    name = "model.transformer.blocks.1.q_proj.weight"
    save_file({**weights, name: weights[name] * 1.01}, model / "model.safetensors", {"format": "pt"})
    refused(said=["weights="])
    save_file(weights, model / "model.safetensors", {"format": "pt"})

    decoded.clear()
    assert command(evaluate.main, *options, "--sequences_per_forward", "2")[0] == 0
    assert decoded == [2, 2] and not folder.exists()
    finished = path.read_bytes()
    code, _, err = command(evaluate.main, *options)
    assert code == 2 and f"output='{path}'" in err and "--overwrite" in err
    assert path.read_bytes() == finished
    stop_after(monkeypatch, 1)
    assert command(evaluate.main, *options, "--overwrite", "--sequences_per_forward", "3")[0] == 130
    assert path.read_bytes() == finished and folder.exists()
    decoded.clear()
    assert command(evaluate.main, *options, "--overwrite", "--seed", "1")[0] == 0
    assert decoded == [6] and not folder.exists() and json.loads(path.read_text())["seed"] == 1


def test_a_journal_has_what_every_process_kept(tmp_path: Path) -> None:
    """Lines of all processes, whichever number of them goes on; a cut last line is dropped and written over, a line
    that is damaged elsewhere is an error that names it."""

    def line(index: int) -> dict[str, Any]:
        return {"task": "t", "gen_length": 8, "tokens_per_step": 2, "measure": "greedy", "index": index, "score": 0.1}

    def check(entry: dict[str, Any]) -> None:
        if entry["score"] > 1:
            raise ValueError("too much")

    def open_journal(process: int, run: str = "r") -> Journal:
        return Journal(tmp_path, process, run, check)

    first, second = open_journal(0), open_journal(1)
    first.add([line(0), line(2)])
    second.add([line(1)])
    first.close()
    second.close()
    with (tmp_path / "process-1.jsonl").open("a") as file:
        file.write('{"task": "t", "gen_')
    again = open_journal(1)
    assert sorted(key[-1] for key in again.entries) == [0, 1, 2]
    assert again.entries["t", 8, 2, "greedy", 1] == line(1)
    again.add([line(3)])
    again.close()
    assert [json.loads(text)["index"] for text in (tmp_path / "process-1.jsonl").read_text().splitlines()] == [1, 3]
    for text, said in (
        ("{}", "line 1 can't be used"),
        ("{", "line 1 can't be used"),
        ("[" * 10**5, "line 1 can't be used"),
        (json.dumps({"run": "r", **line(0), "score": 7}), "line 1 can't be used .*too much"),
        (json.dumps({"run": "s", **line(0)}), "line 1 can't be used .*it is of another run"),
    ):
        (tmp_path / "process-0.jsonl").write_text(text + "\n" + json.dumps({"run": "r", **line(0)}) + "\n")
        with pytest.raises(RunError, match=rf"process-0\.jsonl: {said}.*--overwrite starts anew"):
            open_journal(0)
    (tmp_path / "notes.txt").write_text("of others")
    journal.remove(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score": 7}, ["score 7", "from 0 to 1"]),
        ({"score": float("nan")}, ["score nan", "from 0 to 1"]),
        ({"score": "1"}, ["score '1'"]),
        ({"index": 6}, ["no row 6"]),
        ({"index": 0.0}, ["no row 0.0"]),
        ({"measure": "grady"}, ["no grady of sudoku"]),
        ({"gen_length": 64}, ["sudoku, 64 tokens"]),
        ({"tries": 2}, ["tries", "from 1 to 1"]),
        ({"response": None}, ["response"]),
        ({"seconds": -1.0}, ["seconds -1.0"]),
        ({"trajectory": {}}, ["KeyError"]),
        ({"run": "0"}, ["another run"]),
    ],
    ids=lambda part: str(part) if isinstance(part, dict) else None,
)
def test_lines_that_are_none_of_the_run_are_named(
    changes: dict[str, Any], said: list[str], command: Command, unfinished: tuple[list[str], Path]
) -> None:
    """A line of a journal with an impossible score, row or measure, or another run's: the file, the line, the value."""
    argv, folder = unfinished
    file = folder / "process-0.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], json.dumps({**json.loads(lines[1]), **changes}), ""]))
    before = file.read_bytes()
    code, _, err = command(evaluate.main, *argv)
    assert code == 1, err
    for word in (f"{file}: line 2", *said):
        assert word in err
    assert "unexpected" not in err and file.read_bytes() == before


def test_lines_belong_to_the_adapter(
    command: Command, unfinished: tuple[list[str], Path], random_model: Path, tmp_path: Path
) -> None:
    """One entry of an adapter's file that no sample of it sees is another adapter; so are another's lines."""
    adapter, path = tmp_path / "adapter", tmp_path / "adapted.json"
    add_lora(load_model(str(random_model))[0], None, 16, 4, 0.0).save_pretrained(str(adapter))
    argv, _ = unfinished
    argv = [*argv, "--adapter", str(adapter), "--output", str(path)]
    folder = tmp_path / "adapted.json.partial"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        assert command(evaluate.main, *argv)[0] == 130
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(key for key in tensors if "lora_A" in key)
    tensors[name][0, 1] += 1
    save_file(tensors, weights, {"format": "pt"})
    code, _, err = command(evaluate.main, *argv)
    assert code == 2 and "adapter's files=" in err and str(folder) in err
    settings = folder / "settings.json"
    kept = settings.read_bytes()
    settings.unlink()
    code, _, err = command(evaluate.main, *argv)
    assert code == 1 and "process-0.jsonl: line 1" in err and "another run" in err
    settings.write_bytes(b"[" * 10**5)
    code, _, err = command(evaluate.main, *argv)
    assert code == 1 and f"{settings}: not valid JSON" in err
    settings.write_bytes(kept)
    assert command(evaluate.main, *argv, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--task", "sudoku", "gsm9k"], ["task='gsm9k'", "gsm8k"]),
        (["--task", "sudoku", "sudoku"], ["task=['sudoku', 'sudoku']", "once"]),
        (["--task", "sudoku", "countdown", "--test_file", "rows.csv"], ["test_file='rows.csv'", "sudoku, countdown"]),
        (["--output", "result.md"], ["output must be", "but is 'result.md'", ".json"]),
        (["--output", "absent/result.json"], ["output='absent/result.json'", "absent is no folder"]),
        (["--output", "file/result.json"], ["output='file/result.json'", "file is no folder"]),
        (["--block_length", "0"], ["block_length must be", "but is 0"]),
    ],
    ids=lambda part: "-".join(part).replace("--", "") if part[0].startswith("--") else "",
)
def test_bad_options(
    argv: list[str], said: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence and exit status 2, before a model is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(run, "load_model", None)
    code, _, err = command(evaluate.main, *argv)
    assert code == 2 and len(err.strip().splitlines()) == 1
    for word in said:
        assert word in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(command: Command, tmp_path: Path) -> None:
    """Told before anything is loaded."""
    tmp_path.chmod(0o500)
    code, _, err = command(evaluate.main, "--output", str(tmp_path / "result.json"))
    assert code == 2 and "can't be written to" in err
