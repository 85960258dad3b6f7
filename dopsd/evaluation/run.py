"""An evaluation from its options to its files: loading, decoding, collecting."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from dopsd import cli, files
from dopsd.errors import must_be, require
from dopsd.evaluation import compare, journal
from dopsd.evaluation.accuracy import is_grade
from dopsd.evaluation.decoding import decode_all
from dopsd.evaluation.journal import Journal
from dopsd.evaluation.options import EvaluationArguments
from dopsd.evaluation.published import POSED
from dopsd.evaluation.results import markdown, result
from dopsd.evaluation.settings import Setting, hashed, identity, measures, plan, revealed, sentence, taken
from dopsd.interruption import Interruption
from dopsd.models import adapter_files, check_model, load_adapter, load_model
from dopsd.ranks import Ranks, gather, join, meet, on_first_process
from dopsd.rollout import Decoder, Rollout
from dopsd.sampler import Decoding, check_decoding
from dopsd.tasks import Row, Task, load_task
from dopsd.trajectory import Trajectory
from dopsd.versions import versions

log = logging.getLogger(__name__)

# After which a process of several that nothing has been heard of is given up.
SILENCE = timedelta(minutes=10)


def evaluate(args: EvaluationArguments) -> dict[str, Any] | None:
    """Decode every setting, this process's share of it, and write what ``args.output`` names.

    A run that was stopped goes on from its journal, beside the output.

    Returns:
        what the JSON file holds, or would hold; None on all processes but the first.

    Raises:
        UsageError, RunError: as the options, the model's files or the journal are at fault; nothing was written then.
    """
    output = None if args.output is None else Path(args.output)
    folder = None if output is None else output.with_name(f"{output.name}.partial")
    if output is not None and folder is not None:
        check_output(output, args, unfinished=folder.exists())
    process = join(not torch.accelerator.is_available(), None, SILENCE)
    advice = "the same command starts again" if folder is None else "what is decoded is kept: the same command goes on"
    with Interruption(advice), Ranks(SILENCE, lambda: advice):
        content = decode(args, folder, process)
        if content is not None and output is not None and folder is not None:
            files.write_text(output.with_suffix(".md"), markdown(content["results"], [sentence(args)]))
            files.write_json(output, content)
            journal.remove(folder)
        # A process that left before the first has written its results could abort, and the launcher end the others.
        meet()
    process.destroy_process_group()
    return content


def decode(args: EvaluationArguments, folder: Path | None, process: PartialState) -> dict[str, Any] | None:
    """Decode every setting, this process's share of it, into the journal in ``folder``; the first collects results."""
    said = taken(args)
    if said is not None and process.is_main_process:
        log.info(said)
    # What takes no time to find out comes before what fetches datasets.
    check_model(args.model)
    if args.adapter is not None:
        adapter_files(args.adapter)
    tasks = {name: load_task(name, args.grading) for name in args.task}
    rows = {name: problems(task, args) for name, task in tasks.items()}
    asking = {name: args.asking(task, rows[name]) for name, task in tasks.items()}
    model, tokenizer = load_model(**args.loading())
    if args.adapter is not None:
        load_adapter(model, args.adapter, trainable=False)
    nn.Module.to(model, process.device)
    decoders = {
        name: Decoder.of(model, tokenizer, task, args.sequences_per_forward, **asking[name])
        for name, task in tasks.items()
    }
    for _, decoding in plan(args, decoders):
        check_decoding(model, decoding)
    for name, decoder in decoders.items():
        decoder.check_lengths(map(decoder.prompt_ids, rows[name]), max(args.lengths(decoder.task)))

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
    if not process.is_main_process:
        return None
    return {
        "results": collect(args, decoders, rows, entries),
        "versions": versions(),
        "config": {"evaluation": vars(args)},
        "seed": args.seed,
        "device": device_name(process.device),
        "processes": process.num_processes,
    }


def check_output(output: Path, args: EvaluationArguments, unfinished: bool = False) -> None:
    """Raise :class:`~dopsd.errors.UsageError` unless results can be written to ``output``, beside what is read.

    What is there already is written over with ``--overwrite`` alone, or by the run that left it ``unfinished``.
    """
    must_be(output.suffix == ".json" and not output.is_dir(), "output", str(output), "a file name that ends in .json")
    require(output.parent.is_dir(), "output", str(output), f"{output.parent} is no folder to write to")
    require(os.access(output.parent, os.W_OK), "output", str(output), f"{output.parent} can't be written to")
    read = [] if args.compare is None else [*compare.files_of(args.compare)]
    read += [Path(path) for path in (args.test_file, args.prompt_file) if path is not None]
    for path in filter(Path.exists, read):
        for written in (output, output.with_suffix(".md")):
            same = written.exists() and written.samefile(path)
            require(not same, "output", str(output), f"{written} is {path}, which is read")
    free = args.overwrite or unfinished or not output.exists()
    require(free, "output", str(output), "it exists; --overwrite replaces it")


def claim(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make ``folder`` this run's, without what it holds if that is to be overwritten."""
    if overwrite:
        journal.remove(folder)
    journal.claim(folder, settings)


def problems(task: Task, args: EvaluationArguments) -> list[Row]:
    """The rows to evaluate a task on."""
    count = task.eval_problems if args.eval_problems is None else args.eval_problems
    rows = cli.problems(task, "test", args.test_file, count)
    return rows if args.eval_problems is None else rows[:count]


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
    if entry["row"] != dict(rows[task][index]):
        raise ValueError(f"row {index} is another")
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
    posed = {name: value for name, value in vars(args).items() if name in POSED}
    results = []
    for setting, decoding in plan(args, decoders):
        decoder, revealing = decoders[setting.task], list(map(revealed, args.reveal))
        for measure in measures(args):
            keys = [(*setting, measure, index) for index in range(len(rows[setting.task]))]
            found = [entries[key] for key in keys]
            rollouts = [Rollout.from_json(entry) for entry in found]
            seconds = round(sum(entry["seconds"] for entry in found), 1)
            if measure not in revealing:
                right = [rollout.score >= 1 for rollout in rollouts]  # in the end, by the best of all tries
            solved = right if measure in revealing else None
            how = (setting, decoding.block_length, measure, decoder.task)
            results.append(result(*how, rollouts, decoder.eos_id, seconds, posed, solved))
    return results


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
