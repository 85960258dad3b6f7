"""The optimiser and the schedule of its learning rate: transformers' own, tried before a run begins."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import transformers

from dopsd.errors import UsageError, require

OPTIMIZER = ("optim", "optim_args", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "learning_rate")


def require_installed(optim: str) -> None:
    """Raise UsageError for an optimiser of bitsandbytes where that is not installed."""
    theirs = optim.startswith(("adamw_8bit", "adamw_bnb", "paged_", "lion_", "ademamix", "rmsprop_bnb"))
    hint = "it needs bitsandbytes: pip install 'dopsd[quant]'"
    require(not theirs or importlib.util.find_spec("bitsandbytes") is not None, "optim", optim, hint)


def require_buildable(trainer: transformers.Trainer) -> None:
    """Raise UsageError if the optimiser or the schedule can't be built from what the options say."""
    args = trainer.args
    tried("optimiser", trainer.create_optimizer, {name: getattr(args, name) for name in OPTIMIZER})
    steps = max(1, args.max_steps)
    tried("learning rate's schedule", lambda: trainer.create_scheduler(steps), {n: getattr(args, n) for n in SCHEDULE})
    # Training builds its own, on the parameters as they are then.
    trainer.optimizer = trainer.lr_scheduler = None


def tried(what: str, build: Callable[[], Any], options: Mapping[str, Any]) -> None:
    """Call ``build``; whatever it raises is for what the ``options`` say."""
    try:
        build()
    except Exception as error:
        said = ", ".join(f"{name}={str(value)!r}" for name, value in options.items() if value not in (None, {}))
        raise UsageError(f"the {what} can't be built with {said}: {error}") from error
