"""The options of ``python -m dopsd.evaluate``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from dopsd.config import (
    GRADING_HELP,
    TASK_HELP,
    DecodingArguments,
    LoadArguments,
    PromptArguments,
    RolloutArguments,
    at_least_one,
    given_once,
    option,
)
from dopsd.errors import RunError, must_be, require
from dopsd.parser import Parser
from dopsd.recorded import Recorded, recorded, some
from dopsd.sampler import Decoding
from dopsd.tasks import Grading, Task, load_task

# Options that a run says of its task, beside the task itself.
ABOUT_TASKS = ("grading", "test_file", "eval_problems", "prompt_file", "prefill")


@dataclass
class EvaluationArguments(LoadArguments, DecodingArguments, PromptArguments):
    """What ``python -m dopsd.evaluate`` measures; the defaults fit the tiny model."""

    _argument_group_name: ClassVar[str] = "evaluation"

    task: list[str] = option(["sudoku"], f"Tasks, each evaluated: {TASK_HELP}")
    grading: Grading = option("lenient", GRADING_HELP)
    test_file: str | None = option(None, "Rows of the one task (csv, jsonl, parquet); none: its own held-out problems.")
    eval_problems: int | None = option(
        None, "Only so many problems; none: all of test_file, or the number that the task is reported with."
    )
    gen_length: list[int] | None = option(None, "Response lengths in tokens, each evaluated; none: the task's own.")
    block_length: int | None = option(None, "Tokens per block; none: the task's own.")
    tokens_per_step: list[float] = option([2], "Tokens revealed per denoising step, each evaluated.")
    pass_k: int = option(1, "Tries at each problem; more than one also reports pass@k.")
    temperature: float = option(0.9, "Of the second and later tries; the first is greedy.")
    reveal: list[float] = option(
        [],
        "Shares of the model's own correct answer (of pass_k tries) to reveal ahead of decoding; a block's revealed "
        "tokens are cleared when decoding enters it.",
    )
    bf16: bool = option(False, "Compute in bf16 (autocast), as training does where it can.")
    seed: int = option(0, "Of everything drawn.")
    output: str | None = option(
        None,
        "JSON file with every response, and a Markdown table beside it; the same command goes on where it was stopped. "
        "None: not written.",
    )
    overwrite: bool = option(False, "Start anew where output or an unfinished run of it exists.")
    compare: list[str] | None = option(
        None,
        "Two output files, or a run's folder: what the second, or the run's end, gained and lost, problem by problem. "
        "No model is loaded.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokens_per_step = [int(rate) if float(rate).is_integer() else rate for rate in self.tokens_per_step]
        at_least_one(self, "eval_problems", "pass_k", "sequences_per_forward", "block_length")
        given_once(self, "task", "gen_length", "tokens_per_step", "reveal")
        require(
            self.test_file is None or len(self.task) == 1,
            "test_file",
            self.test_file,
            f"its rows are those of one task, and task names {', '.join(self.task)}",
        )
        given = self.compare
        must_be(
            given is None or len(given) == 2 or (len(given) == 1 and Path(given[0]).is_dir()),
            "compare",
            given,
            "two files of results, or a run's folder",
        )
        must_be(
            self.pass_k == 1 or self.temperature > 0,
            "temperature",
            self.temperature,
            f"positive when pass_k={self.pass_k} allows for more than one try",
        )
        must_be(self.seed >= 0, "seed", self.seed, "at least 0")
        for share in self.reveal:
            must_be(0 <= share <= 1, "reveal", share, "in [0, 1]")
        hint = "with it, tokens are revealed by their probability and not by tokens_per_step: give one rate, or none"
        require(self.threshold is None or len(self.tokens_per_step) == 1, "threshold", self.threshold, hint)
        names = {f"{share:g}" for share in self.reveal}
        require(len(names) == len(self.reveal), "reveal", self.reveal, "each share may be given once, of six digits")
        for task in [load_task(name, self.grading) for name in self.task]:
            block = self.block(task)
            for rate in self.tokens_per_step:
                accepted = f"between 1 and block_length={block}"
                must_be(1 <= rate <= block, "tokens_per_step", rate, accepted)
                for length in self.lengths(task):
                    self.decoding(task, length, rate)

    def lengths(self, task: Task) -> Sequence[int]:
        """The response lengths at which a task is evaluated."""
        return self.gen_length or task.eval_lengths

    def block(self, task: Task) -> int:
        """The block length that a task is decoded with."""
        return task.eval_block_length if self.block_length is None else self.block_length

    def decoding(self, task: Task, gen_length: int, tokens_per_step: float) -> Decoding:
        """Greedy decoding of a task at one length and rate."""
        steps = math.ceil(gen_length / tokens_per_step - 1e-9)  # 48 / (48 / 20) is to be 20, however it is rounded
        return Decoding(gen_length, self.block(task), steps, **self.sampling())


def parse_evaluate(argv: Sequence[str] = (), **options: Any) -> EvaluationArguments:
    """The options of an evaluation: those that the adapter's folder says, overridden by ``argv`` and ``options``."""
    parser = Parser(
        EvaluationArguments,
        prog="python -m dopsd.evaluate",
        description="Accuracy of a model or adapter on a task, and how much its own future would help it.",
    )
    words = [*argv, *parser.tokens(options)]
    probe = Parser(LoadArguments, add_help=False)
    probe.add_argument("--task", nargs="+")
    probe.set_defaults(model=None)
    given, _ = probe.parse_known_args(words)
    said: list[str] = []
    if given.adapter is not None and (found := recorded(Path(given.adapter))) is not None:
        recalled = evaluation_options(found, given.model, given.task)
        if given.task is not None:
            recalled.pop("task", None)  # a file's code, it may be, which only the command line names
        said = parser.tokens(recalled, str(found.file))
    (arguments,) = parser.parse([*said, *words])
    return arguments


def evaluation_options(found: Recorded, model: str | None = None, task: list[str] | None = None) -> dict[str, Any]:
    """The options of an evaluation that go on as a folder's run decoded its own held-out problems.

    Args:
        found: what the folder says.
        model, task: as they are named otherwise. What is said of another model or other tasks is left out.
    """
    options: dict[str, Any] = {}
    if model in (None, found.model.get("model")):
        options |= some(found.model, *(f.name for f in fields(LoadArguments) if f.name != "adapter"))
    if "task" in found.task and task in (None, [found.task["task"]]):
        try:
            own = RolloutArguments(**some(found.rollout, "gen_length", "block_length", "steps")).decoding()
        except TypeError as error:
            raise RunError(f"{found.file} is damaged: its lengths are no numbers ({error})") from error
        options |= {"task": [found.task["task"]]} | some(found.task, *ABOUT_TASKS)
        options |= {"gen_length": [own.gen_length], "block_length": own.block_length}
        options |= {"tokens_per_step": [own.gen_length / own.total_steps]}
    options |= some(found.rollout, *(f.name for f in fields(DecodingArguments)), "temperature")
    return options | some(found.training, "bf16", "seed")
