"""What a folder says of how it was made: a run its options, a plain adapter its base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dopsd.cache import todays
from dopsd.checkpoints import RUN_FILE
from dopsd.errors import RunError
from dopsd.files import read_json
from dopsd.models.adapter import CONFIG
from dopsd.prompt_file import COPY
from dopsd.renamed import RENAMED

Options = dict[str, Any]


@dataclass(frozen=True)
class Recorded:
    """Options by their group and the name they have in :mod:`dopsd.config`; nothing is said of those that are missing.

    Args:
        file: says it.
        model, task, rollout, teaching, training: the groups of a run; of a plain adapter, the base model alone. The
            task's ``prompt_file`` is the run's own copy.
    """

    file: Path
    model: Options = field(default_factory=dict)
    task: Options = field(default_factory=dict)
    rollout: Options = field(default_factory=dict)
    teaching: Options = field(default_factory=dict)
    training: Options = field(default_factory=dict)


def recorded(folder: Path) -> Recorded | None:
    """What the folder of a run, of one of its checkpoints or of a PEFT adapter says; None if it says nothing.

    Raises:
        RunError: a file that would say it is damaged.
    """
    places = [folder, *([folder.parent] if folder.name.startswith("checkpoint-") else [])]
    for file in (place / RUN_FILE for place in places):
        if file.is_file():
            groups = run_options(file)
            if groups.get("task", {}).get("prompt_file") is not None:
                groups["task"]["prompt_file"] = str(file.with_name(COPY))
            return Recorded(file, *(groups.get(f.name, {}) for f in fields(Recorded)[1:]))
    if not (folder / CONFIG).is_file():
        return None
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    return Recorded(folder / CONFIG, {"model": base}) if isinstance(base, str) and base else None


def run_options(file: Path) -> dict[str, Options]:
    """A run's options by group, in the words of this release; RunError if the file is damaged."""
    groups = {name: options for name, options in read_json(file).items() if name != "id"}
    if not all(isinstance(options, dict) for options in groups.values()):
        raise RunError(f"{file} is damaged: its groups of options are no JSON objects")
    groups = {
        group: {RENAMED.get(name, name): value for name, value in options.items()} for group, options in groups.items()
    }
    if "cache" in groups.get("rollout", {}):
        groups["rollout"]["cache"] = todays(groups["rollout"]["cache"])
    return groups


def some(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of ``options`` that have one of these ``names``."""
    return {name: options[name] for name in names if name in options}
