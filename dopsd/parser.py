"""From a command line, a recipe or a function's arguments to dataclasses of options, all checked alike."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import math
from argparse import SUPPRESS, Action, HelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, NoReturn, get_args

import yaml
from transformers import HfArgumentParser

from dopsd.cache import todays
from dopsd.errors import UsageError, must_be, require
from dopsd.renamed import todays_word
from dopsd.tasks import GROUP, SHIPPED

log = logging.getLogger(__name__)

# Of the numbers that options take; seeds go so far.
LARGEST = 2**32 - 1
LONGEST_RECIPE = 1 << 16

RECIPES = Path(__file__).parent / "recipes"
# Of transformers' options, those that --help shows, in a line each.
USUAL = {
    "per_device_train_batch_size": "Prompts of a batch, on each process.",
    "max_steps": "Updates; -1: as many as num_train_epochs takes.",
    "learning_rate": "The schedule's highest.",
    "lr_scheduler_type": "What becomes of it: linear, cosine, constant, ...",
    "optim": "The optimiser, by its name in transformers.",
    "weight_decay": "Of all that is trained but biases and norms.",
    "max_grad_norm": "Gradients are clipped to this norm; 0: they are not.",
    "gradient_checkpointing": "Compute activations again in the backward pass.",
    "logging_steps": "Updates between logs; below 1, a share of all.",
    "report_to": "Where logs go besides: tensorboard, wandb, trackio, ..., all or none.",
    "eval_strategy": "When validation rows are evaluated.",
    "eval_steps": "Updates between evaluations; none: logging_steps.",
    "save_strategy": "When a checkpoint is saved.",
    "save_steps": "Updates between checkpoints; below 1, a share of all.",
    "save_total_limit": "Checkpoints that are kept: the newest, and the best; none: all.",
    "hub_model_id": "The repository that push_to_hub publishes to.",
    "seed": "Of all that is drawn.",
    "resume_from_checkpoint": "A checkpoint's folder, or true for the newest complete one.",
}
EPILOG = (
    "An error is one sentence and exit status 2 (an option) or 1 (anything else); --debug adds its traceback. "
    "Ctrl-C and SIGTERM end with 130 and 143."
)


def check_numbers(name: str, value: Any) -> None:
    """Raise UsageError if a number in the option's ``value`` means nothing: inf, nan, or absurdly many."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            check_numbers(name, item)
    elif isinstance(value, float):
        must_be(math.isfinite(value), name, value, "finite")
    elif isinstance(value, int):
        must_be(abs(value) <= LARGEST, name, value, f"at most {LARGEST}")


class Parser(HfArgumentParser):
    """An argument parser whose errors are :class:`~dopsd.errors.UsageError`, and that takes ``none`` for no value.

    ``--help`` shows this project's options and the ``USUAL`` of transformers', ``--help-all`` all, in its own words.

    Args:
        groups: dataclasses of options.
        owners: the methods that an option is for, if not for all; it is shown with others of these.
        kwargs: of argparse.
    """

    def __init__(self, *groups: Any, owners: Mapping[str, Sequence[str]] | None = None, **kwargs: Any) -> None:
        self.owners: Mapping[str, Sequence[str]] = owners or {}
        self.of_owners: dict[str, Any] = {}  # the groups of options that have owners, by their titles
        super().__init__(
            groups,
            allow_abbrev=False,
            formatter_class=ShortHelp,
            usage="%(prog)s [--OPTION VALUE ...]",
            epilog=EPILOG,
            **kwargs,
        )
        ours = {
            name: hint
            for group in groups
            for owner in group.__mro__
            if owner.__module__.startswith("dopsd.")
            for name, hint in inspect.get_annotations(owner, eval_str=True).items()
        }
        self.optional = {name for name, hint in ours.items() if type(None) in get_args(hint)}
        self.theirs = {f.name for group in groups for f in fields(group)} - set(ours)
        self.hidden: dict[Action, str | None] = {}
        for action in self._actions:
            if action.dest == "cache":
                action.type = todays_cache
            if action.dest in self.optional:
                action.type = none_or(action.type)
            if action.nargs == "+" and action.default == []:
                action.nargs = "*"
            if action.dest in self.theirs:
                self.hidden[action], action.help = action.help, USUAL.get(action.dest, SUPPRESS)
            if action.option_strings[0].startswith("--no_"):  # which "false" says as well
                action.help = SUPPRESS
        if self.hidden:
            self.add_argument(
                "--help-all", action=HelpAll, nargs=0, dest=SUPPRESS, help="Show all of transformers' options as well."
            )

    def _parse_dataclass_field(self, parser: Any, field: Any) -> None:  # type: ignore[override]
        """Add an option, to the group of its owners if it has any."""
        if field.name in self.owners:
            title = f"method={' or '.join(self.owners[field.name])}"
            if title not in self.of_owners:
                self.of_owners[title] = self.add_argument_group(title)
            parser = self.of_owners[title]
        super()._parse_dataclass_field(parser, field)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, rest = super().parse_known_args(args, namespace)
        for name, value in vars(namespace).items():
            if value == [None]:  # a list that is not given
                setattr(namespace, name, None)
        return namespace, rest

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """The dataclasses of ``argv``; an unknown option is an error with the nearest known one."""
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(
                [todays_word(word) for word in argv], look_for_args_file=False, return_remaining_strings=True
            )
        except (ValueError, ImportError, OverflowError, RecursionError) as error:  # transformers' own checks
            raise error if isinstance(error, UsageError) else UsageError(str(error)) from error
        for group in parsed:
            for name, value in vars(group).items():
                check_numbers(name, value)
        if unknown:
            name = unknown[0].partition("=")[0]
            raise UsageError(f"unknown option {name}{did_you_mean(name, self._option_string_actions)}")
        return tuple(parsed)

    def tokens(self, options: Mapping[str, Any], source: str = "") -> list[str]:
        """``options`` of a recipe (its ``source``) or of a function as command-line tokens: all are checked alike."""
        out: list[str] = []
        for given, value in options.items():
            name = todays_word(f"--{given}").removeprefix("--")
            action: Action | None = self._option_string_actions.get(f"--{name}")
            if action is None:
                known = [key.removeprefix("--") for key in self._option_string_actions]
                where = f"{source}: " if source else ""
                raise UsageError(f"{where}unknown option {name!r}{did_you_mean(str(name), known)}")
            if value is None and name in self.theirs:
                continue
            if source and name == "task" and ".py:" in str(value):
                hint = "the code in that file would run, so it is named on the command line alone: --task"
                raise UsageError(f"{source}: task={value!r} can't be used: {hint}")
            if value is False and "none" in (action.choices or ()):
                value = "off"  # which YAML takes for false
            values = value if isinstance(value, list | tuple) else ["none" if value is None else value]
            words = [json.dumps(item) if isinstance(item, dict) else str(item) for item in values]
            if action.nargs in (None, "?") and len(words) == 1:
                out.append(f"--{name}={words[0]}")  # the word may begin with a dash
            else:
                out += [f"--{name}", *words]
        return out

    def recipe(self, name: str, model: str | None, task: str | None, root: Callable[[str | None], str]) -> list[str]:
        """The options of a recipe, over those of the one that it starts from, as tokens.

        A recipe's options for the task that is chosen go over its others, and under those of what starts from it.

        Args:
            name: as of :meth:`files`.
            model, task: as they are named above the recipe, which says it otherwise.
            root: as of :meth:`files`.
        """
        files = self.files(name, model, root)
        tasks = [*SHIPPED, *(entry.name for entry in entry_points(group=GROUP))]
        named = [options["task"] for _, options in files if "task" in options]
        task = task or (str(named[-1]) if named else self.get_default("task"))
        out: list[str] = []
        for source, options in files:
            sections = options.pop("tasks", {})
            must_be(isinstance(sections, dict), f"{source}: tasks", sections, "options by the name of a task")
            out += self.tokens(options, source)
            for other, section in sections.items():
                must_be(other in tasks, f"{source}: tasks", other, f"one of {', '.join(tasks)}")
                must_be(isinstance(section, dict), f"{source}: tasks: {other}", section, "an option a line")
                for fixed in ("recipe", "model", "task"):
                    hint = "it can't depend on the task"
                    require(fixed not in section, f"{source}: tasks: {other}: {fixed}", section.get(fixed), hint)
                words = self.tokens(section, f"{source}: tasks: {other}")
                out += words if other == task else []
        return out

    def files(
        self, name: str, model: str | None, root: Callable[[str | None], str], above: tuple[Path, ...] = ()
    ) -> list[tuple[str, dict[str, Any]]]:
        """A recipe's name and what its file says, behind those of the ones that it starts from.

        Args:
            name: of one that ships, which starts from nothing unless it names another, or a file.
            model: as it is named above the recipe, which says it otherwise.
            root: what a file for that model starts from if it doesn't say it.
            above: the files that name it; a name is looked for beside the last of them.
        """
        shipped = sorted(path.stem for path in RECIPES.glob("*.yaml"))
        path = RECIPES / f"{name}.yaml" if name in shipped else (above[-1].parent if above else Path()) / name
        must_be(path.is_file(), "recipe", name, f"one of {', '.join(shipped)}, or a YAML file")
        try:
            text = path.read_text()
            must_be(len(text) <= LONGEST_RECIPE, "recipe", name, f"a file of at most {LONGEST_RECIPE} characters")
            options = yaml.load(text, RecipeLoader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UsageError(f"recipe={name!r}: not valid YAML: {' '.join(str(error).split())}") from error
        must_be(isinstance(options, dict), "recipe", name, "a YAML file with one option a line")
        chain = (*above, path)
        circle = any(path.samefile(other) for other in above)
        require(not circle, "recipe", name, "recipes name each other in a circle")
        if model is None and "model" in options:
            model = str(options["model"])
        base = options.pop("recipe", None)
        if base is None and not path.parent.samefile(RECIPES):
            base = root(model)
        return [*([] if base is None else self.files(str(base), model, root, chain)), (name, options)]


class ShortHelp(HelpFormatter):
    """Each option once, by its name and the kind of its value, with its default in brackets."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=39, width=max(120, get_terminal_size().columns) - 2)

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings:
            return str(action.metavar)
        known = "|".join(map(str, action.choices or ()))
        kind = getattr(action.type, "__name__", "")
        kind = {"string_to_bool": "true|false", "int": "INT", "float": "FLOAT"}.get(kind, "TEXT" if kind else "")
        return f"{action.option_strings[0]} {known if 0 < len(known) < 60 else kind}".rstrip()

    def _get_help_string(self, action: Action) -> str:
        absent = action.default in (None, [], SUPPRESS)
        return f"{action.help or ''}{'' if absent else ' [%(default)s]'}"


class HelpAll(Action):
    """Print the help with what ``--help`` leaves out."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        for action, help in parser.hidden.items():
            action.help = help
        parser.print_help()
        parser.exit()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause with the known option nearest to ``name``; empty if none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def todays_cache(word: str) -> str:
    """The name of a kind of cache; with a warning for the name that it had in an earlier release."""
    name = todays(word)
    if name != word:
        log.warning("cache=%s is called cache=%s now; the next release forgets %s", word, name, word)
    return name


def none_or(kind: Any) -> Any:
    """A converter to ``kind`` that reads ``none`` as no value."""

    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__
    return convert


class RecipeLoader(yaml.SafeLoader):
    """YAML without aliases, a few lines of which can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not read")
        return super().compose_node(parent, index)
