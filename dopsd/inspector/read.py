"""What a run's folder says, as far as it got: options, log, held-out responses, and the trajectories that were kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dopsd import collapse
from dopsd.checkpoints import RUN_FILE
from dopsd.errors import RunError, require
from dopsd.evaluation.accuracy import summary
from dopsd.files import first_line, read_json
from dopsd.look import FOLDER
from dopsd.recorded import run_options
from dopsd.report import METRICS_FILE, held_out_file, read_metrics
from dopsd.run_folder import FREE, REPORT_FILE

# What a file of held-out responses says of a response, beside the columns of its row.
OUTCOME = {"response", "score", "tokens", "steps", "tries"}
# The column of the log that names what fell; those that begin with it say how, in words.
COLLAPSE = "collapse"
# Held-out problems of a page, and characters of a text.
PROBLEMS, CHARACTERS = 1000, 4000


@dataclass(frozen=True)
class View:
    """One response.

    Args:
        moment: ``before`` or ``after`` training, or at an ``update``.
        key: tells its problem from others, in any run; for an update, its number.
        prompt: the problem, in the words of its prompt where these are known.
        response, score, tries: as :class:`~dopsd.rollout.Rollout` has them.
        sample: its trajectory with figures, in the form of :func:`dopsd.look.keep` with texts for token ids; or None.
    """

    moment: str
    key: str
    prompt: str
    response: str
    score: float
    tries: int
    sample: dict[str, Any] | None


@dataclass(frozen=True)
class RunContent:
    """A run.

    Args:
        name: of its folder.
        facts: what it was and came to, in words.
        options: every one that says what is computed, as ``group.name``.
        series: of each logged figure, (update, value) pairs.
        accuracy: on the held-out problems, by moment, with its standard error.
        collapses: the updates at which one was seen.
        views: the responses.
    """

    name: str
    facts: dict[str, str]
    options: dict[str, Any]
    series: dict[str, list[tuple[float, float]]]
    accuracy: dict[str, tuple[float, float]]
    collapses: list[float]
    views: list[View]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise RunError, naming the file, where it is not what a run writes."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise RunError(f"{path} is damaged, or no run wrote it: {said}") from error


def read_run(folder: Path) -> RunContent:
    """The run in ``folder``, finished or not.

    Raises:
        UsageError: there is none.
        RunError: a file of it is damaged.
    """
    require((folder / RUN_FILE).is_file(), "run", str(folder), f"it is no folder of a run, which has a {RUN_FILE}")
    options = {
        f"{group}.{name}": value
        for group, named in run_options(folder / RUN_FILE).items()
        for name, value in named.items()
        if name not in FREE
    }
    report = read_json(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else None
    series = read_series(folder / METRICS_FILE)
    views, accuracy = [], {}
    for moment in ("before", "after"):
        if (path := folder / held_out_file(moment)).is_file():
            found = read_held_out(path, folder / FOLDER / f"{moment}.json", moment)
            views += found[:PROBLEMS]
            numbers = summary([view.score for view in found])
            accuracy[moment] = numbers["accuracy"], numbers["standard_error"]
    for path in sorted((folder / FOLDER).glob("update-*.json"), key=lambda path: (len(path.name), path.name)):
        with reading(path):
            content = json.loads(path.read_text())
            update = int(content["update"])
            for sample in content["samples"]:
                views.append(view_of_sample("update", f"update {update}", sample, content["texts"]))
    with reading(folder / REPORT_FILE):
        facts = facts_of(options, report, accuracy)
    return RunContent(
        folder.resolve().name,
        facts,
        options,
        series,
        accuracy,
        [step for step, _ in series.pop(COLLAPSE, [])],
        views,
    )


def facts_of(
    options: Mapping[str, Any], report: Mapping[str, Any] | None, accuracy: Mapping[str, tuple[float, float]]
) -> dict[str, str]:
    """What a run was and came to, in words."""
    names = {"model": "model.model", "task": "task.task", "method": "teaching.method", "seed": "training.seed"}
    facts = {name: str(options.get(key, "?")) for name, key in names.items()}
    for moment, (value, error) in accuracy.items():
        facts[f"accuracy {moment}"] = f"{100 * value:.1f} ± {100 * error:.1f} %"
    if report is None:
        return {**facts, "finished": "no"}
    facts |= {"updates": str(report["updates"]), "seconds": f"{report['seconds']:.0f}", "device": report["device"]}
    if report["collapse"]:
        facts["collapse"] = "; ".join(collapse.sentence(one) for one in report["collapse"])
    return facts


def read_series(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The columns of numbers in ``metrics.csv``, and 1 at each collapse; nothing if no update was logged yet."""
    series: dict[str, list[tuple[float, float]]] = {}
    if not path.is_file():
        return series
    with reading(path):
        for row in read_metrics(path):
            for name, value in row.items():
                if name == COLLAPSE:
                    series.setdefault(name, []).append((row["step"], 1.0))
                elif name not in ("step", "epoch") and not name.startswith(COLLAPSE):
                    series.setdefault(name, []).append((row["step"], value))
    return series


def read_held_out(path: Path, kept: Path, moment: str) -> list[View]:
    """The held-out responses in ``path``, the first ones with what is ``kept`` of their trajectories."""
    with reading(path):
        outcomes, *_ = json.loads(path.read_text())["tokens_per_step"].values()  # the run's own rate comes first
        views = [
            View(
                moment,
                json.dumps(row := {name: value for name, value in one.items() if name not in OUTCOME}),
                cut("\n".join(f"{name}: {value}" for name, value in row.items())),
                cut(one["response"]),
                float(one["score"]),
                int(one["tries"]),
                None,
            )
            for one in outcomes
        ]
    if kept.is_file():
        with reading(kept):
            content = json.loads(kept.read_text())
            samples = [
                view_of_sample(moment, view.key, sample, content["texts"])
                for view, sample in zip(views, content["samples"], strict=False)
            ]
            views[: len(samples)] = samples
    return views


def view_of_sample(moment: str, key: str, kept: Mapping[str, Any], texts: Mapping[str, str]) -> View:
    """What :func:`dopsd.look.keep` wrote of one trajectory; an error that :func:`reading` names if it wrote it not."""

    def text(token: int) -> str:
        return texts[str(token)]

    tokens, reveal = [text(token) for token in kept["tokens"]], [int(step) for step in kept["reveal_step"]]
    if len(tokens) != len(reveal):
        raise ValueError(f"{len(tokens)} tokens and {len(reveal)} steps")
    states = []
    for state in kept["states"]:
        rows = []
        for position, chosen, kl, clipped, *sides in state["rows"]:
            teacher, teacher_probability, student, student_probability = sides
            if not 0 <= position < len(tokens):
                raise IndexError(f"position {position} of {len(tokens)}")
            both = [*map(text, teacher)], teacher_probability, [*map(text, student)], student_probability
            rows.append([position, chosen, kl, clipped, *both])
        states.append({"step": int(state["step"]), "shown": state["shown"], "rows": rows})
    sample = {"tokens": tokens, "reveal": reveal, "states": states}
    sample |= {"block": int(kept["block_length"]), "lead": int(kept["lead"])}
    return View(
        moment, key, cut(kept["prompt"]), cut(kept["response"]), float(kept["score"]), int(kept["tries"]), sample
    )


def cut(text: str) -> str:
    """``text``, or its beginning."""
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} …"
