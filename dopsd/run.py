"""A training run: from its options to what is in its folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import set_seed

from dopsd import checkpoints, cli, model_card, report
from dopsd.commands import parse_train
from dopsd.config import (
    ModelArguments,
    RolloutArguments,
    TaskArguments,
    TeachingArguments,
    TrainingArguments,
)
from dopsd.interruption import Interruption
from dopsd.models import adapter_files, check_model, load_model
from dopsd.ranks import Ranks, meet, on_first_process
from dopsd.rollout import Decoder, Row
from dopsd.run_folder import RunFolder
from dopsd.tasks import load_task
from dopsd.trackers import require_trackers
from dopsd.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run that has finished.

    Args:
        folder: with all that it has left.
        report: what ``report.json`` says: accuracies with their errors, every option, versions, seed.
    """

    folder: Path
    report: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """The folder of the PEFT adapter."""
        return self.folder

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.csv``, each with the figures that it has; ``collapse`` and its action are words."""
        return report.read_metrics(self.folder / report.METRICS_FILE)


def main(argv: Sequence[str]) -> None:
    """``python -m dopsd.train``: parse, run, print what came of it."""
    groups = parse_train(argv)
    done = run(*groups)
    if groups[-1].process_index == 0:
        report.show_result(done.report, done.folder)


def run(
    model_arguments: ModelArguments,
    task_arguments: TaskArguments,
    rollouts: RolloutArguments,
    teaching: TeachingArguments,
    args: TrainingArguments,
) -> Run:
    """Build, train, report, publish; what an earlier start has done already is not done again."""
    start = time.monotonic()
    groups = model_arguments, task_arguments, rollouts, teaching, args
    silence = timedelta(seconds=args.ddp_timeout)
    with Interruption() as interruption, Ranks(silence, lambda: left(args, interruption)):
        output = Path(on_first_process(lambda: args.output_dir or "."))
        args.output_dir = str(output)
        config = report.configuration(*groups)
        hub = on_first_process(lambda: model_card.repository(args)) if args.push_to_hub else None
        args.push_to_hub = False  # the Trainer would publish checkpoints
        with RunFolder(output, config) as folder:
            checkpoint, result = on_first_process(lambda: folder.open(args.resume_from_checkpoint))
            if result is None:
                trainer, test = build(*groups)
                # Only now is anything written: a run that can't start leaves no folder in the way of the next.
                meet()
                on_first_process(folder.claim)
                if (prompt_file := trainer.method.decoder.prompt_file) is not None:
                    on_first_process(partial(prompt_file.keep, output))
                interruption.advice = "the same command with --resume_from_checkpoint true goes on"
                trainer.add_callback(report.Metrics(output))
                trainer.add_callback(interruption)
                report.start(trainer, config, len(test))

                before = report.held_out(trainer, test, "before", output)
                meet()  # the first draws a trajectory
                if checkpoint is not None and checkpoints.has_ended(Path(checkpoint)):
                    trainer.restore(checkpoint)
                else:
                    try:
                        trainer.train(resume_from_checkpoint=checkpoint)
                    finally:
                        trainer.bar.close()
                    meet()  # what was agreed ends all at the same place
                    interruption.stop(f" behind update {trainer.state.global_step} of {trainer.state.max_steps}")
                adapter = trainer.save_adapter(output)
                after = report.held_out(trainer, test, "after", output, adapter)
                result = report.finish(trainer, output, config, adapter, before, after, time.monotonic() - start)
            elif args.process_index == 0:
                log.info("the run in %s has finished: nothing is left to do", output)
            if hub is not None:
                on_first_process(lambda: hub.publish(output))
            # A process that left before the first has written its report could abort, and the launcher end the others.
            meet()
    PartialState().destroy_process_group()
    return Run(output, result)


def left(args: TrainingArguments, interruption: Interruption) -> str:
    """What a run on several processes leaves, and how it goes on, when one of them is gone."""
    return f"{checkpoints.unharmed(Path(args.output_dir or '.'))}; {interruption.advice}"


def build(
    model_arguments: ModelArguments,
    task_arguments: TaskArguments,
    rollouts: RolloutArguments,
    teaching: TeachingArguments,
    args: TrainingArguments,
) -> tuple[Trainer, list[Row]]:
    """The Trainer, and the rows that it is tested on; nothing is written."""
    require_trackers(args.report_to or ())
    set_seed(args.seed)
    task = load_task(task_arguments.task, task_arguments.grading)
    check_model(model_arguments.model)
    if model_arguments.adapter is not None:
        adapter_files(model_arguments.adapter)
    rows = cli.splits(task, task_arguments)
    asking = task_arguments.asking(task, [row for part in rows.values() for row in part])
    base, tokenizer = load_model(**model_arguments.loading())
    decoder = Decoder.of(base, tokenizer, task, rollouts.sequences_per_forward, **asking)
    for part in rows.values():
        decoder.check_lengths(map(decoder.prompt_ids, part), rollouts.gen_length)
    trainer = Trainer(
        model_arguments.student(base),
        args,
        model_arguments,
        rollouts,
        teaching,
        decoder,
        rows["train"],
        rows["validation"],
        processing_class=tokenizer,
    )
    return trainer, rows["test"]
