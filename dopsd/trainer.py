"""On-policy self-distillation as a :class:`transformers.Trainer`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dopsd.accuracy import mean, standard_error
from dopsd.config import ModelArguments, RolloutArguments, TeachingArguments, TrainingArguments
from dopsd.drift import mean_drifts
from dopsd.errors import RunError, require
from dopsd.models import STUDENT, add_lora, device_of, load_adapter, require_layers
from dopsd.models.bidirectional import DiffusionModel
from dopsd.objective import Objective, lessons_of, mean_metrics
from dopsd.rollout import Decoder, Rollout, Row
from dopsd.sampler import Decoding, mix_seeds
from dopsd.step_batch import Lesson, StepBatch, step_batches
from dopsd.teacher import TeacherWeights

# Seeds of evaluation draws, apart from those of training.
EVALUATION = -1
# The same of states whose drift is measured.
DRIFT = -2


class Trainer(transformers.Trainer):
    """One optimiser update per batch of prompts: roll out, keep what is correct, distil every step of it.

    Everything drawn is a function of the seed, the update and the row, so a resumed run goes on with the same bits.
    Gradients are summed over ranks by one explicit reduction, because ranks accept different numbers of trajectories.

    Args:
        model: the student with its adapter.
        args: transformers' options.
        model_arguments, rollouts, teaching: this method's.
        decoder: the model's base network, tokenizer and task.
        train_rows, validation_rows: task rows.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        model_arguments: ModelArguments,
        rollouts: RolloutArguments,
        teaching: TeachingArguments,
        decoder: Decoder,
        train_rows: Sequence[Row],
        validation_rows: Sequence[Row],
        **kwargs: Any,
    ) -> None:
        require(len(train_rows) > 0, "train_file", "no rows", "at least one row is needed to train")
        require_layers(decoder.model, "reuse", teaching.reuse, "none")
        require_layers(decoder.model, "cache", rollouts.cache, "off")
        self.rollouts, self.teaching, self.decoder = rollouts, teaching, decoder
        self.objective: Objective = teaching.objective()
        self.student = model
        self.teacher = TeacherWeights(
            model, teaching.teacher, teaching.ema_decay, from_adapter=model_arguments.adapter is not None
        )
        self.validation_rows = validation_rows
        self.pending: list[list[Lesson]] = []  # slices of the current batch that are still to be trained on
        self.said_drift = False  # that some trajectory was computed without reuse
        self.accepted_count = 0  # over all ranks, in the current batch
        self.update_metrics: list[dict[str, float]] = []
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(enumerate(train_rows)),
            eval_dataset=list(validation_rows),
            data_collator=lambda rows: {"rows": rows},
            **kwargs,
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.bar = ProgressBar(shown=self.is_world_process_zero() and not args.disable_tqdm)
        self.add_callback(self.bar)
        self.add_callback(TeacherFollows(self))

    # ---- one update ----

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Roll out (unless slices of the last batch are pending), then forward and backward over one slice."""
        if not self.pending:
            self.pending = self.roll_out(inputs["rows"])
        lessons = self.pending.pop(0)
        zero = torch.zeros((), device=self.args.device)
        if not self.accepted_count:
            # No gradient exists on any rank, so the optimiser has nothing to step: neither decay nor momentum act.
            return zero
        start = time.monotonic()
        network = self.decoder.model
        model.train()
        outputs, loss, tokens = [], zero, 0
        states = sum(len(lesson.steps) for lesson in lessons)
        with tqdm(total=states, desc="distil", unit="state", **self.bar.inner()) as bar:
            for batch in self.batches(lessons):
                with self.accelerator.autocast():
                    output = self.objective.forward(network, self.teacher, batch, self.decoder.mask_id)
                self.accelerator.backward(output.loss / self.accepted_count)
                loss = loss + output.loss.detach() / self.accepted_count
                outputs.append(replace(output, loss=output.loss.detach()))  # the graph is not kept
                tokens += batch.student.tokens
                bar.update(len(batch))
        self.sum_gradients(model)
        if self.accelerator.num_processes > 1:
            loss = self.accelerator.reduce(loss, "sum")
        if not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss.item()} at update {self.state.global_step + 1}; checkpoints saved before it "
                f"in {self.args.output_dir} are unharmed. A lower learning_rate, clip_form=nonnegative or fp32 may help"
            )
        if outputs:
            work = {"states": states, "tokens": tokens, "distill_seconds": time.monotonic() - start}
            self.update_metrics.append({**mean_metrics(outputs), **work})
        return loss

    def roll_out(self, indexed_rows: Sequence[tuple[int, Row]]) -> list[list[Lesson]]:
        """Decode and grade a batch of rows; the accepted ones' lessons, in ``update_per_slice`` slices."""
        start = time.monotonic()
        rows = [row for _, row in indexed_rows]
        indices = torch.tensor([index for index, _ in indexed_rows])
        seeds = mix_seeds(self.args.seed, self.state.global_step, indices)
        with (
            tqdm(total=len(rows), desc="roll out", unit="prompt", **self.bar.inner()) as bar,
            self.accelerator.autocast(),
        ):
            rollouts = self.decoder.pass_at_k(
                rows,
                self.rollouts.decoding(),
                seeds,
                self.rollouts.pass_k,
                self.rollouts.temperature,
                on_rows=bar.update,
            )
        threshold = self.teaching.score_threshold if self.teaching.correct_only else 0.0
        kept = [index for index, rollout in enumerate(rollouts) if rollout.score >= threshold]
        lessons = lessons_of(self.objective, [rollouts[index] for index in kept], self.decoder, seeds[kept].tolist())
        count = torch.tensor(len(lessons), device=self.args.device)
        self.accepted_count = int(self.accelerator.reduce(count, "sum"))
        lengths = [rollout.trajectory.text_length(self.decoder.eos_id) for rollout in rollouts]
        self.update_metrics.append(
            {
                "pass_rate": mean([float(rollout.score >= 1) for rollout in rollouts]),
                "first_try": mean([float(rollout.score >= 1 and rollout.tries == 1) for rollout in rollouts]),
                "accepted": len(kept) / len(rollouts),
                "tries": mean([float(rollout.tries) for rollout in rollouts]),
                "completion_length": mean([float(length) for length in lengths]),
                "rollout_seconds": time.monotonic() - start,
            }
        )
        slices = self.teaching.update_per_slice
        return [
            [part for lesson in lessons if len((part := lesson.slice(number, slices)).steps)]
            for number in range(slices)
        ]

    def batches(self, lessons: Sequence[Lesson]) -> Iterator[StepBatch]:
        """Every state of ``lessons``, with reuse, or without for those that drift by more than ``drift_limit``."""
        teaching, network = self.teaching, self.decoder.model
        size, limit = teaching.states_per_forward, teaching.drift_limit
        options: dict[str, Any] = {
            "mask_id": self.decoder.mask_id,
            "pad_id": self.decoder.eos_id,
            "device": device_of(network),
        }
        if not lessons or teaching.reuse == "none" or not teaching.drift_samples:
            return step_batches(lessons, size, reuse=teaching.reuse, **options)
        with self.accelerator.autocast():
            drifts = mean_drifts(
                self.objective,
                network,
                self.teacher,
                lessons,
                samples=teaching.drift_samples,
                seed=int(mix_seeds(self.args.seed, self.state.global_step, DRIFT)),
                size=size,
                **options,
            )
        self.update_metrics.append({"drift": float(drifts.mean())})
        far = [limit is not None and drift > limit for drift in drifts.tolist()]
        if any(far) and not self.said_drift:
            self.said_drift = True
            tqdm.write(
                f"update {self.state.global_step + 1}: reuse={teaching.reuse} makes a trajectory drift by "
                f"{float(drifts.max()):.3g}, more than drift_limit={limit}: such ones are computed without it"
            )
        exact = [lesson for lesson, is_far in zip(lessons, far, strict=True) if is_far]
        reused = [lesson for lesson, is_far in zip(lessons, far, strict=True) if not is_far]
        return chain(step_batches(reused, size, reuse=teaching.reuse, **options), step_batches(exact, size, **options))

    def sum_gradients(self, model: Any) -> None:
        """Add the ranks' gradients; a parameter without one on some rank counts as zero there."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Greedy accuracy on the validation rows (or ``eval_dataset``), logged as the Trainer logs its own."""
        rows = self.validation_rows if eval_dataset is None else eval_dataset
        scores = [rollout.score for rollout in self.decode_rows(rows, self.rollouts.decoding(), "validate")]
        metrics = {
            f"{metric_key_prefix}_accuracy": mean(scores),
            f"{metric_key_prefix}_standard_error": standard_error(scores),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def decode_rows(self, rows: Sequence[Row], decoding: Decoding, description: str) -> list[Rollout]:
        """Decode rows once each, shared out among the ranks; every rank gets all of them, in order."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        seeds = mix_seeds(self.args.seed, EVALUATION, torch.arange(len(rows)))
        with (
            tqdm(total=len(rows[rank::world]), desc=description, unit="problem", **self.bar.inner()) as bar,
            self.accelerator.autocast(),
        ):
            mine = self.decoder.once(rows[rank::world], decoding, seeds[rank::world], on_rows=bar.update)
        if world == 1:
            return mine
        parts = gather_object([mine])
        return [parts[index % world][index // world] for index in range(len(rows))]

    # ---- what the Trainer asks for ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        chunk = self.args.train_batch_size * self.args.world_size
        return PromptSampler(len(self.train_dataset), chunk, self.teaching.update_per_slice, seed)  # type: ignore[arg-type]

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: the Trainer's formula is for one forward and backward over given inputs."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of this method's metrics since the last log."""
        if "loss" in logs and self.update_metrics:
            gathered = self.update_metrics
            if self.accelerator.num_processes > 1:
                gathered = gather_object(gathered)
            for key in sorted({key for metrics in gathered for key in metrics}):
                logs[key] = mean([metrics[key] for metrics in gathered if key in metrics])
            self.update_metrics = []
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Before the Trainer's own files: its trainer_state.json comes last and marks the checkpoint as complete.
        folder = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        pending = {
            "accepted_count": self.accepted_count,
            "slices": [[lesson.to_json() for lesson in lessons] for lessons in self.pending],
        }
        (folder / self.pending_name()).write_text(json.dumps(pending))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        pending = json.loads((Path(resume_from_checkpoint) / self.pending_name()).read_text())
        self.accepted_count = pending["accepted_count"]
        self.pending = [[Lesson.from_json(fields) for fields in lessons] for lessons in pending["slices"]]

    def pending_name(self) -> str:
        """The checkpoint file that holds this rank's slices still to be trained on."""
        return f"pending_{self.accelerator.process_index}.json"

    def save_adapter(self, folder: Path) -> None:
        """The student's adapter alone, ready for ``--adapter``."""
        if self.is_world_process_zero():
            self.student.save_pretrained(str(folder), selected_adapters=[STUDENT])


def with_adapter(base: DiffusionModel, arguments: ModelArguments) -> PeftModel:
    """``base`` with the adapter to train: the one that ``arguments`` names, or a fresh one."""
    if arguments.adapter is not None:
        return load_adapter(base, arguments.adapter, trainable=True)
    return add_lora(base, arguments.lora_targets, arguments.lora_r, arguments.lora_alpha, arguments.lora_dropout)


class PromptSampler(Sampler[int]):
    """Row indices in a new random order each epoch, each chunk of ``chunk`` rows ``times`` times in a row.

    With ``times`` > 1 an epoch's incomplete last chunk is left out: repeated, it would straddle batches.
    """

    def __init__(self, rows: int, chunk: int, times: int, seed: int) -> None:
        self.rows, self.chunk, self.times, self.seed, self.epoch = rows, min(chunk, rows), times, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of each epoch, also when a run is resumed."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows if self.times == 1 else self.rows // self.chunk * self.chunk * self.times

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(int(mix_seeds(self.seed, self.epoch)))
        order = torch.randperm(self.rows, generator=generator)
        for chunk in order.split(self.chunk):
            if self.times == 1 or len(chunk) == self.chunk:
                yield from chunk.tolist() * self.times


class TeacherFollows(TrainerCallback):
    """Moves an averaged teacher after each optimiser step that moved the student."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.accepted_count:
            self.trainer.teacher.after_update()


class ProgressBar(TrainerCallback):
    """One bar over the updates, with the figures that tell whether training works; inner bars for its long parts."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.bar: tqdm | None = None
        self.figures: dict[str, str] = {}

    def inner(self) -> dict[str, Any]:
        """Options of a bar for a part: of an update, or of what comes before and after training."""
        return {"leave": False, "position": int(self.bar is not None), "disable": not self.shown, "delay": 3.0}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.shown:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="update")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.bar is not None and logs:
            names = {
                "loss": "loss",
                "clip_fraction": "clipped",
                "tries": "tries",
                "pass_rate": "pass",
                "eval_accuracy": "validation",
            }
            self.figures |= {name: f"{logs[key]:.3g}" for key, name in names.items() if key in logs}
            self.bar.set_postfix(self.figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the bar's line, also when training ends with an error."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
