"""What both commands share: exit statuses, quiet libraries, checks of task files."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers

from dopsd.errors import RunError, UsageError
from dopsd.rollout import Decoder, Row


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call ``main`` with the command line and exit: 0, 2 for an unusable argument, 1 for any other failure.

    An error is one sentence on standard error; ``--debug`` shows its traceback as well.
    """
    argv = sys.argv[1:]
    debug = "--debug" in argv
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        main([word for word in argv if word != "--debug"])
    except (UsageError, RunError, OSError, ValueError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"error: {text} (unexpected; --debug shows where)", file=sys.stderr)
        raise SystemExit(1) from None


def problems(task: Any, split: str, file: str | None, count: int) -> list[Row]:
    """The rows of a file, or ``count`` generated ones."""
    return task.problems(split, count) if file is None else task.read(Path(file))


def check_lengths(decoder: Decoder, prompts: Sequence[str], gen_length: int) -> None:
    """Raise :class:`~dopsd.errors.RunError` if a prompt and its response don't fit the model's context."""
    context = decoder.model.config.max_position_embeddings
    lengths = [len(decoder.encode(prompt)) for prompt in prompts]
    long = [number for number, length in enumerate(lengths) if length + gen_length > context]
    if long:
        raise RunError(
            f"{len(long)} of {len(prompts)} prompts don't fit: row {long[0]} has {lengths[long[0]]} tokens, and with "
            f"gen_length={gen_length} the model's context of {context} leaves room for {context - gen_length}; prompts "
            "are never cut"
        )
