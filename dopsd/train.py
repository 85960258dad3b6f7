"""``python -m dopsd.train``: on-policy self-distillation from a recipe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import set_seed

from dopsd import cli, report
from dopsd.config import parse_train
from dopsd.models import load_model
from dopsd.rollout import Decoder
from dopsd.tasks import load_task
from dopsd.trainer import Trainer, with_adapter


def main(argv: Sequence[str]) -> None:
    """Parse, build, train, report."""
    start = time.monotonic()
    model_arguments, task_arguments, rollouts, teaching, args = parse_train(argv)
    (args.output_dir,) = broadcast_object_list([args.output_dir])
    output = Path(args.output_dir)
    config = report.configuration(model_arguments, task_arguments, rollouts, teaching, args)
    checkpoint = report.check_folder(output, config, args.resume_from_checkpoint)

    set_seed(args.seed)
    task = load_task(task_arguments.task, task_arguments.grading)
    rows = cli.splits(task, task_arguments)
    base, tokenizer = load_model(**model_arguments.loading())
    decoder = Decoder(
        base, tokenizer, task, base.config.mask_token_id, tokenizer.eos_token_id, rollouts.sequences_per_forward
    )
    for part in rows.values():
        cli.check_lengths(decoder, [task.prompt(row) for row in part], rollouts.gen_length)
    if teaching.teacher_context == "reference":
        cli.check_lengths(decoder, [task.reference_prompt(row) for row in rows["train"]], rollouts.gen_length)
    trainer = Trainer(
        with_adapter(base, model_arguments),
        args,
        model_arguments,
        rollouts,
        teaching,
        decoder,
        rows["train"],
        rows["validation"],
        processing_class=tokenizer,
    )
    # Only now is anything written: a run that can't start leaves no folder in the way of the next.
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        report.claim(output, config)
    trainer.add_callback(report.Metrics(output))
    report.start(trainer, config, len(rows["test"]))

    before = report.held_out(trainer, rows["test"], "before", output)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.bar.close()
    trainer.save_adapter(output)
    after = report.held_out(trainer, rows["test"], "after", output)
    report.finish(trainer, output, config, before, after, time.monotonic() - start)
    # A process that left before the first has written its report could abort, and the launcher would end the others.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    cli.run(main)
