"""The options of ``python -m dopsd.plan``, beside those of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dopsd.commands import TRAINING, for_full_finetune, with_recipe
from dopsd.config import (
    OF_METHODS,
    ModelArguments,
    RolloutArguments,
    TaskArguments,
    TeachingArguments,
    TrainingArguments,
    at_least_one,
    option,
)
from dopsd.errors import must_be, require
from dopsd.models import is_block_causal
from dopsd.parser import Parser
from dopsd.units import read_bytes


@dataclass
class PlanArguments:
    """What ``python -m dopsd.plan`` is asked; the options of training go along."""

    _argument_group_name: ClassVar[str] = "plan"

    model_config: str | None = option(None, "A config.json, a folder with one, or a hub id; none: that of --model.")
    gpu: str = option("24GiB", "Memory of the GPU, in GiB.")
    prompt_length: int = option(200, "Tokens of the longest prompt, the teacher's included.")
    nodes: int = option(1, "Machines.")
    gpus: int = option(1, "GPUs of each.")
    pass_rate: float = option(1.0, "Share of tries that are right; where one is not, others follow, up to pass_k.")
    tflops: float | None = option(None, "10^12 operations a second that a GPU does, for a time; none: no time is said.")
    network: float | None = option(None, "10^9 bytes a second that reach a GPU from others, for the same.")

    def __post_init__(self) -> None:
        read_bytes("gpu", self.gpu, None)
        at_least_one(self, "prompt_length", "nodes", "gpus")
        for name in ("tflops", "network"):
            given = getattr(self, name)
            must_be(given is None or given > 0, name, given, "above 0, or none")
        must_be(0 < self.pass_rate <= 1, "pass_rate", self.pass_rate, "above 0 and at most 1")
        together = (self.tflops is None) == (self.network is None)
        require(together, "tflops", self.tflops, "a time takes --tflops and --network")


def parse_plan(
    argv: Sequence[str],
) -> tuple[PlanArguments, ModelArguments, TaskArguments, RolloutArguments, TeachingArguments, TrainingArguments]:
    """The options of a plan without a run: a recipe's, overridden by those in ``argv``.

    Unless one is named it is ``paper``, or ``block_causal`` where that is what the configuration is.

    The GPU that is planned for computes in bf16 unless it is told not to, whatever this machine does.
    """
    parser = Parser(
        PlanArguments,
        *TRAINING,
        owners=OF_METHODS,
        prog="python -m dopsd.plan",
        description="Which sizes of a training run fit on a GPU, from a config.json alone.",
    )
    known, _ = Parser(PlanArguments, add_help=False).parse_known_args(list(argv))

    def recipe(model: str | None) -> str:
        return "block_causal" if is_block_causal(known.model_config or model or "") else "paper"

    groups = parser.parse(["--bf16", "true", *with_recipe(parser, list(argv), recipe)])
    for_full_finetune(groups[1], argv)
    return groups
