"""Decoding an evaluation's settings into its journal: each process its shard, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from dopsd.console import draws_bars
from dopsd.evaluation.journal import Journal
from dopsd.evaluation.options import EvaluationArguments
from dopsd.evaluation.results import label
from dopsd.evaluation.settings import Setting, plan, revealed, work
from dopsd.rollout import Decoder, Rollout
from dopsd.sampler import Decoding
from dopsd.seeds import EVALUATION, OWN_FUTURE, mix_seeds
from dopsd.tasks import Row


def decode_all(
    args: EvaluationArguments,
    decoders: dict[str, Decoder],
    rows: dict[str, list[Row]],
    kept: Journal,
    process: PartialState,
) -> None:
    """Decode this process's shard of every setting's rows into the journal."""
    shards = {name: range(process.process_index, len(some), process.num_processes) for name, some in rows.items()}
    settings = list(plan(args, decoders))
    tries = args.pass_k + len(args.reveal)
    total = sum(tries * len(shards[setting.task]) * work(decoding) for setting, decoding in settings)
    autocast = torch.autocast(process.device.type, torch.bfloat16, enabled=args.bf16)
    with Progress(total, process.is_main_process) as progress, autocast:
        for setting, decoding in settings:
            shard = Shard(setting, decoding, decoders[setting.task], rows[setting.task], args, kept, progress)
            progress.begin(f"{label(setting._asdict())}, {setting.tokens_per_step:g} a step", setting.gen_length)
            size = args.sequences_per_forward
            for start in range(0, len(shards[setting.task]), size):
                shard.batch(list(shards[setting.task][start : start + size]))


class Progress:
    """A bar over the whole of a process's job; its unit is a position computed, so that long responses weigh more."""

    def __init__(self, total: int, show: bool) -> None:
        form = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=total, disable=not (show and draws_bars()), bar_format=form, smoothing=0)
        self.reached = self.length = 0
        self.scores: list[float] = []

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def begin(self, title: str, length: int) -> None:
        """A setting starts, with responses of ``length`` tokens."""
        self.scores, self.length = [], length
        self.bar.set_description(title)

    def step(self, going: int) -> None:
        """A denoising step of so many responses was done."""
        self.bar.update(going * self.length)

    def end(self, amount: int, skipped: bool) -> None:
        """A batch of ``amount`` positions is done: not all were computed, and none if it was ``skipped``."""
        self.reached += amount
        if skipped and not self.bar.disable:
            self.bar.initial += amount  # not to be counted as fast work
        self.bar.update(self.reached - self.bar.n)

    def show(self, scores: Sequence[float]) -> None:
        """More greedy grades are known."""
        self.scores += scores
        self.bar.set_postfix_str(f"accuracy {100 * sum(self.scores) / len(self.scores):.1f}% so far")


@dataclass(frozen=True)
class Shard:
    """What a process decodes of a setting.

    Args:
        setting: what is decoded.
        decoding: and how.
        decoder: decodes and grades.
        rows: all of the task's rows.
        args: tries, shares to reveal, seed.
        kept: where responses go; what it has already is not decoded again.
        progress: is told.
    """

    setting: Setting
    decoding: Decoding
    decoder: Decoder
    rows: Sequence[Row]
    args: EvaluationArguments
    kept: Journal
    progress: Progress

    def batch(self, chosen: list[int]) -> None:
        """Every measure of the rows ``chosen``. What is drawn for a row depends on its index and the seed alone."""
        rows = [self.rows[index] for index in chosen]
        indices = torch.tensor(chosen)
        seeds = mix_seeds(self.args.seed, indices)
        own = mix_seeds(self.args.seed, EVALUATION, indices)  # as a training run grades its held-out problems
        decoder, decoding, k, on_step = self.decoder, self.decoding, self.args.pass_k, self.progress.step

        greedy = self.measure("greedy", chosen, 1, lambda: decoder.once(rows, decoding, own, on_step=on_step))
        self.progress.show([rollout.score for rollout in greedy])
        best = greedy
        if k > 1:
            best = self.measure(
                f"pass@{k}",
                chosen,
                k - 1,
                lambda: decoder.retry(greedy, decoding, seeds, k, self.args.temperature, on_step=on_step),
            )
        for share in self.args.reveal:
            hints = own_future(best, share, seeds, mask_id=decoder.mask_id, eos_id=decoder.eos_id)
            hints = hints.to(decoder.model.device)
            self.measure(
                revealed(share),
                chosen,
                1,
                lambda hints=hints: decoder.once(rows, decoding, own, hints=hints, on_step=on_step),  # type: ignore[misc]
            )

    def measure(
        self, measure: str, chosen: list[int], tries: int, decode: Callable[[], list[Rollout]]
    ) -> list[Rollout]:
        """A response to each row ``chosen``: from the journal if it has all of them, else by ``decode``."""
        entries = [self.kept.entries.get((*self.setting, measure, index)) for index in chosen]
        missing = [place for place, entry in enumerate(entries) if entry is None]
        if missing:
            start = time.monotonic()
            rollouts = decode()  # the whole batch, so that its sums are rounded as they would have been
            seconds = (time.monotonic() - start) / len(chosen)
            key = {**self.setting._asdict(), "measure": measure}
            self.kept.add([{**key, "index": chosen[p], **rollouts[p].to_json(), "seconds": seconds} for p in missing])
        else:
            rollouts = [Rollout.from_json(entry) for entry in entries if entry is not None]
        self.progress.end(tries * len(chosen) * work(self.decoding), skipped=not missing)
        return rollouts


def own_future(
    rollouts: Sequence[Rollout],
    share: float,
    seeds: Tensor,  # (N,) int64
    *,
    mask_id: int,
    eos_id: int,
) -> Tensor:  # (N, L) int64
    """Hints: a random ``share`` of the tokens of each correct response's text, which ends before the first end-of-text;
    ``mask_id`` elsewhere, and where no response was correct."""
    hints = []
    for rollout, seed in zip(rollouts, seeds, strict=True):
        tokens = rollout.trajectory.tokens
        generator = torch.Generator().manual_seed(int(mix_seeds(seed, OWN_FUTURE)))
        length = rollout.trajectory.text_length(eos_id)
        drawn = torch.randperm(length, generator=generator)[: round(share * length)]
        hint = torch.full_like(tokens, mask_id)
        if rollout.score >= 1:
            hint[drawn] = tokens[drawn]
        hints.append(hint)
    return torch.stack(hints)
