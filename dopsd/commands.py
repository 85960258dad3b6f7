"""What the commands and the functions of the same names are asked, from a command line, a recipe and arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from dopsd.config import (
    OF_METHODS,
    LoadArguments,
    ModelArguments,
    PromptArguments,
    RolloutArguments,
    SampleArguments,
    TaskArguments,
    TeachingArguments,
    TrainingArguments,
)
from dopsd.errors import must_be, require
from dopsd.models import SHIPPED, is_block_causal
from dopsd.parser import Parser

# The options of a training run, in the order of its groups.
TRAINING = (ModelArguments, TaskArguments, RolloutArguments, TeachingArguments, TrainingArguments)


def parse_train(
    argv: Sequence[str] = (), **options: Any
) -> tuple[ModelArguments, TaskArguments, RolloutArguments, TeachingArguments, TrainingArguments]:
    """The options of a training run: a recipe's, overridden by those in ``argv`` and by ``options``."""
    parser = Parser(
        *TRAINING,
        owners=OF_METHODS,
        prog="python -m dopsd.train",
        description="A diffusion language model learns from its own future tokens (d-OPSD), or by another method.",
    )
    words = [*argv, *parser.tokens(options)]
    groups = parser.parse(with_recipe(parser, words, default_recipe))
    for_method(groups, words)
    for_full_finetune(groups[0], words)
    require_comparable(groups[2], groups[3])
    own = groups[1].prompt_file is not None and groups[3].teacher_context == "reference"
    hint = "such a teacher has the task's own prompt around the reference solution, and the student prompt_file's"
    require(not own, "teacher_context", groups[3].teacher_context, hint)
    return groups


def for_method(groups: Sequence[Any], words: Sequence[str]) -> None:
    """Put options of other methods than the one chosen back to their defaults: a recipe may have them.

    Raises:
        UsageError: one of ``words``, a command line, is such an option.
    """
    method = next(group.method for group in groups if isinstance(group, TeachingArguments))
    for group in groups:
        for f in fields(group):
            owners = OF_METHODS.get(f.name, (method,))
            if method not in owners:
                hint = f"it goes with method={' or '.join(owners)}, and not with {method}"
                take_back(group, f.name, words, hint)


def for_full_finetune(model: ModelArguments, words: Sequence[str]) -> None:
    """Likewise the options of LoRA, where there is none."""
    names = [f.name for f in fields(model) if f.name.startswith("lora_")] if model.full_finetune else []
    for name in names:
        take_back(model, name, words, "it goes with LoRA, and not with full_finetune")


def take_back(group: Any, name: str, words: Sequence[str], hint: str) -> None:
    """Put an option of ``group`` back to its default; UsageError if ``words`` give it."""
    given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    require(name not in given, name, getattr(group, name), hint)
    setattr(group, name, next(f.default for f in fields(group) if f.name == name))


def require_comparable(rollouts: RolloutArguments, teaching: TeachingArguments) -> None:
    """Raise UsageError unless the responses of a group can be compared as is asked for."""
    several = teaching.method not in ("diffu_grpo", "vrpo") or rollouts.pass_k >= 2
    must_be(several, "pass_k", rollouts.pass_k, "at least 2: a response is compared with others")
    decoding = rollouts.decoding()
    one_by_one = decoding.remasking == "leftmost" and decoding.total_steps == decoding.gen_length
    hint = f"it goes with remasking=leftmost, one token a step (steps={decoding.gen_length}) and cache=none"
    possible = teaching.likelihood == "one_step" or (one_by_one and decoding.cache == "none")
    require(possible, "likelihood", teaching.likelihood, hint)


def default_recipe(model: str | None) -> str:
    """The recipe that a model, the default one if none is named, is trained with unless one is named.

    Of a hub model nothing is known yet: that of a block-causal one is named.
    """
    if model is None or model in SHIPPED:
        return model or "tiny"
    return "block_causal" if is_block_causal(model) else "paper"


def with_recipe(parser: Parser, words: list[str], default: Callable[[str | None], str]) -> list[str]:
    """``words`` behind the options of the recipe that they name, or else of their model's ``default``."""
    probe = Parser(ModelArguments, TaskArguments, add_help=False)
    probe.set_defaults(model=None, task=None)
    known, _ = probe.parse_known_args(words)
    name = default(known.model) if known.recipe is None else known.recipe
    return [*parser.recipe(name, known.model, known.task, default_recipe), f"--recipe={name}", *words]


def parse_sample(argv: Sequence[str]) -> SampleArguments:
    """The options of ``python -m dopsd.sample``."""
    description = "Completions of prompts, by a run, an adapter or a model."
    (arguments,) = Parser(SampleArguments, prog="python -m dopsd.sample", description=description).parse(argv)
    return arguments


def parse_load(**options: Any) -> tuple[LoadArguments, PromptArguments]:
    """How a model is loaded, and how rows become its prompts."""
    parser = Parser(LoadArguments, PromptArguments)
    return parser.parse(parser.tokens(options))
