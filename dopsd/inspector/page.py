"""The page: its parts and a run's content in one HTML file."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dopsd.files import plain
from dopsd.inspector.read import RunContent, View

PARTS = Path(__file__).parent
# The figures that are drawn first; all others follow by name.
FIRST = (
    *("eval_accuracy", "loss", "kl", "pass_rate", "first_try", "tries", "accepted", "completion_length"),
    *("overlap_top20", "clip_fraction", "grad_norm", "learning_rate"),
)


def render(runs: Sequence[RunContent]) -> str:
    """The page of one run, or of two that are compared.

    What came from data is JSON in a block that no browser runs, in which nothing can end the block, and the page's
    script makes text of it, never markup.
    """
    content = json.dumps(plain(content_of(runs)), separators=(",", ":"))
    parts = {
        "title": html.escape(" and ".join(run.name for run in runs)),
        "style": (PARTS / "page.css").read_text(encoding="utf-8"),
        "script": (PARTS / "page.js").read_text(encoding="utf-8"),
        "data": content.replace("<", "\\u003c"),
    }
    page = (PARTS / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)


def content_of(runs: Sequence[RunContent]) -> dict[str, Any]:
    """What the page's script reads: runs, figures, problems with their responses, and the texts of all tokens once."""
    texts: dict[str, int] = {}
    items: dict[str, dict[str, Any]] = {}
    for number, run in enumerate(runs):
        for view in run.views:
            item = items.setdefault(view.key, {"update": view.moment == "update", "title": "", "views": []})
            if view.sample is not None or "prompt" not in item:
                item["prompt"] = view.prompt
            item["views"].append({"run": number, **fields_of(view, texts)})
    for problem, item in enumerate(item for item in items.values() if not item["update"]):
        item["title"] = f"problem {problem}"
    for key, item in items.items():
        item["title"] = item["title"] or key
    names = {name for run in runs for name in run.series}
    return {
        "runs": [{"name": run.name, "facts": run.facts, "collapses": run.collapses} for run in runs],
        "options": options_of(runs),
        "figures": [
            {"name": name, "series": [run.series.get(name, []) for run in runs], "lines": lines_of(name, runs)}
            for name in sorted(names, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
        ],
        "items": list(items.values()),
        "texts": list(texts),
    }


def fields_of(view: View, texts: dict[str, int]) -> dict[str, Any]:
    """A response as the script reads it, with indices into ``texts``, which grows, for texts of tokens."""

    def index(words: Sequence[str]) -> list[int]:
        return [texts.setdefault(word, len(texts)) for word in words]

    fields = {"moment": view.moment, "response": view.response, "score": view.score, "tries": view.tries}
    if view.sample is None:
        return {**fields, "sample": None}
    states = [
        {
            **state,
            "rows": [
                [position, int(chosen), kl, clipped, index(teacher), ours, index(student), theirs]
                for position, chosen, kl, clipped, teacher, ours, student, theirs in state["rows"]
            ],
        }
        for state in view.sample["states"]
    ]
    return {**fields, "sample": {**view.sample, "tokens": index(view.sample["tokens"]), "states": states}}


def lines_of(name: str, runs: Sequence[RunContent]) -> list[tuple[int, str, float]]:
    """Levels that are drawn with a figure: (run, name, value)."""
    if name != "eval_accuracy":
        return []
    return [(number, moment, value) for number, run in enumerate(runs) for moment, (value, _) in run.accuracy.items()]


def options_of(runs: Sequence[RunContent]) -> list[tuple[str, list[str]]]:
    """Every option with its values; of two runs, those that differ."""
    names = list(dict.fromkeys(name for run in runs for name in run.options))
    found = [(name, [json.dumps(run.options.get(name)) for run in runs]) for name in names]
    return found if len(runs) == 1 else [(name, values) for name, values in found if values[0] != values[1]]
