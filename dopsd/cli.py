"""What the commands share: exit statuses, what is printed, checks of task files."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from dopsd.console import console
from dopsd.errors import Interrupted, RunError, UsageError, ending
from dopsd.tasks import Row, Task, draw, part, without

if TYPE_CHECKING:  # importing these takes seconds
    from dopsd.config import TaskArguments


def start(module: str) -> None:
    """Run ``module``'s ``main``, whose imports take seconds: on a terminal that is said first."""
    if sys.stderr.isatty():
        print("importing torch, transformers and peft ...", file=sys.stderr, flush=True)
    run(lambda argv: import_module(module).main(argv))


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call ``main`` with the command line and exit: 0, 2 for an unusable argument, 128 and the signal's number
    for a signal, 1 for any other failure.

    What the package says is printed; bars are drawn on a terminal alone. An error is one sentence on standard error;
    ``--debug`` shows its traceback as well.
    """
    argv = sys.argv[1:]
    debug = "--debug" in argv
    try:
        with console(sentences=True, bars=sys.stdout.isatty()):
            main([word for word in argv if word != "--debug"])
    except (UsageError, RunError, OSError, ValueError) as error:
        if debug:
            traceback.print_exc()
        status, text = ending(error)
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(status) from None
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(stop.status) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        status, text = ending(error)
        print(f"error: {text} (unexpected; --debug shows where)", file=sys.stderr)
        raise SystemExit(status) from None


def problems(task: Task, split: str, file: str | None, count: int, exclude: Sequence[Row] = ()) -> list[Row]:
    """The rows of a file, or else the task's own: ``count`` that pose no problem of ``exclude``."""
    return draw(task, split, count, exclude=exclude) if file is None else task.read(Path(file))


def splits(task: Task, files: TaskArguments) -> dict[str, list[Row]]:
    """The rows to train on, to choose the best adapter by, and to test on.

    Rows that the task draws pose no problem of a file's. A task that does not generate its rows has its validation rows
    set aside from the training file, if that is given without one of validation rows; none of them is a test row.
    """
    test = problems(task, "test", files.test_file, files.eval_problems)
    held_out = [] if files.test_file is None else test
    if files.train_file is None or files.validation_file is not None or task.generated:
        validation = problems(task, "validation", files.validation_file, files.validation_problems, held_out)
        if files.validation_file is not None:
            held_out = [*held_out, *validation]
        train = problems(task, "train", files.train_file, files.train_problems, held_out)
    else:
        rows = without(task, task.read(Path(files.train_file)), test)
        train, validation = part(task, rows, "train"), part(task, rows, "validation")[: files.validation_problems]
        if not train or not validation:
            raise RunError(f"{files.train_file}: {len(rows)} rows are too few to set some aside: give validation_file")
    return {"train": train, "validation": validation, "test": test[: files.eval_problems]}
