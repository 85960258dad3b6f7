"""Tasks: rows, prompts and grades, in one file each.

``load_task`` knows the tasks that ship, those that installed packages register under the entry-point group
``dopsd.tasks``, and classes in files::

    [project.entry-points."dopsd.tasks"]
    chess = "my_package.chess:Chess"

    python -m dopsd.train --task path/to/chess.py:Chess

A task of your own is a class with the five abstract methods of :class:`Task`, derived from it or not. Its constructor
is called without arguments.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from dopsd.errors import RunError, UsageError, require
from dopsd.tasks.task import Grading, Row, Task, check_golds, draw, part, without

__all__ = ["Grading", "Row", "Task", "check_golds", "draw", "load_task", "part", "without"]

GROUP = "dopsd.tasks"
SHIPPED = {
    "sudoku": "dopsd.tasks.sudoku:Sudoku",
    "gsm8k": "dopsd.tasks.gsm8k:GSM8K",
    "math": "dopsd.tasks.competition_math:CompetitionMath",
    "countdown": "dopsd.tasks.countdown:Countdown",
    "sudoku4x4": "dopsd.tasks.sudoku4x4:Sudoku4x4",
}


def load_task(name: str, grading: Grading = "lenient") -> Task:
    """The task called ``name``, or the class of a file as ``path/to/file.py:ClassName``.

    Raises:
        UsageError: there is no such task, or it can't be used as one.
        RunError: it needs what is not installed.
    """
    found = class_in_file(name) if ".py:" in name else registered(name)
    require(isinstance(found, type), "task", name, f"{found!r} is no class")
    kind: Any = found if issubclass(found, Task) else type(found.__name__, (found, Task), {})
    missing = ", ".join(sorted(kind.__abstractmethods__))
    require(not missing, "task", name, f"{found.__name__} has no {missing}")
    try:
        task = kind()
    except (RunError, UsageError):
        raise
    except Exception as error:
        raise unusable(name, error) from error
    task.grading = grading
    return task


def registered(name: str) -> Any:
    """What ships, or else is registered, under ``name``."""
    entries = {entry.name: entry for entry in entry_points(group=GROUP)}
    entries |= {name: EntryPoint(name, value, GROUP) for name, value in SHIPPED.items()}
    accepted = f"known are {', '.join(entries)}, and path/to/file.py:ClassName"
    require(name in entries, "task", name, accepted)
    try:
        return entries[name].load()
    except Exception as error:
        raise unusable(name, error) from error


def class_in_file(name: str) -> Any:
    """``ClassName`` of ``path/to/file.py:ClassName``."""
    path, _, class_name = name.rpartition(":")
    require(Path(path).is_file(), "task", name, f"there is no file {path}")
    spec = spec_from_file_location(f"{__name__}.file.{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise unusable(name, error) from error
    require(hasattr(module, class_name), "task", name, f"{path} has no class {class_name}")
    return getattr(module, class_name)


def unusable(name: str, error: Exception) -> UsageError:
    """The error of a task that can't be loaded."""
    return UsageError(f"task={name!r} can't be used: loading it failed with {type(error).__name__}: {error}")
