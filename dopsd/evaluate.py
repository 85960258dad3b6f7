"""``python -m dopsd.evaluate``: accuracy of a model or adapter, and what its own future is worth to it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm

from dopsd import cli, report
from dopsd.config import parse_evaluate
from dopsd.errors import require
from dopsd.models import load_adapter, load_model
from dopsd.rollout import Decoder, Rollout, standard_error
from dopsd.sampler import mix_seeds
from dopsd.tasks import load_task


def main(argv: Sequence[str]) -> None:
    """Parse, build, decode every setting, print a table and write the responses."""
    start = time.monotonic()
    args = parse_evaluate(argv)
    if args.output is not None:
        folder = Path(args.output).parent
        require(folder.is_dir(), "output", args.output, f"{folder} is no folder to write to")
    task = load_task(args.task)
    rows = cli.problems(task, "test", args.test_file, args.eval_problems)[: args.eval_problems]
    model, tokenizer = load_model(args.model, args.dtype)
    if args.adapter is not None:
        load_adapter(model, args.adapter, trainable=False)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    nn.Module.to(model, device)
    decoder = Decoder(
        model, tokenizer, task, model.config.mask_token_id, tokenizer.eos_token_id, args.sequences_per_forward
    )
    cli.check_lengths(decoder, [task.prompt(row) for row in rows], max(args.gen_length))
    seeds = mix_seeds(args.seed, torch.arange(len(rows)))
    results: list[dict[str, Any]] = []

    def add(length: int, rate: int, measure: str, rollouts: Sequence[Rollout]) -> None:
        scores = [rollout.score for rollout in rollouts]
        results.append(
            {
                "gen_length": length,
                "tokens_per_step": rate,
                "measure": measure,
                "problems": len(scores),
                "accuracy": sum(scores) / len(scores),
                "standard_error": standard_error(scores),
                "responses": [report.response(rollout) for rollout in rollouts],
            }
        )

    for length in args.gen_length:
        for rate in args.tokens_per_step:
            decoding = args.decoding(length, rate)
            label = f"{length} tokens, {rate} a step"
            with tqdm(total=len(rows) * (1 + len(args.reveal)), desc=label, unit="response") as bar:
                greedy = decoder.once(rows, decoding, seeds, on_rows=bar.update)
                add(length, rate, "greedy", greedy)
                best = decoder.retry(greedy, decoding, seeds, args.pass_k, args.temperature)
                if args.pass_k > 1:
                    add(length, rate, f"pass@{args.pass_k}", best)
                for share in args.reveal:
                    hints = own_future(best, share, decoder.mask_id, seeds).to(model.device)
                    shown = decoder.once(rows, decoding, seeds, hints=hints, on_rows=bar.update)
                    add(length, rate, f"{share:.0%} of its own correct answer revealed", shown)
    if args.output is not None:
        config = {"evaluation": vars(args)}
        report.write_json(Path(args.output), {"results": results, "versions": report.versions(), "config": config})
    print_table(results, time.monotonic() - start)


def own_future(rollouts: Sequence[Rollout], share: float, mask_id: int, seeds: Tensor) -> Tensor:
    """(N, L) hints: a random ``share`` of each correct response's tokens; none where no response was correct."""
    hints = []
    for rollout, seed in zip(rollouts, seeds, strict=True):
        tokens = rollout.trajectory.tokens
        generator = torch.Generator().manual_seed(int(mix_seeds(seed, 3)))
        drawn = torch.randperm(len(tokens), generator=generator)[: round(share * len(tokens))]
        hint = torch.full_like(tokens, mask_id)
        if rollout.score >= 1:
            hint[drawn] = tokens[drawn]
        hints.append(hint)
    return torch.stack(hints)


def print_table(results: Sequence[dict[str, Any]], seconds: float) -> None:
    """The results as a table on standard output."""
    table = Table(title="accuracy (%)")
    for name in ("length", "tokens a step", "measure", "accuracy", "problems"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for row in results:
        accuracy = f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f}"
        table.add_row(
            str(row["gen_length"]), str(row["tokens_per_step"]), row["measure"], accuracy, str(row["problems"])
        )
    console = Console()
    console.print(table)
    console.print(f"{seconds:.0f} s")


if __name__ == "__main__":
    cli.run(main)
