"""The page of an evaluation: what was measured, and beside it, labelled, what others have published."""

from __future__ import annotations

from typing import Any

import pytest

from dopsd.evaluation.accuracy import summary
from dopsd.evaluation.published import METHODS, PUBLISHED
from dopsd.evaluation.results import markdown


def measured(**changes: Any) -> dict[str, Any]:
    """A result as a file holds it."""
    setting = {"task": "gsm8k", "gen_length": 512, "tokens_per_step": 2, "measure": "greedy", "block_length": 32}
    numbers = {"problems": 1319, "mean_tokens": 100.25, "mean_steps": 64.0}
    protocol = {"grading": "published", "test_file": None, "prompt_file": "theirs.txt", "prefill": "<reasoning>\n"}
    return {**setting, **numbers, **protocol, **summary([1.0, 0.0, 1.0, 1.0]), **changes}


def cells(page: str) -> list[dict[str, str]]:
    """The page's table, a dictionary per row."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    names, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_published_figures_stand_beside_ours_under_their_own_name() -> None:
    """In columns of their own, with a line that says whose they are; ours are what was measured."""
    page = markdown([measured(), measured(gen_length=256)], ["Model x."])
    first, second = cells(page)
    assert (first["task"], first["accuracy (%)"], first["95% interval"]) == ("gsm8k@512", "75.0 ± 25.0", "30.1 to 95.4")
    assert (first["tokens"], first["steps"], first["problems"]) == ("100.2", "64.0", "1319")
    assert [first[f"{name} (published)"] for name in METHODS] == ["79.5", "81.1", "81.9", "81.5", "82.2"]
    assert [second[f"{name} (published)"] for name in METHODS] == ["76.0", "", "", "", "81.0"]
    for said in (
        "- Model x.\n",
        "published, LLaDA-8B-Instruct, secondary summaries; not measured here.",
        "gsm8k published",
    ):
        assert said in page
    assert "Wilson" in page and "normal" not in page and "fully correct" not in first


@pytest.mark.parametrize(
    "change",
    [{"task": "sudoku"}, {"gen_length": 128}, {"tokens_per_step": 1}, {"block_length": 8}, {"measure": "pass@8"}],
    ids=lambda change: next(iter(change)),
)
def test_other_decodings_have_no_published_figure(change: dict[str, Any]) -> None:
    """Another task, length, rate, block length or measure is not what was published: no column, no mention."""
    assert "published" not in markdown([measured(**change, grading="strict")], [])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grading": "lenient"}, "grading=lenient"),
        ({"problems": 1000}, "1000 problems"),
        ({"prompt_file": None}, "another prompt (no prompt_file)"),
        ({"prefill": None, "problems": 4}, "4 problems, prefill=None"),
        ({"task": "countdown", "gen_length": 256, "problems": 256}, "made-up problems"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_other_protocols_have_a_line_that_says_what_differs(change: dict[str, Any], said: str) -> None:
    """And no figure; a result of the protocol beside it keeps its own."""
    name = f"{change.get('task', 'gsm8k')}@{change.get('gen_length', 512)}"
    line = f"- {name}: published figures are of another protocol than {said}.\n"
    page = markdown([measured(**change)], [])
    assert line in page and "(published)" not in page
    first, second = cells(markdown([measured(**change), measured()], []))
    assert first["base (published)"] == "" and second["base (published)"] == "79.5"


def test_rows_of_a_file_can_be_the_published_ones() -> None:
    page = markdown([measured(task="countdown", gen_length=256, problems=256, test_file="rows.jsonl")], [])
    assert cells(page)[0]["base (published)"] == "19.1"


def test_results_that_say_nothing_of_prompts_are_of_another_protocol() -> None:
    """Files of earlier releases."""
    old = measured()
    for name in ("test_file", "prompt_file", "prefill"):
        del old[name]
    assert "another prompt (no prompt_file), prefill=None" in markdown([old], [])


def test_published_figures_are_percentages_of_known_methods() -> None:
    """Every task and length has at least the base model's and this method's."""
    for figures in PUBLISHED.values():
        assert {"base", "d-OPSD"} <= figures.keys() <= set(METHODS)
        assert all(1 < figure < 100 for figure in figures.values())
        assert figures["d-OPSD"] > figures["base"]
