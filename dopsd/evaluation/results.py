"""What an evaluation found: per setting the numbers and every response; as a JSON file, a table and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dopsd.evaluation.accuracy import mean, summary
from dopsd.evaluation.published import LABEL, METHODS, departures, published
from dopsd.evaluation.settings import Setting
from dopsd.rollout import Rollout
from dopsd.tables import markdown_table
from dopsd.tasks import Task

# What names a result among others, and what `Rollout.outcome` adds to a row's own columns.
SETTING = ("task", "gen_length", "tokens_per_step", "measure")
GRADED = ("response", "score", "tokens", "steps", "tries")

INTERVALS = {"wilson": "Wilson's score interval", "normal": "mean ± 1.96 standard errors, within 0 and 100"}
DEFINITIONS = (
    "Accuracy is the mean grade, ± its standard error. Tokens (before the first end-of-text) and denoising steps are "
    "means over responses."
)


def result(
    setting: Setting,
    block_length: int,
    measure: str,
    task: Task,
    rollouts: Sequence[Rollout],
    eos_id: int,
    seconds: float,
    posed: Mapping[str, Any],
    solved: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """The numbers of one measure and its responses, in the order of the rows.

    Args:
        setting: what was decoded.
        block_length: tokens per block.
        measure: ``greedy``, ``pass@k`` or a share revealed.
        task: its grades.
        rollouts: a response per row.
        eos_id: the end-of-text token, up to which a response's length counts.
        seconds: spent on decoding and grading, summed over processes.
        posed: the options that say how problems were posed.
        solved: for a share revealed, which rows have a correct answer that it is of; accuracy is also told of these.
    """
    responses = [rollout.outcome(eos_id) for rollout in rollouts]
    scores = [one["score"] for one in responses]
    told = {}
    if solved is not None:
        of_solved = [score for score, right in zip(scores, solved, strict=True) if right]
        told = {"solved": len(of_solved), "accuracy_of_solved": mean(of_solved) if of_solved else None}
    tokens, steps = (mean([one[name] for one in responses]) for name in ("tokens", "steps"))
    return {
        **setting._asdict(),
        "measure": measure,
        "block_length": block_length,
        "grading": task.grading,
        **posed,
        "problems": len(responses),
        **summary(scores),
        **told,
        "mean_tokens": tokens,
        "mean_steps": steps,
        "text_tokens_per_step": tokens / steps,
        "seconds": seconds,
        "responses": responses,
    }


def label(result: Mapping[str, Any]) -> str:
    """Task and length, the usual way."""
    return f"{result['task']}@{result['gen_length']}"


def percent(value: float, error: float) -> str:
    """A share and its standard error in percent."""
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def interval(result: Mapping[str, Any], sign: str = "") -> str:
    """The 95% interval in percent."""
    low, high = result["interval"]
    return f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def cells(result: Mapping[str, Any]) -> dict[str, str]:
    """What tables say of a result, by column."""
    of_solved = result.get("accuracy_of_solved")
    return {
        "task": label(result),
        "tokens a step": f"{result['tokens_per_step']:g}",
        "measure": result["measure"],
        "accuracy (%)": percent(result["accuracy"], result["standard_error"]),
        "95% interval": interval(result),
        "fully correct (%)": f"{100 * result['fully_correct']:.1f}",
        "of the solved (%)": "" if of_solved is None else f"{100 * of_solved:.1f}",
        "problems": str(result["problems"]),
        "tokens": f"{result['mean_tokens']:.1f}",
        "steps": f"{result['mean_steps']:.1f}",
    }


def columns(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The cells of all results; the share of fully correct responses where there are partial grades only, and the
    accuracy on problems that some try has solved where the model was shown some of its own answers."""
    rows = [cells(result) for result in results]
    left_out = set()
    if all(result["fully_correct"] == result["accuracy"] for result in results):
        left_out.add("fully correct (%)")
    if not any(row["of the solved (%)"] for row in rows):
        left_out.add("of the solved (%)")
    return [{name: cell for name, cell in row.items() if name not in left_out} for row in rows]


def markdown(results: Sequence[Mapping[str, Any]], about: Sequence[str]) -> str:
    """A page with what was measured, beside what has been published for the same task, length and decoding.

    A published figure stands beside a result of the same protocol only; of another, a line says what differs.

    Args:
        results: entries of :func:`result`.
        about: sentences on what was evaluated.
    """
    rows = columns(results)
    theirs = [published(result) for result in results]
    differing = [departures(result) if figures else [] for result, figures in zip(results, theirs, strict=True)]
    notes = [*about, DEFINITIONS]
    same = [one for one, figures, differ in zip(results, theirs, differing, strict=True) if figures and not differ]
    if same:
        for row, figures, differ in zip(rows, theirs, differing, strict=True):
            row |= {f"{name} (published)": "" if differ else str(figures.get(name, "")) for name in METHODS}
        asked = ", ".join(dict.fromkeys(one["prompt_file"] for one in same))
        notes.append(f"(published): {LABEL}; not measured here. That {asked} asks as they were asked is not checked.")
    notes += [
        f"{label(result)}: published figures are of another protocol than {', '.join(differ)}."
        for result, differ in zip(results, differing, strict=True)
        if differ
    ]
    methods = dict.fromkeys(INTERVALS[result["interval_method"]] for result in results)
    gradings = dict.fromkeys(f"{result['task']} {result['grading']}" for result in results)
    notes += [f"Interval: {'; for partial grades '.join(methods)}.", f"Grading: {', '.join(gradings)}."]
    return f"# Accuracy\n\n{markdown_table(rows)}\n" + "".join(f"- {note}\n" for note in notes)
