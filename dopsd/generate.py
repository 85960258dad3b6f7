"""A model that is ready to generate: its weights, its tokenizer, and how it decodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from dopsd.commands import parse_load, parse_train
from dopsd.config import LoadArguments, RolloutArguments
from dopsd.errors import UsageError, require
from dopsd.models import load_adapter, load_model
from dopsd.parser import did_you_mean
from dopsd.recorded import recorded, some
from dopsd.rollout import Decoder
from dopsd.sampler import Decoding, check_decoding
from dopsd.seeds import mix_seeds
from dopsd.tasks import Row, Task
from dopsd.trajectory import Trajectory


@dataclass(frozen=True)
class Sample:
    """A completion.

    Args:
        text: up to the first end-of-text token.
        trajectory: its tokens and the step at which each was revealed.
    """

    text: str
    trajectory: Trajectory = field(repr=False)


@dataclass(frozen=True)
class Model:
    """A model as it generates.

    Args:
        decoder: its network, tokenizer and special tokens.
        decoding: how it decodes unless it is told otherwise.
        bf16: whether it computes in bf16 (autocast), as a run may have done.
    """

    decoder: Decoder
    decoding: Decoding
    bf16: bool

    def generate(
        self,
        prompts: Sequence[str | Row],
        *,
        temperature: float = 0.0,
        seed: int = 0,
        on_rows: Callable[[int], object] | None = None,
        **decoding: Any,
    ) -> list[Sample]:
        """A completion of each prompt; what is drawn depends on the seed and the prompt's place alone.

        Args:
            prompts: texts, each a user's turn if the tokenizer has a chat template; or rows, to be put into the prompt
                file that the model was loaded with.
            temperature: of the Gumbel-max sample; 0 is greedy.
            seed: at least 0.
            on_rows: is told of each finished batch how many prompts it had.
            decoding: other fields of :class:`~dopsd.sampler.Decoding`. Another ``gen_length`` without ``steps`` keeps
                the tokens a step.

        Raises:
            UsageError: a field that there is not, or a value that can't be used.
            RunError: a prompt that does not fit the model's context.
        """
        require(not isinstance(prompts, str | Mapping), "prompts", prompts, "it is one prompt: give a list")
        known = [f.name for f in fields(Decoding)]
        for name in decoding:
            if name not in known:
                raise UsageError(f"unknown option {name!r}{did_you_mean(name, known)}")
        if "gen_length" in decoding and "steps" not in decoding:
            rate = self.decoding.gen_length / self.decoding.total_steps
            decoding["steps"] = max(1, round(decoding["gen_length"] / rate))
        how = replace(self.decoding, **decoding, temperature=temperature)
        check_decoding(self.decoder.model, how)
        decoder, rows = self.asked(prompts)
        decoder.check_lengths(map(decoder.prompt_ids, rows), how.gen_length)
        seeds = mix_seeds(seed, torch.arange(len(prompts)))
        with torch.autocast(self.decoder.model.device.type, torch.bfloat16, enabled=self.bf16):
            rollouts = decoder.once(rows, how, seeds, on_rows=on_rows)
        return [Sample(rollout.response, rollout.trajectory) for rollout in rollouts]

    def asked(self, prompts: Sequence[str | Row]) -> tuple[Decoder, list[Row]]:
        """Prompts as rows, and what decodes them: texts as they are, rows by the prompt file."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        rows = [prompt for prompt in prompts if not isinstance(prompt, str)]
        if not rows:
            return replace(self.decoder, prompt_file=None), [{"prompt": text} for text in texts]
        require(not texts, "prompts", texts, "the others are rows")
        prompt_file = self.decoder.prompt_file
        if prompt_file is None:
            raise UsageError("prompts are rows, and the model has no prompt_file to put them into: give texts")
        prompt_file.check(self.decoder.task, rows)
        return self.decoder, rows


class Ungraded(Task):
    """Prompts as they are."""

    def problems(self, split: str, count: int, seed: int = 0) -> list[Row]:
        return []

    def read(self, path: Path) -> list[Row]:
        return []

    def prompt(self, row: Row) -> str:
        return row["prompt"]

    def reference_prompt(self, row: Row) -> str:
        return row["prompt"]

    def score(self, row: Row, response: str) -> float:
        return 0.0


def named(source: str) -> dict[str, Any]:
    """A model's folder or hub id as the option ``model``, and an adapter's folder, such as a run's, as ``adapter``."""
    return {"model" if recorded(Path(source)) is None else "adapter": source}


def load(source: str, **options: Any) -> Model:
    """The model that :func:`dopsd.load` gives."""
    said = recorded(Path(source))
    about = {} if said is None else some(said.model, *(f.name for f in fields(LoadArguments)))
    about |= {} if said is None else some(said.task, "prompt_file", "prefill")
    args, prompts = parse_load(**{**about, **named(source), **options})
    network, tokenizer = load_model(**args.loading())
    if args.adapter is not None:
        load_adapter(network, args.adapter, trainable=False)
    if torch.accelerator.is_available() and args.quantize == "none":
        torch.nn.Module.to(network, torch.accelerator.current_accelerator())
    if said is not None and said.rollout:
        rollouts = RolloutArguments(**some(said.rollout, *(f.name for f in fields(RolloutArguments))))
    else:
        rollouts = parse_train(model=args.model)[2]
    task = Ungraded()
    decoder = Decoder.of(network.eval(), tokenizer, task, rollouts.sequences_per_forward, **prompts.asking(task, []))
    return Model(decoder, rollouts.decoding(), said is not None and bool(said.training.get("bf16")))
