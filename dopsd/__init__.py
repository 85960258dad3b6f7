"""d-OPSD: on-policy self-distillation of diffusion language models from their own future tokens.

    run = dopsd.train(recipe="tiny", output_dir="runs/a")
    model = dopsd.load("runs/a")
    results = dopsd.evaluate("runs/a", eval_problems=64)
    dopsd.export("runs/a", "merged")

Options are the command line's, by the same names, and checked alike: a wrong one is a
:class:`~dopsd.errors.UsageError`, what else ends a run a :class:`~dopsd.errors.RunError`. Nothing is printed unless
``progress`` asks for it; the sentences are also in the log named ``dopsd``.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dopsd.evaluation.command import Results
    from dopsd.generate import Model
    from dopsd.run import Run

_missing = [name for name in ("transformers", "peft", "accelerate") if find_spec(name) is None]
if _missing:
    # With this package's name, `python -m dopsd.train` prints the sentence without a traceback.
    raise ImportError(f"dopsd needs {', '.join(_missing)}: pip install 'dopsd[train]'", name=__name__)

__all__ = ["__version__", "evaluate", "export", "load", "train"]

__version__ = "0.1.0"

logging.getLogger("dopsd").addHandler(logging.NullHandler())  # a library's warnings are its user's to print


# These import what they need when they are called: torch and transformers take seconds.


def train(*, progress: bool = False, **options: Any) -> Run:
    """Train as ``python -m dopsd.train`` does.

    Args:
        progress: print and draw what the command would.
        options: any of the command's by its name, ``recipe`` among them; None, lists and dictionaries are themselves.

    Returns:
        What is in the run's folder.

    Raises:
        UsageError: an option that can't be used.
        RunError: the run can't start or go on.
        Interrupted: a signal ended it; ``resume_from_checkpoint=True`` goes on.
    """
    from dopsd.commands import parse_train
    from dopsd.console import console
    from dopsd.run import run

    with console(sentences=progress, bars=progress):
        return run(*parse_train(**options))


def evaluate(source: str | Path | Run, *, progress: bool = False, **options: Any) -> Results | None:
    """Evaluate as ``python -m dopsd.evaluate`` does.

    Args:
        source: what :func:`load` takes. A run's held-out problems are decoded as the run did, unless ``options`` say
            otherwise.
        progress: print and draw what the command would.
        options: any of the command's by its name, but for ``compare``.

    Returns:
        the results; None on all processes but the first.

    Raises:
        UsageError: an option that can't be used.
        RunError: files that can't, or rows.
    """
    from dopsd.console import console
    from dopsd.evaluation.command import Results
    from dopsd.evaluation.options import parse_evaluate
    from dopsd.evaluation.run import evaluate
    from dopsd.generate import named

    with console(sentences=progress, bars=progress):
        content = evaluate(parse_evaluate(**named(str(getattr(source, "folder", source))), **options))
    return None if content is None else Results(content)


def export(source: str | Path | Run, output_dir: str | Path, model: str | None = None) -> None:
    """Write a checkpoint as ``python -m dopsd.export`` does: the base model with the adapter merged into its weights.

    Args:
        source: a run or the folder of one, one of its checkpoints, or an adapter's folder.
        output_dir: a new folder, or an empty one.
        model: the base model, as :func:`load` takes it; None: the one that the adapter was trained over.

    Raises:
        UsageError: no adapter, no base model, one that the adapter does not fit, or a folder that is not empty.
        RunError: files that can't be read or written.
    """
    from dopsd.console import console
    from dopsd.merging import export

    with console(sentences=False, bars=False):
        export(str(getattr(source, "folder", source)), Path(output_dir), model)


def load(source: str | Path | Run, **options: Any) -> Model:
    """A model that is ready to generate.

    Args:
        source: a run or the folder of one, an adapter's folder, a model's folder, a hub id, or the name of a model that
            ships. A run says its base model, its mask token, its prompt file and prefill, and how it decodes.
        options: ``dtype``, ``quantize``, ``attn_implementation``, ``mask_token_id``, ``shift_logits``, ``block_size``,
            ``prompt_file`` and ``prefill``, as the commands take them.

    Raises:
        UsageError: an option that can't be used.
        RunError: files that can't.
    """
    from dopsd.console import console
    from dopsd.generate import load

    with console(sentences=False, bars=False):
        return load(str(getattr(source, "folder", source)), **options)
