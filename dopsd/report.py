"""What a run leaves behind: its configuration, metrics, pictures and report."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dopsd import collapse, sharding
from dopsd.checkpoints import number
from dopsd.distillation import Distillation
from dopsd.evaluation.accuracy import difference, summary
from dopsd.files import write_json, write_text
from dopsd.look import FOLDER, keep, label, look
from dopsd.metrics import rows_of
from dopsd.model_card import write_card
from dopsd.plots import TrajectoryTrace, plot_curves, plot_trajectory, why_no_picture
from dopsd.ranks import on_first_process
from dopsd.rollout import Rollout, Row
from dopsd.run_folder import REPORT_FILE
from dopsd.tables import show
from dopsd.trainer import Trainer
from dopsd.units import gib
from dopsd.versions import versions

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.csv"
CURVES, TRAJECTORY = PICTURES = ("curves.png", "trajectory.png")


def configuration(model: Any, task: Any, rollouts: Any, teaching: Any, args: Any) -> dict[str, Any]:
    """Every option of a run, by group."""
    groups = {"model": model, "task": task, "rollout": rollouts, "teaching": teaching}
    options = {name: asdict(group) for name, group in groups.items()}
    options["training"] = {**args.to_dict(), "processes": args.world_size}
    return json.loads(json.dumps(options, default=str))


class Metrics(TrainerCallback):
    """Keeps ``metrics.csv`` up to date with the Trainer's log, which survives a resume."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_metrics(state.log_history, self.output / METRICS_FILE)


def write_metrics(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The Trainer's log as a table."""
    rows = rows_of(log)
    names = ["step", *sorted({name for row in rows for name in row} - {"step"})]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of such a table, each with what it has: numbers, but for the words of a collapse."""
    with path.open(newline="") as file:
        return [
            {name: value if name in collapse.WORDS else float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file, strict=True)
        ]


def start(trainer: Trainer, config: Mapping[str, Any], problems: int) -> None:
    """Log what is about to run."""
    if trainer.is_world_process_zero():
        total, held = sharding.held(trainer.student)
        here = "" if held == total else f", {held:,} of them on this process"
        trained = sum(p.numel() for p in trainer.student.parameters() if p.requires_grad)
        log.info(
            f"{config['model']['model']} on {config['task']['task']}: {total:,} parameters{here}, {trained:,} trained, "
            f"by {config['teaching']['method']} on {trainer.args.device}; {trainer.args.max_steps} updates of "
            f"{trainer.args.train_batch_size * trainer.args.world_size} prompts; {problems} held-out problems; "
            f"writing to {trainer.args.output_dir}"
        )
        if trainer.memory.plan is not None:
            log.info(str(trainer.memory.plan))
            trainer.memory.plan.show()
        if missing := left_out(trainer):
            reason = next(iter(missing.values()))
            log.info(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} left out: {reason}")


def left_out(trainer: Trainer) -> dict[str, str]:
    """The pictures that are not drawn here, each with the one reason."""
    if (reason := why_no_picture()) is not None:
        return dict.fromkeys(PICTURES, reason)
    if not isinstance(trainer.method, Distillation):
        return {TRAJECTORY: f"it shows what a teacher sees with method=d_opsd, and this is {trainer.teaching.method}"}
    return {}


def held_out(
    trainer: Trainer, rows: Sequence[Row], moment: str, output: Path, adapter: str | None = None
) -> dict[str, list[float]]:
    """Scores on held-out rows by tokens per step, the run's own rate first; kept in ``held_out_<moment>.json``.

    A file that is there already, from before a resume, is read instead if it is about the same ``adapter`` (a hash, or
    None before training).
    """
    path = output / held_out_file(moment)
    kept = on_first_process(lambda: kept_scores(path, adapter))
    if kept is not None:
        return kept
    rollouts = trainer.rollouts
    own = rollouts.decoding()
    decodings = {str(rate): rollouts.decoding(rate) for rate in rollouts.eval_tokens_per_step}
    rate = f"{rollouts.gen_length / own.total_steps:g}"
    decodings = {rate: own, **{other: decodings[other] for other in decodings if other != rate}}
    results = {
        rate: trainer.decode_rows(rows, decoding, f"held out, {moment}, {rate} tokens a step")
        for rate, decoding in decodings.items()
    }
    shown = next(iter(results.values()))
    picture = moment == "before" and TRAJECTORY not in left_out(trainer)
    sampled = shown[: trainer.args.inspect_samples]

    def look_closer() -> None:
        if picture:
            draw_trajectory(trainer, shown, output / TRAJECTORY)
        if sampled:
            keep(output / FOLDER / f"{moment}.json", trainer.method, sampled, [trainer.args.seed] * len(sampled))

    if picture or sampled:
        with trainer.method.free_passes():
            on_first_process(look_closer)
    if trainer.is_world_process_zero():
        eos_id = trainer.method.decoder.eos_id
        responses = {rate: [one.outcome(eos_id) for one in ones] for rate, ones in results.items()}
        write_json(path, {"adapter_sha256": adapter, "tokens_per_step": responses})
    return {rate: [one.score for one in ones] for rate, ones in results.items()}


def held_out_file(moment: str) -> str:
    """The file of the held-out responses ``before`` or ``after`` training."""
    return f"held_out_{moment}.json"


def kept_scores(path: Path, adapter: str | None) -> dict[str, list[float]] | None:
    """The scores in a file of held-out responses, if it is there and about ``adapter``."""
    try:
        kept = json.loads(path.read_text())
        scores = {rate: [one["score"] for one in ones] for rate, ones in kept["tokens_per_step"].items()}
        return scores if kept["adapter_sha256"] == adapter else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def draw_trajectory(trainer: Trainer, rollouts: Sequence[Rollout], path: Path) -> None:
    """Picture the first correct rollout: when tokens were revealed, what the teacher saw, where K was, KL per step."""
    rollout = next((one for one in rollouts if one.score >= 1), rollouts[0])
    method = trainer.method
    assert isinstance(method, Distillation)
    decoder, trajectory = method.decoder, rollout.trajectory
    example = method.example(rollout, trainer.args.seed)
    if len(example.steps):
        seen = look(method, example)
        labels = [label(token, decoder) for token in trajectory.tokens.tolist()]
        title = f"{decoder.shown(rollout.row)}{rollout.response}"
        trace = TrajectoryTrace(
            trajectory, example.steps, example.reveal, seen.selection(), seen.state_divergence(), labels, title
        )
        plot_trajectory(trace, path, trainer.args.figure_width)


def finish(
    trainer: Trainer,
    output: Path,
    config: Mapping[str, Any],
    adapter: str,
    before: Mapping[str, list[float]],
    after: Mapping[str, list[float]],
    seconds: float,
) -> dict[str, Any]:
    """Write ``metrics.csv``, ``curves.png``, the model card and, last, ``report.json``: returned.

    Pictures that can't be drawn here are left out; the report says which and why.
    """
    rates = {rate: compare(before[rate], after[rate]) for rate in before}
    own = next(iter(rates.values()))
    memory = (
        None
        if trainer.memory.plan is None
        else {
            **trainer.memory.plan.to_json(),
            "predicted_peak": trainer.memory.predicted_peak,
            "measured_peak": trainer.memory.highest,
        }
    )
    missing = left_out(trainer)
    parameters, held = sharding.held(trainer.student)
    result = {
        **own,
        "eval_problems": len(next(iter(before.values()))),
        "tokens_per_step": rates,
        "adapter_sha256": adapter,
        "updates": trainer.state.global_step,
        "parameters": parameters,
        "parameters_per_rank": held,
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "collapse": collapse.events(trainer.state.log_history),
        "seconds": round(seconds, 1),
        "seed": trainer.args.seed,
        "device": str(trainer.args.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "memory": memory,
        "left_out": {name: reason for name, reason in missing.items() if not (output / name).exists()},
        "config": config,
    }
    if trainer.is_world_process_zero():
        write_metrics(trainer.state.log_history, output / METRICS_FILE)
        if CURVES not in missing:
            plot_curves(
                trainer.state.log_history,
                output / CURVES,
                before=own["accuracy_before"],
                after=own["accuracy_after"],
                before_error=own["standard_error_before"],
                after_error=own["standard_error_after"],
                width=trainer.args.figure_width,
            )
        write_card(output, result, trainer.method.decoder.mask_id)
        write_json(output / REPORT_FILE, result)
    return result


def show_result(result: Mapping[str, Any], output: Path) -> None:
    """Show what a report says; with partial grades, also how many answers are right as a whole."""
    rates = result["tokens_per_step"]
    moments = ("before", "after")
    partial = any(row[f"accuracy_{when}"] != row[f"fully_correct_{when}"] for row in rates.values() for when in moments)
    rows = [
        {
            "tokens per step": rate,
            **{
                moment: f"{100 * row[f'accuracy_{moment}']:{sign}.1f} ± {100 * row[f'standard_error_{moment}']:.1f}"
                for moment, sign in (("before", ""), ("after", ""), ("gain", "+"))
            },
            **({"fully correct": whole(row)} if partial else {}),
        }
        for rate, row in rates.items()
    ]
    memory, left_out = result["memory"], result["left_out"]
    notes = [collapse.sentence(one) for one in result["collapse"]]
    if result["config"]["training"]["load_best_model_at_end"] and result["best_checkpoint"] is not None:
        best = number(Path(result["best_checkpoint"]))
        notes.append(f"the adapter is that of update {best} of {result['updates']}, the best by validation")
    if memory is not None:
        peaks = gib(memory["predicted_peak"]), gib(memory["measured_peak"])
        notes.append(f"memory: {peaks[0]} GiB predicted, {peaks[1]} measured in updates")
    files = [name for name in (REPORT_FILE, METRICS_FILE, *PICTURES) if name not in left_out]
    notes += [f"{name} is left out: {why}" for name, why in left_out.items()]
    notes.append(f"{result['seconds']:.0f} s; in {output}: the adapter, {', '.join(files)}")
    show(rows, f"held-out accuracy, {result['eval_problems']} problems", notes)


def whole(row: Mapping[str, Any]) -> str:
    """The shares of responses that are right as a whole, before and after, in percent."""
    return f"{100 * row['fully_correct_before']:.1f} to {100 * row['fully_correct_after']:.1f}"


def compare(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Accuracies (mean scores) with standard errors and 95% intervals, their paired difference, and the shares of 1."""
    gain = difference(before, after)
    numbers = {"before": summary(before), "after": summary(after), "gain": {**gain, "accuracy": gain["difference"]}}
    return {
        f"{name}_{moment}": one[name]
        for name in ("accuracy", "standard_error", "interval")
        for moment, one in numbers.items()
    } | {f"fully_correct_{moment}": numbers[moment]["fully_correct"] for moment in ("before", "after")}
