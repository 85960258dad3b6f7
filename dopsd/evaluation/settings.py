"""What an evaluation measures, in which order, and what makes two evaluations the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dopsd import files
from dopsd.config import DecodingArguments
from dopsd.evaluation.options import EvaluationArguments, evaluation_options
from dopsd.models import adapter_files
from dopsd.recorded import recorded
from dopsd.rollout import Decoder
from dopsd.sampler import Decoding
from dopsd.tasks import Row

# Options that may differ between a run and its continuation: what a response is does not depend on them.
FREE = ("output", "overwrite", "compare", "sequences_per_forward")
# Values of each parameter that tell two models apart.
SAMPLE = 64


class Setting(NamedTuple):
    """One way of decoding a task."""

    task: str
    gen_length: int
    tokens_per_step: float


def measures(args: EvaluationArguments) -> list[str]:
    """What is measured in each setting, in order."""
    tries = [f"pass@{args.pass_k}"] if args.pass_k > 1 else []
    return ["greedy", *tries, *map(revealed, args.reveal)]


def revealed(share: float) -> str:
    """The name of the measure that reveals a share."""
    return f"{100 * share:g}% of its own correct answer revealed"


def plan(args: EvaluationArguments, decoders: dict[str, Decoder]) -> Iterator[tuple[Setting, Decoding]]:
    """Every setting and how it is decoded."""
    for name, decoder in decoders.items():
        for length in args.lengths(decoder.task):
            for rate in args.tokens_per_step:
                yield Setting(name, length, rate), args.decoding(decoder.task, length, rate)


def work(decoding: Decoding) -> int:
    """Positions computed to decode a response: what its time is about proportional to."""
    return decoding.total_steps * decoding.gen_length


def identity(args: EvaluationArguments, model: nn.Module, rows: dict[str, list[Row]]) -> dict[str, Any]:
    """What makes two runs the same: options, weights, adapter and problems, all but the first as hashes."""
    options = {name: value for name, value in vars(args).items() if name not in FREE}
    hashes = {f"problems of {name}": hashed(json.dumps(some).encode()) for name, some in rows.items()}
    if args.adapter is not None:
        hashes["adapter's files"] = hashed(*(files.sha256(path).encode() for path in adapter_files(args.adapter)))
    return {**options, "weights": hashed(*samples(model)), **hashes}


def hashed(*parts: bytes) -> str:
    """A short hash."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def samples(model: nn.Module) -> Iterator[bytes]:
    """Name, kind and a few values of each parameter: enough to tell two models apart without reading all of them."""
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // SAMPLE)]
        yield f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode()
        yield values.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def sentence(args: EvaluationArguments) -> str:
    """What was evaluated, in a line."""
    adapter = "" if args.adapter is None else f" with adapter {args.adapter}"
    source = "" if args.test_file is None else f", problems of {args.test_file}"
    source += "" if args.prompt_file is None else f", prompts of {args.prompt_file}"
    source += f", responses from {args.prefill!r} on" if args.prefill else ""
    plain = DecodingArguments().sampling() | {"bf16": False}
    other = [f"{name}={getattr(args, name)}" for name, value in plain.items() if getattr(args, name) != value]
    decoding = f", decoded with {', '.join(other)}" if other else ""
    return f"Model {args.model}{adapter}, seed {args.seed}{source}{decoding}."


def taken(args: EvaluationArguments) -> str | None:
    """Which options are as the adapter's folder has them, and not as they are by default, in a line; None: none is."""
    found = None if args.adapter is None else recorded(Path(args.adapter))
    options = {} if found is None else evaluation_options(found, args.model, args.task)
    plain = vars(EvaluationArguments()) | {"model": None, "task": None}
    same = [name for name, value in options.items() if plain[name] != value == getattr(args, name)]
    said = [f"{name}={getattr(args, name)}" for name in same]
    return f"as in {found.file}: {', '.join(said)}" if found is not None and said else None
