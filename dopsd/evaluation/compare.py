"""Two files of results, problem by problem: the paired difference, its certainty, and which examples changed.

They are those of two evaluations, or what a run's folder holds of its held-out problems before and after training.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dopsd.cache import todays
from dopsd.errors import UsageError, require
from dopsd.evaluation.accuracy import difference, is_grade, mcnemar, summary
from dopsd.evaluation.results import GRADED, SETTING, interval, label, percent
from dopsd.files import write_json, write_text
from dopsd.recorded import recorded
from dopsd.tables import markdown_table, show

Result = dict[str, Any]


def files_of(paths: Sequence[str]) -> tuple[Path, Path]:
    """The two files that ``--compare`` is given, or those of the one run's folder."""
    if len(paths) == 1:
        return Path(paths[0]) / "held_out_before.json", Path(paths[0]) / "held_out_after.json"
    first, second = map(Path, paths)
    return first, second


def main(first: Path, second: Path, output: Path | None) -> None:
    """Compare ``second`` with ``first``, print a table, and write JSON and Markdown if there is an ``output``."""
    before, after = read(first), read(second)
    ours, theirs = by_setting(before), by_setting(after)
    compared = [pair(ours[key], theirs[key], second) for key in ours if key in theirs]
    require(bool(compared), "compare", str(second), f"it has no setting in common with {first}")
    notes = [
        *(left_out(one) for one in compared if any(one["left_out"].values())),
        *(f"Only in {first}: {describe(ours[key])}." for key in ours if key not in theirs),
        *(f"Only in {second}: {describe(theirs[key])}." for key in theirs if key not in ours),
        *differing(before, after),
    ]
    if output is not None:
        content = {"first": str(first), "second": str(second), "notes": notes, "comparisons": compared}
        write_text(output.with_suffix(".md"), page(first, second, compared, notes))
        write_json(output, content)
    show([cells(one) for one in compared], f"{second} against {first}", notes)


def read(path: Path) -> dict[str, Any]:
    """The content of a file that ``python -m dopsd.evaluate --output`` or a training run has written."""
    accepted = "a file that python -m dopsd.evaluate --output has written, or a held_out_*.json in a run's folder"
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "tokens_per_step" in content:
            content = held_out(content["tokens_per_step"], path.parent)
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UsageError(f"compare='{path}' can't be used: {accepted} ({error})") from error
    results = content.get("results") if isinstance(content, dict) else None
    require(isinstance(results, list) and all(map(is_result, results)), "compare", str(path), accepted)
    for one in results:  # type: ignore[union-attr]
        for row, response in enumerate(one["responses"]):
            score = response["score"]
            hint = f"{describe(one)}: row {row} has a score of {score!r}, and it must be a number from 0 to 1"
            require(is_grade(score), "compare", str(path), hint)
    return content


def held_out(responses: Mapping[str, list[Any]], folder: Path) -> dict[str, Any]:
    """What an evaluation would have written of a run's held-out ``responses`` by tokens per step; of no use without
    the run's options in ``folder``."""
    found = recorded(folder)
    about = {} if found is None else {**found.task, **found.rollout}
    setting = {"task": about.get("task"), "gen_length": about.get("gen_length"), "measure": "greedy"}
    return {
        "results": [
            {**setting, "tokens_per_step": json.loads(rate), "responses": ones} for rate, ones in responses.items()
        ]
    }


def is_result(one: object) -> bool:
    """Whether a file's entry has a setting and graded responses."""
    kinds = {"task": str, "gen_length": int, "tokens_per_step": int | float, "measure": str}
    if not isinstance(one, dict) or not all(isinstance(one.get(name), kind) for name, kind in kinds.items()):
        return False
    responses = one.get("responses")
    return isinstance(responses, list) and all(
        isinstance(r, dict) and r.keys() >= {"response", "score"} for r in responses
    )


def by_setting(content: Mapping[str, Any]) -> dict[tuple[Any, ...], Result]:
    """Results by task, length, rate (to the six digits that a run's files give it with) and measure."""
    return {
        (one["task"], one["gen_length"], f"{one['tokens_per_step']:g}", one["measure"]): one
        for one in content["results"]
    }


def problem(response: Mapping[str, Any]) -> dict[str, Any]:
    """The row's own columns of a response."""
    return {name: value for name, value in response.items() if name not in GRADED}


def verdict(response: Mapping[str, Any]) -> dict[str, Any]:
    """What became of the row."""
    return {name: response[name] for name in GRADED if name in response}


def pair(before: Result, after: Result, path: Path) -> dict[str, Any]:
    """The comparison of one setting, over the problems that both are about; ``path`` is where ``after`` is from.

    Raises:
        UsageError: there is none.
    """
    sides = numbered(before["responses"]), numbered(after["responses"])
    common = [key for key in sides[0] if key in sides[1]]
    require(bool(common), "compare", str(path), f"{describe(after)} is about none of the first file's problems")
    rows = {key: row for row, key in enumerate(sides[0])}
    ones, others = ([side[key] for key in common] for side in sides)
    scores = [[one["score"] for one in side] for side in (ones, others)]
    moments = {"before": summary(scores[0]), "after": summary(scores[1])}
    right = [[score >= 1 for score in side] for side in scores]
    changed = {
        "gained": [place for place, (a, b) in enumerate(zip(*right, strict=True)) if b and not a],
        "lost": [place for place, (a, b) in enumerate(zip(*right, strict=True)) if a and not b],
    }
    examples = {
        name: [
            {"index": rows[common[i]], **problem(ones[i]), "before": verdict(ones[i]), "after": verdict(others[i])}
            for i in places
        ]
        for name, places in changed.items()
    }
    return {
        **{name: before[name] for name in SETTING},
        "problems": len(common),
        "left_out": {name: len(side) - len(common) for name, side in zip(("first", "second"), sides, strict=True)},
        **{
            f"{name}_{moment}": side[name]
            for name in ("accuracy", "standard_error", "interval")
            for moment, side in moments.items()
        },
        **difference(*scores),
        "mcnemar_p": mcnemar(len(changed["gained"]), len(changed["lost"])),
        **{name: [rows[common[place]] for place in places] for name, places in changed.items()},
        "examples": examples,
    }


def numbered(responses: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Responses by their problem, and the how manieth of those to it each is."""
    keys = [json.dumps(problem(one), sort_keys=True) for one in responses]
    count: Counter[str] = Counter()
    found = {}
    for key, one in zip(keys, responses, strict=True):
        found[key, count[key]] = one
        count[key] += 1
    return found


def left_out(compared: Mapping[str, Any]) -> str:
    """A sentence on how many problems a comparison is not about."""
    first, second = compared["left_out"].values()
    return f"Left out of {describe(compared)}: {first} of the first file's problems, {second} of the second's."


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A sentence per option that two evaluations have different values of, the file they were written to apart."""
    sides = [
        {name: todays(value) if name == "cache" else value for name, value in options.items()}
        for options in (content.get("config", {}).get("evaluation", {}) for content in (before, after))
    ]
    # An option that only one of them knows came with a later release.
    names = [name for name in sides[0] if name in sides[1] and name not in ("output", "overwrite", "compare")]
    return [
        f"Different: {name}={sides[0][name]!r} in the first file, {sides[1][name]!r} in the second."
        for name in names
        if sides[0][name] != sides[1][name]
    ]


def describe(result: Mapping[str, Any]) -> str:
    """A setting in words."""
    return f"{label(result)}, {result['tokens_per_step']:g} tokens a step, {result['measure']}"


def cells(compared: Mapping[str, Any]) -> dict[str, str]:
    """What tables say of a comparison, by column."""
    return {
        "task": label(compared),
        "tokens a step": f"{compared['tokens_per_step']:g}",
        "measure": compared["measure"],
        "problems": str(compared["problems"]),
        "first (%)": percent(compared["accuracy_before"], compared["standard_error_before"]),
        "second (%)": percent(compared["accuracy_after"], compared["standard_error_after"]),
        "difference": f"{100 * compared['difference']:+.1f} ± {100 * compared['standard_error']:.1f}",
        "95% interval": interval(compared, "+"),
        "gained": str(len(compared["gained"])),
        "lost": str(len(compared["lost"])),
        "McNemar p": f"{compared['mcnemar_p']:.2g}",
    }


def page(first: Path, second: Path, compared: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """The comparison as Markdown, with every example that changed."""
    text = f"# {second} against {first}\n\n{markdown_table([cells(one) for one in compared])}\n"
    text += "".join(
        f"- {note}\n"
        for note in (
            "Differences are paired, ± their standard errors; interval: ± 1.96 of these.",
            "Gained, lost: right (grade 1) in the second file alone, in the first alone. p: McNemar's exact two-sided.",
            *notes,
        )
    )
    for one in compared:
        for name, examples in one["examples"].items():
            if examples:
                text += f"\n## {describe(one)}: {name}\n"
            for example in examples:
                columns = {key: value for key, value in example.items() if key not in ("index", "before", "after")}
                text += f"\n### Row {example['index']}\n"
                for title, content in (
                    *columns.items(),
                    ("first", example["before"]["response"]),
                    ("second", example["after"]["response"]),
                ):
                    text += f"\n{title}:\n\n{quoted(str(content))}"
    return text


def quoted(text: str) -> str:
    """``text`` as an indented Markdown block, so that nothing in it is taken for markup."""
    return "".join(f"    {line}\n" for line in text.splitlines() or [""])
