"""What a run leaves behind: its configuration, metrics, pictures and report."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dopsd.accuracy import difference, summary
from dopsd.errors import RunError, require
from dopsd.files import plain, write_json
from dopsd.memory import gib
from dopsd.plots import TrajectoryTrace, plot_curves, plot_trajectory, why_no_picture
from dopsd.rollout import Rollout, Row
from dopsd.step_batch import step_batches
from dopsd.tables import show
from dopsd.trainer import Trainer

RUN_FILE = "run.json"
PICTURES = ("curves.png", "trajectory.png")
PACKAGES = ("dopsd", "torch", "transformers", "peft", "accelerate", "triton", "numpy")

# transformers options that may differ between a run and its continuation.
FREE = {"resume_from_checkpoint", "output_dir", "logging_dir", "disable_tqdm", "report_to", "run_name"}


def configuration(model: Any, task: Any, rollouts: Any, teaching: Any, args: Any) -> dict[str, Any]:
    """Every option of a run, by group."""
    groups = {"model": model, "task": task, "rollout": rollouts, "teaching": teaching}
    return json.loads(
        json.dumps({**{name: asdict(group) for name, group in groups.items()}, "training": args.to_dict()}, default=str)
    )


def check_folder(output: Path, config: Mapping[str, Any], resume: str | None) -> str | None:
    """Whether ``output`` can be this run's folder; returns the checkpoint to go on from, if any, and writes nothing.

    Raises:
        UsageError: the folder holds something else, or a run with other options.
        RunError: the checkpoint to resume from is incomplete.
    """
    run_file = output / RUN_FILE
    if resume is None or resume.lower() == "false":
        empty = not output.exists() or (output.is_dir() and not any(output.iterdir()))
        hint = "an empty or new folder; a run in it goes on with --resume_from_checkpoint true"
        require(empty, "output_dir", str(output), hint)
        return None
    require(run_file.is_file(), "resume_from_checkpoint", resume, f"{output} holds no run to go on with")
    for group, options in json.loads(run_file.read_text()).items():
        for name, value in options.items():
            if name not in FREE:
                same = plain(config[group].get(name)) == value
                require(same, name, config[group].get(name), f"the run in {output} has {name}={value!r}")
    if resume.lower() != "true":
        if not (Path(resume) / "trainer_state.json").is_file():
            raise RunError(f"resume_from_checkpoint={resume!r} is no complete checkpoint: it has no trainer_state.json")
        return resume
    # The Trainer writes this file last, so a checkpoint that was cut short by a kill does not have it.
    complete = [path.parent for path in output.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def claim(output: Path, config: Mapping[str, Any]) -> None:
    """Make ``output`` this run's folder, unless it is already."""
    output.mkdir(parents=True, exist_ok=True)
    if not (output / RUN_FILE).is_file():
        write_json(output / RUN_FILE, config)


class Metrics(TrainerCallback):
    """Keeps ``metrics.csv`` up to date with the Trainer's log, which survives a resume."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            rows = [row for row in state.log_history if "train_runtime" not in row]
            names = ["step", *sorted({name for row in rows for name in row} - {"step"})]
            with (self.output / "metrics.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, names, restval="")
                writer.writeheader()
                writer.writerows(rows)


def start(trainer: Trainer, config: Mapping[str, Any], problems: int) -> None:
    """Say what is about to run."""
    if trainer.is_world_process_zero():
        total = sum(p.numel() for p in trainer.student.parameters())
        trained = sum(p.numel() for p in trainer.student.parameters() if p.requires_grad)
        print(
            f"{config['model']['model']} on {config['task']['task']}: {total:,} parameters, {trained:,} trained, "
            f"on {trainer.args.device}; {trainer.args.max_steps} updates of "
            f"{trainer.args.train_batch_size * trainer.args.world_size} prompts; {problems} held-out problems; "
            f"writing to {trainer.args.output_dir}"
        )
        if trainer.plan is not None:
            print(f"{trainer.plan}")
            trainer.plan.show()
        if (reason := why_no_picture()) is not None:
            print(f"{' and '.join(PICTURES)} are left out: {reason}")


def held_out(trainer: Trainer, rows: Sequence[Row], moment: str, output: Path) -> dict[str, list[float]]:
    """Scores on held-out rows by tokens per step, the run's own rate first; kept in ``held_out_<moment>.json``.

    A file that is there already, from before a resume, is read instead.
    """
    path = output / f"held_out_{moment}.json"
    if path.is_file():
        return {rate: [one["score"] for one in ones] for rate, ones in json.loads(path.read_text()).items()}
    rollouts = trainer.rollouts
    own = rollouts.decoding()
    decodings = {f"{rollouts.gen_length / own.total_steps:g}": own}
    decodings |= {str(rate): rollouts.decoding(rate) for rate in rollouts.eval_tokens_per_step}
    results = {
        rate: trainer.decode_rows(rows, decoding, f"held out, {moment}, {rate} tokens a step")
        for rate, decoding in decodings.items()
    }
    if trainer.is_world_process_zero():
        eos_id = trainer.decoder.eos_id
        write_json(path, {rate: [response(one, eos_id) for one in ones] for rate, ones in results.items()})
        if moment == "before" and why_no_picture() is None:
            draw_trajectory(trainer, next(iter(results.values())), output / "trajectory.png")
    return {rate: [one.score for one in ones] for rate, ones in results.items()}


def response(rollout: Rollout, eos_id: int) -> dict[str, Any]:
    """A rollout as a JSON object: the row's columns and what became of it, with its length in tokens."""
    return {
        **rollout.row,
        "response": rollout.response,
        "score": rollout.score,
        "tokens": rollout.trajectory.text_length(eos_id),
        "steps": rollout.trajectory.num_steps,
        "tries": rollout.tries,
    }


def draw_trajectory(trainer: Trainer, rollouts: Sequence[Rollout], path: Path) -> None:
    """Picture the first correct rollout: when tokens were revealed, what the teacher saw, where K was, KL per step."""
    rollout = next((one for one in rollouts if one.score >= 1), rollouts[0])
    decoder, objective = trainer.decoder, trainer.objective
    lesson = objective.lesson(rollout, decoder, trainer.args.seed)
    trajectory = rollout.trajectory
    chosen = torch.zeros_like(lesson.reveal)
    step_kl = []
    batches = step_batches(
        [lesson],
        # Without reuse and without a gradient, which takes what decoding does.
        min(trainer.sizes.states_per_forward, trainer.sizes.sequences_per_forward),
        **trainer.collation(),
    )
    done = 0
    trainer.student.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        for batch in batches:
            out = objective.forward(decoder.model, trainer.teacher, batch, decoder.mask_id)
            chosen[done : done + len(batch)].scatter_(1, batch.columns.cpu(), out.chosen.cpu())
            step_kl.append(out.state_kl().float().cpu())
            done += len(batch)
    if done:
        labels = ["∎" if token == decoder.eos_id else decoder.tokenizer.decode([token]) for token in trajectory.tokens]
        title = f"{decoder.task.prompt(rollout.row)}{rollout.response}"
        trace = TrajectoryTrace(trajectory, lesson.steps, lesson.reveal, chosen, torch.cat(step_kl), labels, title)
        plot_trajectory(trace, path)


def finish(
    trainer: Trainer,
    output: Path,
    config: Mapping[str, Any],
    before: Mapping[str, list[float]],
    after: Mapping[str, list[float]],
    seconds: float,
) -> None:
    """Write ``report.json`` and ``curves.png`` and print the result.

    Pictures that can't be drawn here are left out; the report says which and why.
    """
    if not trainer.is_world_process_zero():
        return
    rates = {rate: compare(before[rate], after[rate]) for rate in before}
    own = next(iter(rates.values()))
    memory = (
        None
        if trainer.plan is None
        else {
            **trainer.plan.to_json(),
            "predicted_peak": trainer.predicted_peak,
            "measured_peak": trainer.highest,
        }
    )
    reason = why_no_picture()
    left_out = {} if reason is None else {name: reason for name in PICTURES if not (output / name).exists()}
    write_json(
        output / "report.json",
        {
            **own,
            "eval_problems": len(next(iter(before.values()))),
            "tokens_per_step": rates,
            "updates": trainer.state.global_step,
            "best_checkpoint": trainer.state.best_model_checkpoint,
            "seconds": round(seconds, 1),
            "seed": trainer.args.seed,
            "device": str(trainer.args.device),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "memory": memory,
            "left_out": left_out,
            "config": config,
        },
    )
    if reason is None:
        plot_curves(
            trainer.state.log_history,
            output / "curves.png",
            before=own["accuracy_before"],
            after=own["accuracy_after"],
            before_error=own["standard_error_before"],
            after_error=own["standard_error_after"],
        )
    rows = [
        {
            "tokens per step": rate,
            **{
                moment: f"{100 * row[f'accuracy_{moment}']:{sign}.1f} ± {100 * row[f'standard_error_{moment}']:.1f}"
                for moment, sign in (("before", ""), ("after", ""), ("gain", "+"))
            },
        }
        for rate, row in rates.items()
    ]
    notes = []
    if memory is not None:
        peaks = gib(trainer.predicted_peak), gib(trainer.highest)
        notes.append(f"memory: {peaks[0]} GiB predicted, {peaks[1]} measured in updates")
    files = [name for name in ("report.json", "metrics.csv", *PICTURES) if name not in left_out]
    notes += [f"{name} is left out: {why}" for name, why in left_out.items()]
    notes.append(f"{seconds:.0f} s; in {output}: the adapter, {', '.join(files)}")
    show(rows, f"held-out accuracy, {len(next(iter(before.values())))} problems", notes)


def compare(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Accuracies (mean scores) with standard errors and 95% intervals, and their paired difference."""
    gain = difference(before, after)
    numbers = {"before": summary(before), "after": summary(after), "gain": {**gain, "accuracy": gain["difference"]}}
    return {
        f"{name}_{moment}": one[name]
        for name in ("accuracy", "standard_error", "interval")
        for moment, one in numbers.items()
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a result; None for one that is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
