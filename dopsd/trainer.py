"""On-policy self-distillation as a :class:`transformers.Trainer`."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.training_args import OptimizerNames

from dopsd import checkpoints, files, ranks
from dopsd.collapse import CollapseGuard
from dopsd.config import ModelArguments, RolloutArguments, TeachingArguments, TrainingArguments
from dopsd.drift import mean_drifts
from dopsd.errors import RunError, require
from dopsd.evaluation.accuracy import mean, standard_error
from dopsd.memory.meter import Meter, meter_of, unless_out_of_memory
from dopsd.memory.planner import Plan, Planner, Sizes, remedies, too_little, workspace_for
from dopsd.memory.probe import RunProbe
from dopsd.memory.units import GIB, read_bytes
from dopsd.metrics import Figures, combined
from dopsd.models import STUDENT, add_lora, checkpoint_activations, device_of, load_adapter, require_layers
from dopsd.models.bidirectional import BidirectionalModel, DiffusionModel
from dopsd.objective import Objective, StepOutput, lessons_of, mean_metrics
from dopsd.optimizer import require_buildable, require_installed
from dopsd.progress import ProgressBar
from dopsd.rollout import Decoder, Rollout, Row
from dopsd.sampler import Decoding
from dopsd.seeds import DRIFT, EVALUATION, mix_seeds
from dopsd.step_batch import Lesson, StepBatch, step_batches
from dopsd.teacher import TeacherWeights

log = logging.getLogger(__name__)


class Trainer(transformers.Trainer):
    """One optimiser update per batch of prompts: roll out, keep what is correct, distil every step of it.

    Everything drawn is a function of the seed, the update and the row, so a resumed run goes on with the same bits.
    Gradients are summed over ranks by one explicit reduction, because ranks accept different numbers of trajectories.
    When memory runs out in decoding or in a slice's passes, these are done again with smaller sizes.

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
        require_layers(decoder.model, "cache", rollouts.cache, "none")
        require_installed(OptimizerNames(args.optim).value)
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
        self.update_metrics: list[Figures] = []  # of this process, since the last log
        self.sizes = Sizes(teaching.states_per_forward, bool(args.gradient_checkpointing), decoder.batch_size)
        self.meter: Meter | None = None  # with a budget, as are the planner and its plan
        self.planner: Planner | None = None
        self.plan: Plan | None = None
        self.highest = 0  # peak of all updates, as measured
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(enumerate(train_rows)),
            eval_dataset=list(validation_rows),
            data_collator=lambda rows: {"rows": rows},
            **kwargs,
        )
        require_buildable(self)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.bar = ProgressBar(shown=self.is_world_process_zero() and not args.disable_tqdm)
        self.add_callback(self.bar)
        self.add_callback(TeacherFollows(self))
        self.add_callback(CollapseGuard(self))
        # transformers would switch checkpointing on when training starts, whatever has been planned by then.
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            setattr(args, name, False)
        # It would also delete the last complete checkpoint before the next is.
        self.kept_checkpoints, args.save_total_limit = args.save_total_limit, None
        if self.sizes.checkpointing:
            checkpoint_activations(decoder.model, True)
        reusable = isinstance(decoder.model, BidirectionalModel)
        self.remedies = remedies(model_arguments, rollouts, teaching, args, self.args.device.type, reusable)
        if teaching.memory_budget is not None:
            self.keep_to(teaching.memory_budget)

    # ---- one update ----

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Roll out (unless slices of the last batch are pending), then forward and backward over one slice."""
        if self.meter is not None:
            self.meter.take_peak()  # what was between updates, such as pictures, is not what was planned
        if not self.pending:
            self.pending = self.roll_out(inputs["rows"])
        lessons = self.pending.pop(0)
        if not self.accepted_count:
            # No gradient exists on any rank, so the optimiser has nothing to step: neither decay nor momentum act.
            return torch.zeros((), device=self.args.device)
        start = time.monotonic()
        states, logged = sum(len(lesson.steps) for lesson in lessons), len(self.update_metrics)
        while (
            done := unless_out_of_memory(lambda: self.distil(self.batches(lessons), states, self.accepted_count))
        ) is None:
            model.zero_grad()  # the slice is done again as a whole
            del self.update_metrics[logged:]
            self.take_less(states)
            if self.meter is not None:
                self.meter.take_peak()  # nor is what did not fit
        outputs, loss, tokens = done
        self.sum_over_processes(model, loss)
        if not math.isfinite(loss):
            raise self.not_finite(f"the loss is {loss.item()} at")
        if outputs:
            self.note(sum(len(output.kl) for output in outputs), **mean_metrics(outputs))
            self.note(1, states=states, tokens=tokens, distill_seconds=time.monotonic() - start)
        if self.meter is not None:
            peak = self.meter.take_peak()
            self.highest = max(self.highest, peak)
            self.note(1, peak_gib=peak / GIB, predicted_peak_gib=self.predicted_peak / GIB)
        return loss

    def distil(
        self, batches: Iterable[StepBatch], states: int, count: int
    ) -> tuple[list[StepOutput], Tensor, int]:  # per batch; loss; tokens of the student
        """Forward and backward over batches of ``states`` states in all; ``count`` lessons share the update."""
        self.student.train()
        outputs, loss, tokens = [], torch.zeros((), device=self.args.device), 0
        with tqdm(total=states, desc="distil", unit="state", **self.bar.inner()) as bar:
            for batch in batches:
                with self.accelerator.autocast():
                    output = self.objective.forward(self.decoder.model, self.teacher, batch, self.decoder.mask_id)
                self.accelerator.backward(output.loss / count)
                loss = loss + output.loss.detach() / count
                outputs.append(replace(output, loss=output.loss.detach()))  # the graph is not kept
                tokens += batch.student.tokens
                bar.update(len(batch))
        return outputs, loss, tokens

    def roll_out(self, indexed_rows: Sequence[tuple[int, Row]]) -> list[list[Lesson]]:
        """Decode and grade a batch of rows; the accepted ones' lessons, in ``update_per_slice`` slices."""
        start = time.monotonic()
        rows = [row for _, row in indexed_rows]
        indices = torch.tensor([index for index, _ in indexed_rows])
        seeds = mix_seeds(self.args.seed, self.state.global_step, indices)

        def decode(decoder: Decoder, bar: tqdm) -> list[Rollout]:
            options = self.rollouts.decoding(), seeds, self.rollouts.pass_k, self.rollouts.temperature
            return decoder.pass_at_k(rows, *options, on_rows=bar.update)

        rollouts = self.decoded(decode, total=len(rows), desc="roll out", unit="prompt")
        threshold = self.teaching.score_threshold if self.teaching.correct_only else 0.0
        kept = [index for index, rollout in enumerate(rollouts) if rollout.score >= threshold]
        lessons = lessons_of(self.objective, [rollouts[index] for index in kept], self.decoder, seeds[kept].tolist())
        self.accepted_count = sum(ranks.gather(len(lessons)))
        lengths = [rollout.trajectory.text_length(self.decoder.eos_id) for rollout in rollouts]
        self.note(
            len(rollouts),
            pass_rate=mean([float(rollout.score >= 1) for rollout in rollouts]),
            first_try=mean([float(rollout.score >= 1 and rollout.tries == 1) for rollout in rollouts]),
            accepted=len(kept) / len(rollouts),
            tries=mean([float(rollout.tries) for rollout in rollouts]),
            completion_length=mean([float(length) for length in lengths]),
            rollout_seconds=time.monotonic() - start,
        )
        slices = self.teaching.update_per_slice
        return [
            [part for lesson in lessons if len((part := lesson.slice(number, slices)).steps)]
            for number in range(slices)
        ]

    def batches(self, lessons: Sequence[Lesson]) -> Iterator[StepBatch]:
        """Every state of ``lessons``, with reuse, or without for those that drift by more than ``drift_limit``."""
        teaching, network = self.teaching, self.decoder.model
        size, limit, options = self.sizes.states_per_forward, teaching.drift_limit, self.collation()
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
                # Whole states without a gradient take what decoding does.
                size=min(size, self.sizes.sequences_per_forward),
                **options,
            )
        self.note(len(drifts), drift=float(drifts.mean()))
        far = [limit is not None and drift > limit for drift in drifts.tolist()]
        if any(far) and not self.said_drift:
            self.said_drift = True
            log.warning(
                f"update {self.state.global_step + 1}: reuse={teaching.reuse} makes a trajectory drift by "
                f"{float(drifts.max()):.3g}, more than drift_limit={limit}: such ones are computed without it"
            )
        exact = [lesson for lesson, is_far in zip(lessons, far, strict=True) if is_far]
        reused = [lesson for lesson, is_far in zip(lessons, far, strict=True) if not is_far]
        return chain(step_batches(reused, size, reuse=teaching.reuse, **options), step_batches(exact, size, **options))

    def collation(self) -> dict[str, Any]:
        """Options of :func:`~dopsd.step_batch.collate`, but for reuse."""
        decoder = self.decoder
        return {"mask_id": decoder.mask_id, "pad_id": decoder.eos_id, "device": device_of(decoder.model)}

    def require_finite(self) -> None:
        """Raise RunError unless all that an update changed is finite; looks once at the device."""
        adapters = [parameter for name, parameter in self.student.named_parameters() if ".lora_" in name]
        finite = torch.stack([parameter.isfinite().all() for parameter in adapters])
        if not finite.all():
            count = int((~finite).sum())
            raise self.not_finite(f"{count} of {len(finite)} tensors of the adapter are not finite behind")

    def not_finite(self, what: str) -> RunError:
        """The error with which the update under way ends the run."""
        left = checkpoints.unharmed(Path(self.args.output_dir or "."), self.args.world_size)
        help = "A lower learning_rate, clip_form=nonnegative or fp32 may help"
        return RunError(f"{what} update {self.state.global_step + 1}; {left}. {help}")

    def sum_over_processes(self, model: Any, loss: Tensor) -> None:
        """Add the ranks' gradients, and losses; a parameter without a gradient on some rank counts as zero there."""
        if self.accelerator.num_processes == 1:
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        ranks.add(loss, *(parameter.grad for parameter in trained))

    # ---- memory ----

    def keep_to(self, budget: str) -> None:
        """Choose the sizes that are predicted to keep to ``budget``, by probes that change nothing else.

        Raises:
            UsageError: not even the smallest do, or peaks can't be measured here.
        """
        self.meter = meter_of(self.args.device, budget)
        limit = read_bytes("memory_budget", budget, self.meter.total())
        workspace = workspace_for(limit, self.args.device.type)
        self.resize(replace(self.sizes, workspace_bytes=workspace))
        probe = RunProbe(self, self.meter)
        planner = Planner(probe, limit, probe.states, self.sizes.sequences_per_forward, workspace)
        plan = planner.plan()
        if plan is None:
            raise too_little("memory_budget", budget, planner.least(), self.remedies)
        self.planner = planner
        self.resize(plan.sizes)

    @property
    def predicted_peak(self) -> int:
        """What the meter is predicted to show, in bytes; 0 without a budget."""
        return 0 if self.plan is None or self.meter is None else self.plan.peak - self.meter.allowance

    def resize(self, sizes: Sizes) -> None:
        """Compute with these sizes from now on; a plan goes along."""
        network = self.decoder.model
        if sizes.checkpointing != self.sizes.checkpointing and network.supports_gradient_checkpointing:
            checkpoint_activations(network, sizes.checkpointing)
        self.sizes = sizes
        self.decoder = replace(self.decoder, batch_size=sizes.sequences_per_forward)
        self.objective = replace(self.objective, workspace_bytes=sizes.workspace_bytes)
        if self.planner is not None:
            self.plan = self.planner.at(sizes)

    def take_less(self, states: int) -> None:
        """After memory ran out over ``states`` states: half a micro-batch, or at one state checkpointing."""
        size = min(self.sizes.states_per_forward, states)
        if size > 1:
            self.resize(replace(self.sizes, states_per_forward=size // 2))
            change = f"states_per_forward is {size // 2} from now on"
        elif not self.sizes.checkpointing and self.decoder.model.supports_gradient_checkpointing:
            self.resize(replace(self.sizes, checkpointing=True))
            change = "activations are checkpointed from now on"
        else:
            raise RunError(
                f"out of memory at update {self.state.global_step + 1} with one state at a time; {self.remedies}"
            )
        log.warning(f"update {self.state.global_step + 1}: out of memory in training; {change}")

    def decoded(self, decode: Callable[[Decoder, tqdm], list[Rollout]], **bar: Any) -> list[Rollout]:
        """What ``decode`` makes of the decoder, which has half as many sequences whenever memory runs out.

        A response does not depend on what it is batched with. ``bar`` are the options of the progress bar.
        """

        def run() -> list[Rollout]:
            with tqdm(**bar, **self.bar.inner()) as shown, self.accelerator.autocast():
                return decode(self.decoder, shown)

        while (rollouts := unless_out_of_memory(run)) is None:
            # No batch was larger than all tries at all rows.
            size = min(self.sizes.sequences_per_forward, bar["total"] * self.rollouts.pass_k)
            if size == 1:
                raise RunError(f"out of memory in decoding with one sequence at a time; {self.remedies}")
            self.resize(replace(self.sizes, sequences_per_forward=size // 2))
            log.warning(f"out of memory in decoding; sequences_per_forward is {size // 2} from now on")
        return rollouts

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
        mine = self.decoded(
            lambda decoder, bar: decoder.once(rows[rank::world], decoding, seeds[rank::world], on_rows=bar.update),
            total=len(rows[rank::world]),
            desc=description,
            unit="problem",
        )
        parts = ranks.gather(mine)
        return [parts[index % world][index // world] for index in range(len(rows))]

    # ---- what the Trainer asks for ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        chunk = self.args.train_batch_size * self.args.world_size
        return PromptSampler(len(self.train_dataset), chunk, self.teaching.update_per_slice, seed)  # type: ignore[arg-type]

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: the Trainer's formula is for one forward and backward over given inputs."""
        return 0

    def note(self, over: int, **values: float) -> None:
        """Keep metrics of the update under way for the log; means are over so many things."""
        self.update_metrics.append(Figures(self.state.global_step, over, values))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this method's metrics since the last log, over all processes."""
        if "loss" in logs:
            logs |= combined(chain(*ranks.gather(self.update_metrics)))
            self.update_metrics = []
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
        ranks.on_first_process(lambda: checkpoints.begin(folder))
        folder.mkdir(parents=True, exist_ok=True)  # where processes have no disk in common
        pending = {
            "accepted_count": self.accepted_count,
            "slices": [[lesson.to_json() for lesson in lessons] for lessons in self.pending],
            "sizes": asdict(self.sizes),
            "metrics": self.update_metrics,  # of updates that are not logged yet
        }
        (folder / checkpoints.pending_name(self.accelerator.process_index)).write_text(json.dumps(pending))
        super()._save_checkpoint(model, trial)
        ranks.meet()
        ranks.on_first_process(lambda: checkpoints.seal(folder))
        if self.is_world_process_zero():
            checkpoints.rotate(folder, self.kept_checkpoints, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        name = checkpoints.pending_name(self.accelerator.process_index)
        pending = json.loads((Path(resume_from_checkpoint) / name).read_text())
        self.accepted_count = pending["accepted_count"]
        self.update_metrics = [Figures(*figures) for figures in pending["metrics"]]
        self.pending = [[Lesson.from_json(fields) for fields in lessons] for lessons in pending["slices"]]
        sizes = Sizes(**pending["sizes"])
        if self.plan is not None and sizes != self.sizes:
            log.warning(f"the checkpoint's sizes are kept, and not those planned: {asdict(sizes)}")
        self.resize(sizes)  # the same sums, and so the same bits

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint or "")
        why = checkpoints.fault(best, checkpoints.run_id(best.parent), self.args.world_size)
        if why is None:
            super()._load_best_model()
        else:
            log.warning(f"{best}, the best by validation, can't be used: {why}; the last adapter is what is left")
            self.state.best_model_checkpoint = None

    def restore(self, checkpoint: str) -> None:
        """What training left that ended with ``checkpoint``, without an update: its state, its adapter or the best."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / checkpoints.STATE_FILE))
        if self.args.load_best_model_at_end and self.state.best_global_step is not None:
            self.state.best_model_checkpoint = f"{self.args.output_dir}/checkpoint-{self.state.best_global_step}"
            self._load_best_model()

    def save_adapter(self, folder: Path) -> str:
        """The student's adapter alone, ready for ``--adapter``; returns the hash of its tensors' file."""

        def save() -> str:
            with files.replacing(folder) as part:
                self.student.save_pretrained(str(part), selected_adapters=[STUDENT])
            return files.sha256(folder / checkpoints.ADAPTER_FILE)

        return ranks.on_first_process(save)


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
    """After each optimiser step: what it left must be finite, and where it moved the student an average follows."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.require_finite()
        if self.trainer.accepted_count:
            self.trainer.teacher.after_update()
