"""``python -m dopsd.evaluate``: accuracy of a model or adapter, and what its own future is worth to it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm.auto import tqdm

from dopsd import cli, compare, files, journal, report
from dopsd.accuracy import is_grade
from dopsd.config import EvaluationArguments, parse_evaluate
from dopsd.errors import must_be, require
from dopsd.interruption import Interruption
from dopsd.journal import Journal
from dopsd.models import adapter_files, check_model, load_adapter, load_model, require_layers
from dopsd.ranks import Ranks, gather, join, meet, on_first_process
from dopsd.results import Setting, columns, label, markdown, result
from dopsd.rollout import Decoder, Rollout, Row
from dopsd.sampler import Decoding, mix_seeds
from dopsd.tables import show
from dopsd.tasks import Task, load_task
from dopsd.trajectory import Trajectory

# Options that may differ between a run and its continuation: what a response is does not depend on them.
FREE = ("output", "overwrite", "compare", "sequences_per_forward")
# After which a process of several that nothing has been heard of is given up.
SILENCE = timedelta(minutes=10)
SAMPLE = 64


def main(argv: Sequence[str]) -> None:
    """Parse, build, decode every setting, print a table and write the responses; or compare two such files."""
    start = time.monotonic()
    args = parse_evaluate(argv)
    output = None if args.output is None else Path(args.output)
    if output is not None:
        check_output(output, args)
    folder = None if output is None or args.compare is not None else output.with_name(f"{output.name}.partial")
    taken = output is not None and output.exists() and not (folder is not None and folder.exists())
    require(args.overwrite or not taken, "output", args.output, "it exists; --overwrite replaces it")
    if args.compare is not None:
        first, second = map(Path, args.compare)
        compare.main(first, second, output)
        return

    process = join(not torch.accelerator.is_available(), None, SILENCE)
    advice = "the same command starts again" if folder is None else "what is decoded is kept: the same command goes on"
    with Interruption(advice), Ranks(SILENCE, lambda: advice):
        evaluate(args, output, folder, process, start)
    process.destroy_process_group()


def evaluate(
    args: EvaluationArguments, output: Path | None, folder: Path | None, process: PartialState, start: float
) -> None:
    """Decode every setting, this process's share of it, into the journal in ``folder``; the first writes results."""
    # What takes no time to find out comes before what fetches datasets.
    check_model(args.model)
    if args.adapter is not None:
        adapter_files(args.adapter)
    tasks = {name: load_task(name, args.grading) for name in args.task}
    rows = {name: problems(task, args) for name, task in tasks.items()}
    model, tokenizer = load_model(**args.loading())
    require_layers(model, "cache", args.cache, "off")
    if args.adapter is not None:
        load_adapter(model, args.adapter, trainable=False)
    nn.Module.to(model, process.device)
    decoders = {
        name: Decoder(
            model, tokenizer, task, model.config.mask_token_id, tokenizer.eos_token_id, args.sequences_per_forward
        )
        for name, task in tasks.items()
    }
    for name, task in tasks.items():
        cli.check_lengths(decoders[name], [task.prompt(row) for row in rows[name]], max(args.lengths(task)))

    settings = identity(args, model, rows)
    if folder is not None:
        if not args.overwrite:
            journal.check(folder, settings)
        meet()  # all have looked
        on_first_process(partial(claim, folder, settings, args.overwrite))
    checks = partial(check_entry, settings=list(plan(args, decoders)), args=args, rows=rows)
    kept = Journal(folder, process.process_index, hashed(json.dumps(files.plain(settings)).encode()), checks)
    decode_all(args, decoders, rows, kept, process)
    kept.close()
    entries = {key: entry for part in gather(kept.entries) for key, entry in part.items()}
    if process.is_main_process:
        results = collect(args, decoders, rows, entries)
        if output is not None:
            about = {
                "results": results,
                "versions": report.versions(),
                "config": {"evaluation": vars(args)},
                "seed": args.seed,
                "device": device_name(process.device),
                "processes": process.num_processes,
            }
            text = markdown(results, [sentence(args)])
            files.write_text(output.with_suffix(".md"), text)
            files.write_json(output, about)
        if folder is not None:
            journal.remove(folder)
        show(columns(results), "accuracy (%)", [f"{time.monotonic() - start:.0f} s"])
    # A process that left before the first has written its results could abort, and the launcher would end the others.
    meet()


def claim(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make ``folder`` this run's, without what it holds if that is to be overwritten."""
    if overwrite:
        journal.remove(folder)
    journal.claim(folder, settings)


def check_output(output: Path, args: EvaluationArguments) -> None:
    """Raise :class:`~dopsd.errors.UsageError` unless results can be written to ``output``, beside what is read."""
    must_be(output.suffix == ".json" and not output.is_dir(), "output", str(output), "a file name that ends in .json")
    require(output.parent.is_dir(), "output", str(output), f"{output.parent} is no folder to write to")
    require(os.access(output.parent, os.W_OK), "output", str(output), f"{output.parent} can't be written to")
    for path in filter(os.path.exists, [*(args.compare or []), *([] if args.test_file is None else [args.test_file])]):
        for written in (output, output.with_suffix(".md")):
            same = written.exists() and written.samefile(path)
            require(not same, "output", str(output), f"{written} is {path}, which is read")


def problems(task: Task, args: EvaluationArguments) -> list[Row]:
    """The rows to evaluate a task on."""
    count = task.eval_problems if args.eval_problems is None else args.eval_problems
    rows = cli.problems(task, "test", args.test_file, count)
    return rows if args.eval_problems is None else rows[:count]


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


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def sentence(args: EvaluationArguments) -> str:
    """What was evaluated, in a line."""
    adapter = "" if args.adapter is None else f" with adapter {args.adapter}"
    source = "" if args.test_file is None else f", problems of {args.test_file}"
    cache = "" if args.cache == "off" else f", decoded with cache={args.cache}"
    return f"Model {args.model}{adapter}, seed {args.seed}{source}{cache}."


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


def decode_all(
    args: EvaluationArguments,
    decoders: dict[str, Decoder],
    rows: dict[str, list[Row]],
    kept: Journal,
    process: PartialState,
) -> None:
    """Decode this process's share of every setting's rows into the journal."""
    shares = {name: range(process.process_index, len(some), process.num_processes) for name, some in rows.items()}
    settings = list(plan(args, decoders))
    tries = args.pass_k + len(args.reveal)
    total = sum(tries * len(shares[setting.task]) * work(decoding) for setting, decoding in settings)
    with Progress(total, process.is_main_process) as progress:
        for setting, decoding in settings:
            share = Share(setting, decoding, decoders[setting.task], rows[setting.task], args, kept, progress)
            progress.begin(f"{label(setting._asdict())}, {setting.tokens_per_step} a step", setting.gen_length)
            size = args.sequences_per_forward
            for start in range(0, len(shares[setting.task]), size):
                share.batch(list(shares[setting.task][start : start + size]))


def work(decoding: Decoding) -> int:
    """Positions computed to decode a response: what its time is about proportional to."""
    return decoding.total_steps * decoding.gen_length


class Progress:
    """A bar over the whole of a process's job; its unit is a position computed, so that long responses weigh more."""

    def __init__(self, total: int, show: bool) -> None:
        form = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=total, disable=not show, bar_format=form, smoothing=0)
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
        if skipped:
            self.bar.initial += amount  # not to be counted as fast work
        self.bar.update(self.reached - self.bar.n)

    def show(self, scores: Sequence[float]) -> None:
        """More greedy grades are known."""
        self.scores += scores
        self.bar.set_postfix_str(f"accuracy {100 * sum(self.scores) / len(self.scores):.1f}% so far")


@dataclass(frozen=True)
class Share:
    """A process's share of a setting.

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
        seeds = mix_seeds(self.args.seed, torch.tensor(chosen))
        decoder, decoding, k, on_step = self.decoder, self.decoding, self.args.pass_k, self.progress.step

        greedy = self.measure("greedy", chosen, 1, lambda: decoder.once(rows, decoding, seeds, on_step=on_step))
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
            hints = own_future(best, share, decoder.mask_id, seeds).to(decoder.model.device)
            self.measure(
                revealed(share),
                chosen,
                1,
                lambda hints=hints: decoder.once(rows, decoding, seeds, hints=hints, on_step=on_step),  # type: ignore[misc]
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
            self.kept.add([entry_of({**key, "index": chosen[p]}, rollouts[p], seconds) for p in missing])
        else:
            rollouts = [rollout_of(self.rows[index], entry) for index, entry in zip(chosen, entries, strict=True)]  # type: ignore[arg-type]
        self.progress.end(tries * len(chosen) * work(self.decoding), skipped=not missing)
        return rollouts


def entry_of(key: dict[str, Any], rollout: Rollout, seconds: float) -> journal.Entry:
    """A response as a journal keeps it."""
    return {
        **key,
        "trajectory": rollout.trajectory.to_json(),
        "response": rollout.response,
        "score": rollout.score,
        "tries": rollout.tries,
        "seconds": seconds,
    }


def rollout_of(row: Row, entry: journal.Entry) -> Rollout:
    """The response to ``row`` that a journal has kept."""
    trajectory = Trajectory.from_json(entry["trajectory"])
    return Rollout(row, trajectory, entry["response"], entry["score"], entry["tries"])


def check_entry(
    entry: journal.Entry,
    settings: Sequence[tuple[Setting, Decoding]],
    args: EvaluationArguments,
    rows: dict[str, list[Row]],
) -> None:
    """Raise ValueError, in a clause, unless a journal's ``entry`` can be a response of this run."""
    task, length, rate, measure, index = journal.key_of(entry)
    if Setting(task, length, rate) not in [setting for setting, _ in settings] or measure not in measures(args):
        raise ValueError(f"no {measure} of {task}, {length} tokens and {rate} a step, is measured")
    if type(index) is not int or not 0 <= index < len(rows[task]):
        raise ValueError(f"there is no row {index}")
    if not is_grade(entry["score"]):
        raise ValueError(f"score {entry['score']!r} must be a number from 0 to 1")
    seconds, tries = entry["seconds"], entry["tries"]
    if not isinstance(entry["response"], str) or type(tries) is not int or not 1 <= tries <= args.pass_k:
        raise ValueError(f"response and tries must be a text and a number from 1 to {args.pass_k}")
    if not isinstance(seconds, float) or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds {seconds!r} must be a number of at least 0")
    if len(Trajectory.from_json(entry["trajectory"]).tokens) != length:
        raise ValueError(f"its response has not {length} tokens")


def collect(
    args: EvaluationArguments,
    decoders: dict[str, Decoder],
    rows: dict[str, list[Row]],
    entries: dict[journal.Key, journal.Entry],
) -> list[dict[str, Any]]:
    """The results of every setting and measure."""
    results = []
    for setting, decoding in plan(args, decoders):
        decoder = decoders[setting.task]
        for measure in measures(args):
            keys = [(*setting, measure, index) for index in range(len(rows[setting.task]))]
            found = [entries[key] for key in keys]
            rollouts = [rollout_of(row, entry) for row, entry in zip(rows[setting.task], found, strict=True)]
            seconds = round(sum(entry["seconds"] for entry in found), 1)
            results.append(
                result(setting, decoding.block_length, measure, decoder.task, rollouts, decoder.eos_id, seconds)
            )
    return results


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


if __name__ == "__main__":
    cli.run(main)
