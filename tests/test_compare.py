"""``python -m dopsd.evaluate --compare``: two files of results, matched problem by problem."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dopsd.evaluation import command as evaluate
from dopsd.evaluation.accuracy import difference, mcnemar, summary

Command = Callable[..., tuple[int, str, str]]
BEFORE, AFTER = [1.0, 0.0, 0.5, 1.0, 0.0, 0.25], [1.0, 1.0, 1.0, 0.5, 0.0, 0.75]


def entry(scores: Sequence[float], measure: str = "greedy", **changes: Any) -> dict[str, Any]:
    """A result as the command writes it, of problems numbered 0, 1, ..."""
    ones = [
        {
            "question": f"problem | {i}",
            "response": f"# says\n{score}",
            "score": score,
            "tokens": 3,
            "steps": 2,
            "tries": 1,
        }
        for i, score in enumerate(scores)
    ]
    setting = {"task": "gsm8k", "gen_length": 256, "tokens_per_step": 2, "measure": measure}
    return {**setting, "problems": len(ones), **summary(scores), "responses": ones, **changes}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a file of results."""

    def build(name: str, *entries: dict[str, Any], **options: Any) -> str:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"results": entries, "config": {"evaluation": options}}))
        return str(path)

    return build


def test_what_changed_is_counted_and_listed(command: Command, write: Callable[..., str], tmp_path: Path) -> None:
    """Paired numbers per setting in common; gained and lost examples with both responses; the rest is named."""
    first = write("first", entry(BEFORE), entry(BEFORE, "pass@8"), adapter=None, seed=1, output="x")
    second = write("second", entry(AFTER, tokens_per_step=1), entry(AFTER), adapter="runs/a", seed=1, output="y")
    output = tmp_path / "out.json"
    code, out, err = command(evaluate.main, "--compare", first, second, "--output", str(output))
    assert code == 0, err
    content = json.loads(output.read_text())
    (found,) = content["comparisons"]
    assert (found["gained"], found["lost"], found["problems"]) == ([1, 2], [3], 6)
    assert found["mcnemar_p"] == mcnemar(2, 1) == 1.0
    assert found.items() >= difference(BEFORE, AFTER).items()
    assert (found["accuracy_before"], found["accuracy_after"]) == (sum(BEFORE) / 6, sum(AFTER) / 6)
    gained = found["examples"]["gained"][1]
    assert (gained["index"], gained["question"]) == (2, "problem | 2")
    assert (gained["before"]["response"], gained["after"]["response"]) == ("# says\n0.5", "# says\n1.0")
    text = " ".join(out.split())
    page = output.with_suffix(".md").read_text()
    for said in (text, page):
        for word in ("gsm8k@256", "greedy", "+25.0", "McNemar p", "gained", "lost"):
            assert word in said
        assert f"Only in {first}: gsm8k@256, 2 tokens a step, pass@8." in said
        assert f"Only in {second}: gsm8k@256, 1 tokens a step, greedy." in said
        assert "Different: adapter=None in the first file, 'runs/a' in the second." in said
        assert "seed" not in said and "'x'" not in said
    assert "### Row 3\n" in page and "    # says\n    0.5\n" in page and "### Row 4\n" not in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rows", ["gsm8k@256", "none of the first file's problems"]),
        ("folder", ["run's folder"]),
        ("setting", ["no setting in common"]),
        ("text", ["has written"]),
        ("list", ["has written"]),
        ("other", ["has written"]),
        ("absent", ["No such file"]),
    ],
)
def test_files_that_cannot_be_compared(
    change: str, said: list[str], command: Command, write: Callable[..., str], tmp_path: Path
) -> None:
    """One sentence, exit status 2, nothing written."""
    first = write("first", entry(BEFORE))
    other = entry(AFTER)
    if change == "rows":
        for one in other["responses"]:
            one["question"] += "?"
    second = write("second", other)
    if change == "setting":
        second = write("second", entry(AFTER, gen_length=512))
    elif change in ("text", "list", "other"):
        content = {"text": "no json", "list": "[1]", "other": '{"results": [{"task": "gsm8k"}]}'}
        Path(second).write_text(content[change])
    elif change == "folder":  # held-out responses without the run that says of which task they are
        Path(second).write_text(json.dumps({"tokens_per_step": {"2": other["responses"]}}))
    elif change == "absent":
        second = str(tmp_path / "absent.json")
    output = tmp_path / "out.json"
    code, _, err = command(evaluate.main, "--compare", first, second, "--output", str(output))
    assert code == 2 and "Traceback" not in err and len(err.strip().splitlines()) == 1
    for word in (f"compare='{second}'", *said):
        assert word in err
    assert not output.exists()


def test_problems_in_common_are_compared(command: Command, write: Callable[..., str], tmp_path: Path) -> None:
    """Found by their columns wherever they are, one that occurs twice as two; how many are left out is said."""
    scores = {"a": 0.0, "b": 1.0, "c": 0.0, "d": 1.0}
    after = {"d": 0.0, "x": 1.0, "c": 1.0, "b": 1.0, "y": 0.0}
    first, second = (entry([*side.values(), 0.0]) for side in (scores, after))
    for one, names in ((first, [*scores, "d"]), (second, [*after, "d"])):
        for response, name in zip(one["responses"], names, strict=True):
            response["question"] = name
    output = tmp_path / "out.json"
    paths = write("first", first), write("second", second)
    code, out, err = command(evaluate.main, "--compare", *paths, "--output", str(output))
    assert code == 0, err
    (found,) = json.loads(output.read_text())["comparisons"]
    assert (found["problems"], found["left_out"]) == (4, {"first": 1, "second": 2})  # b, c, d and the second d
    assert found["accuracy_before"] == 0.5 and found["accuracy_after"] == 0.5
    assert (found["gained"], found["lost"]) == ([2], [3])  # rows of the first file: c, and the first d
    assert [one["question"] for part in found["examples"].values() for one in part] == ["c", "d"]
    said = "Left out of gsm8k@256, 2 tokens a step, greedy: 1 of the first file's problems, 2 of the second's."
    assert said in " ".join(out.split()) and said in output.with_suffix(".md").read_text()


def test_a_run_is_compared_with_its_beginning(command: Command, tmp_path: Path) -> None:
    """Its folder alone: what it holds of held-out problems before and after, at each rate; also one of these with a
    file of results."""
    run = tmp_path / "run"
    run.mkdir()
    options = {"task": {"task": "gsm8k"}, "rollout": {"gen_length": 256, "cache": "off"}}
    (run / "run.json").write_text(json.dumps({"id": "0", **options}))
    for moment, scores in (("before", BEFORE), ("after", AFTER)):
        responses = {"2": entry(scores)["responses"], "2.66667": entry(scores[::-1])["responses"]}
        (run / f"held_out_{moment}.json").write_text(json.dumps({"adapter_sha256": None, "tokens_per_step": responses}))
    output, results = tmp_path / "out.json", tmp_path / "results.json"
    code, _, err = command(evaluate.main, "--compare", str(run), "--output", str(output))
    assert code == 0, err
    one, other = json.loads(output.read_text())["comparisons"]
    assert (one["gained"], one["lost"], one["problems"], one["tokens_per_step"]) == ([1, 2], [3], 6, 2)
    assert (other["gained"], other["lost"], other["tokens_per_step"]) == ([3, 4], [2], 2.66667)
    assert one.items() >= difference(BEFORE, AFTER).items()
    results.write_text(
        json.dumps(
            {"results": [entry(BEFORE[::-1], tokens_per_step=64 / 24)], "config": {"evaluation": {"cache": "none"}}}
        )
    )
    code, out, err = command(evaluate.main, "--compare", str(run / "held_out_after.json"), str(results))
    assert code == 0 and "Different" not in out and "-25.0" in out, err
    assert f"Only in {run / 'held_out_after.json'}: gsm8k@256, 2 tokens a step, greedy." in "".join(out.split("\n"))
    (run / "held_out_after.json").unlink()
    code, _, err = command(evaluate.main, "--compare", str(run))
    assert code == 2 and "held_out_after.json" in err and "No such file" in err


@pytest.mark.parametrize("kind", ["first", "second", "symbolic link", "hard link", "markdown", "exists"])
def test_no_input_is_written_over(kind: str, command: Command, write: Callable[..., str], tmp_path: Path) -> None:
    """Neither a file that is compared, under whatever name, nor a table's neighbour, nor results that are there."""
    first, second, output = write("first", entry(BEFORE)), write("second", entry(AFTER)), tmp_path / "out.json"
    if kind in ("first", "second"):
        output = Path(first if kind == "first" else second)
    elif kind == "markdown":
        first = str(Path(first).rename(tmp_path / "out.md"))
    elif kind == "exists":
        output.write_text("hours of work")
    else:
        (output.symlink_to if kind == "symbolic link" else output.hardlink_to)(first)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    overwrite = [] if kind == "exists" else ["--overwrite"]
    code, _, err = command(evaluate.main, "--compare", first, second, "--output", str(output), *overwrite)
    assert code == 2 and f"output='{output}'" in err and ("is read" in err or kind == "exists")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_file_that_is_read_is_written_over(command: Command, tmp_path: Path) -> None:
    """Rows or prompts, not even with --overwrite."""
    rows = tmp_path / "rows.json"
    rows.write_text('[{"puzzle": "1200341221434321", "solution": "1234341221434321"}]')
    before = rows.read_bytes()
    code, _, err = command(evaluate.main, "--test_file", str(rows), "--output", str(rows), "--overwrite")
    assert code == 2 and f"{rows} is {rows}, which is read" in err and rows.read_bytes() == before
    prompts = tmp_path / "prompts.md"
    prompts.write_text("{puzzle}:")
    argv = ["--prompt_file", str(prompts), "--output", str(prompts.with_suffix(".json"))]
    assert command(evaluate.main, *argv)[0] == 2 and prompts.read_text() == "{puzzle}:"


@pytest.mark.parametrize("score", [7, -0.5, float("nan"), True, "1", None])
def test_grades_are_checked(score: Any, command: Command, write: Callable[..., str]) -> None:
    """What is no number from 0 to 1 is named with its file and row."""
    wrong = entry(AFTER)
    wrong["responses"][3]["score"] = score
    first, second = write("first", entry(BEFORE)), write("second", wrong)
    code, _, err = command(evaluate.main, "--compare", first, second)
    assert code == 2 and "unexpected" not in err
    for word in (f"compare='{second}'", "row 3", repr(score), "from 0 to 1"):
        assert word in err


def test_a_comparison_takes_two_files(command: Command) -> None:
    """Any other number is told."""
    code, _, err = command(evaluate.main, "--compare", "one.json")
    assert code == 2 and "but is ['one.json']" in err and "two files" in err
