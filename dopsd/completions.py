"""What ``python -m dopsd.sample`` prints: completions, and how they were decoded."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from dopsd.commands import parse_sample
from dopsd.config import SampleArguments
from dopsd.errors import must_be
from dopsd.generate import Sample, load
from dopsd.rollout import Decoder

log = logging.getLogger(__name__)

MASKED, END = "·", "∎"
# Seconds that a step stays on a terminal.
PAUSE = 0.08


def main(argv: Sequence[str]) -> None:
    """Parse, generate, print."""
    args = parse_sample(argv)
    prompts = prompts_of(args)
    options = {name: value for name, value in args.loading().items() if name != "model"}
    options |= {name: value for name in ("adapter", "prefill") if (value := getattr(args, name)) is not None}
    model = load(args.model, **options)
    samples = model.generate(prompts, temperature=args.temperature, seed=args.seed, **args.decoding())
    for prompt, sample in zip(prompts, samples, strict=True):
        if len(prompts) > 1 or args.show:
            log.info("%s", prompt)
        if args.show:
            draw(sample, model.decoder)
        log.info("%s", sample.text)


def prompts_of(args: SampleArguments) -> list[str]:
    """The prompts of the command line and of the file."""
    path = Path(args.prompt_lines or "")
    must_be(args.prompt_lines is None or path.is_file(), "prompt_lines", args.prompt_lines, "a text file")
    lines = [] if args.prompt_lines is None else path.read_text(encoding="utf-8").splitlines()
    return [*args.prompt, *filter(str.strip, lines)]


def frames(sample: Sample, decoder: Decoder) -> list[list[tuple[str, bool]]]:
    """Each step's tokens as texts, and which of them it has revealed."""
    trajectory = sample.trajectory
    texts = [
        END if token == decoder.eos_id else decoder.tokenizer.decode([token]).replace("\n", "⏎")
        for token in trajectory.tokens.tolist()
    ]
    reveal = trajectory.reveal_step.tolist()
    return [
        [(text if at <= step else MASKED, at == step) for text, at in zip(texts, reveal, strict=True)]
        for step in range(trajectory.num_steps)
    ]


def draw(sample: Sample, decoder: Decoder) -> None:
    """The states of a decoding: in one place on a terminal, else a line each."""
    steps = frames(sample, decoder)
    if not sys.stdout.isatty() or find_spec("rich") is None:
        for number, tokens in enumerate(steps, 1):
            log.info("%3d %s", number, "".join(text for text, _ in tokens))
        return
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False) as live:
        for number, tokens in enumerate(steps, 1):
            line = Text.assemble(*((text, "bold reverse" if new else "") for text, new in tokens))
            live.update(Text(f"{number:3d} ").append_text(line), refresh=True)
            time.sleep(PAUSE)
