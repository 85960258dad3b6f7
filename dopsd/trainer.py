"""Any method of training as a :class:`transformers.Trainer`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.training_args import OptimizerNames

from dopsd import checkpoints, files, look, ranks
from dopsd.collapse import CollapseGuard
from dopsd.config import ModelArguments, RolloutArguments, TeachingArguments, TrainingArguments
from dopsd.distillation import reveal_seed
from dopsd.errors import RunError, require
from dopsd.evaluation.accuracy import mean, standard_error
from dopsd.memory.keeper import MemoryKeeper
from dopsd.method import Serialisable, Sizes
from dopsd.methods import METHODS
from dopsd.metrics import Figures, TokenCount, combined, means
from dopsd.models import (
    adapter_tensors,
    check_saved,
    compile_layers,
    narrow,
    of_adapters,
    require_layers,
    restore_adapters,
    save_adapter,
)
from dopsd.optimizer import require_buildable, require_installed
from dopsd.pending import Pending
from dopsd.progress import ProgressBar
from dopsd.prompt_sampler import PromptSampler
from dopsd.rollout import Decoder, Rollout, Row, SharedDecoder
from dopsd.sampler import Decoding, check_decoding
from dopsd.seeds import EVALUATION, mix_seeds
from dopsd.sharding import is_sharded, local, shard, share_state, whole_state
from dopsd.teacher import TeacherWeights
from dopsd.trackers import attach_trackers

log = logging.getLogger(__name__)

# Those that are known to compute the same on parts of parameters.
SHARD_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


class Trainer(transformers.Trainer):
    """One optimiser update, or several, per batch of prompts: roll out, and learn as the method says.

    Everything drawn is a function of the seed, the update and the row, so a resumed run goes on with the same bits.
    Gradients are summed over ranks by one explicit reduction, because ranks take different numbers of micro-batches.
    When memory runs out in decoding or in a slice's passes, these are done again with smaller sizes.

    Args:
        model: the student with its adapter.
        args: transformers' options.
        model_arguments, rollouts, teaching: this project's.
        decoder: the model's base network, tokenizer and task.
        train_rows, validation_rows: task rows.
    """

    args: TrainingArguments

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
        check_decoding(decoder.model, rollouts.decoding())
        require_installed(OptimizerNames(args.optim).value)
        self.rollouts, self.teaching, self.student = rollouts, teaching, model
        self.base = model_arguments.model
        kind = METHODS[teaching.method]
        kind.check_model(decoder.model, teaching)
        weights = teaching.teacher if kind.has_teacher else "live"
        teacher = TeacherWeights(model, weights, teaching.ema_decay, model_arguments.adapter is not None)
        hint = "copies of 16-bit weights are fp32, and --bf16 true is what computes with both"
        require(args.bf16 or args.fp16 or not narrow(model), "full_finetune", True, hint)
        if args.fsdp:
            require_shardable(decoder.model, model_arguments, teaching, args)
            shard(decoder.model, args.device, args.world_size)
        self.slices: list[list[Serialisable]] = []  # of the current batch, those that are still to be trained on
        self.batch_size = 0.0  # what the losses of the current batch are divided by, over all ranks
        self.waited = 0.0  # seconds, by the end of the last update
        self.update_metrics: list[Figures] = []  # of this process, since the last log
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(enumerate(train_rows)),
            eval_dataset=list(validation_rows),
            data_collator=lambda rows: {"rows": rows},
            **kwargs,
        )
        require_buildable(self)
        if args.world_size > 1:
            # Not in DistributedDataParallel: its hooks would never run, and its buckets are a copy of the gradients.
            self.accelerator.prepare_model(model, evaluation_mode=True)
        self.remove_callback(transformers.trainer.DEFAULT_PROGRESS_CALLBACK)  # a notebook has one of its own
        self.remove_callback(PrinterCallback)
        self.bar = ProgressBar(shown=self.is_world_process_zero() and not args.disable_tqdm)
        self.add_callback(self.bar)
        self.add_callback(TeacherFollows(self))
        self.trackers = attach_trackers(self)
        self.guard = CollapseGuard(self, teaching.updates_per_batch)
        self.add_callback(self.guard)
        # transformers would switch checkpointing on when training starts, whatever has been planned by then.
        checkpointing = bool(args.gradient_checkpointing)
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            setattr(args, name, False)
        if args.torch_compile:  # transformers compiles what it calls itself, which is nothing here
            require_layers(decoder.model, "torch_compile", "True", "false")
            compile_layers(decoder.model, args.torch_compile_backend, args.torch_compile_mode)
        # It would also delete the last complete checkpoint before the next is.
        self.kept_checkpoints, args.save_total_limit = args.save_total_limit, None
        sizes = Sizes(teaching.states_per_forward, checkpointing, decoder.batch_size)
        self.method = kind(model, teacher, decoder, sizes, self.accelerator, rollouts, teaching)
        self.method.check(train_rows)
        self.count = TokenCount(decoder.model)
        self.memory = MemoryKeeper(self.method, train_rows, model_arguments, rollouts, teaching, args)

    # ---- one update ----

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Roll out (unless slices of the last batch are pending), then forward and backward over one slice."""
        self.memory.forget_peak()
        if not self.slices:
            self.slices = self.roll_out(inputs["rows"])
        examples = self.slices.pop(0)
        if not self.batch_size:
            # No gradient exists on any rank, so the optimiser has nothing to step: neither decay nor momentum act.
            return torch.zeros((), device=self.args.device)
        start, logged = time.monotonic(), len(self.update_metrics)
        states = sum(map(self.method.states, examples))
        seed = mix_seeds(self.args.seed, self.state.global_step)
        done: list[int] = []  # states of this process's micro-batches

        def learn() -> tuple[list[Mapping[str, Tensor]], Tensor]:
            self.count.take()
            done.clear()
            batches = self.method.batches(examples, seed, self.note)
            with tqdm(total=states // self.args.world_size, desc="learn", unit="state", **self.bar.inner()) as bar:

                def tell(count: int) -> None:
                    done.append(count)
                    bar.update(count)

                return self.method.backward(batches, self.batch_size, seed, on_batch=tell)

        def undo() -> None:
            model.zero_grad()  # the slice is done again as a whole
            del self.update_metrics[logged:]

        figures, loss = self.memory.training(learn, states, self.state.global_step + 1, undo)
        losses = ranks.gather(float(loss))
        loss = loss.new_tensor(sum(losses))
        if not is_sharded(self.method.decoder.model):  # whose backward passes do it
            ranks.add_gradients(model)
        if not math.isfinite(loss):
            where = [str(rank) for rank, one in enumerate(losses) if not math.isfinite(one)]
            who = f" on process {', '.join(where)} of {len(losses)}" if len(losses) > 1 else ""
            raise self.not_finite(f"the loss is {loss.item()}{who} at")
        if figures:
            for name, (over, mean_of_rows) in means(figures).items():
                self.note(over, **{name: mean_of_rows})
            seconds, (tokens, forward_tokens) = time.monotonic() - start, self.count.take()
            self.note(1, states=sum(done), tokens=tokens, forward_tokens=forward_tokens, learn_seconds=seconds)
        if self.args.world_size > 1:
            self.note(1, wait_seconds=ranks.waited() - self.waited)
            self.waited = ranks.waited()
        if peaks := self.memory.peaks():
            self.note(1, **peaks)
        return loss

    def roll_out(self, indexed_rows: Sequence[tuple[int, Row]]) -> list[list[Serialisable]]:
        """What each of the next updates trains on, of a batch of rows; both are the same on all processes."""
        start = time.monotonic()
        rows = [row for _, row in indexed_rows]
        indices = torch.tensor([index for index, _ in indexed_rows])
        seeds = mix_seeds(self.args.seed, self.state.global_step, indices)
        self.method.progress = self.state.global_step / max(self.state.max_steps, 1)
        self.count.take()
        rollouts = self.decoded(
            lambda decoder, bar: self.method.rollouts(decoder, rows, seeds, bar.update),
            total=len(ranks.mine(rows)),
            desc="roll out",
            unit="prompt",
        )
        decoded = self.count.take()[1]
        examples = self.method.examples(rows, rollouts, seeds)
        self.batch_size = self.method.size(examples)
        states = sum(map(self.method.states, examples))
        slices = self.memory.training(
            lambda: self.method.slices(examples), states, self.state.global_step + 1, lambda: None
        )
        if computed := self.count.take()[1]:
            self.note(1, forward_tokens=computed)
        if rollouts:
            self.note(1, decode_tokens=decoded, rollout_seconds=time.monotonic() - start)
        if rollouts and self.is_world_process_zero():  # what all know alike
            self.note(len(rows), **self.method.figures(rollouts), accepted=len(examples) / len(rows))
            self.note(1, rollouts=sum(rollout.decoded for rollout in rollouts))
        if rollouts and self.args.inspect_samples:
            self.keep_sample(rollouts, seeds)
        return slices

    def keep_sample(self, rollouts: Sequence[Rollout], seeds: Tensor) -> None:
        """What the inspector has of this batch, if it has something: its first example, or, without one, response.

        Args:
            rollouts: of the batch.
            seeds: (N,) int64, of its rows.
        """
        count, samples = self.teaching.updates_per_batch, self.args.inspect_samples
        batch, batches = self.state.global_step // count, -(-max(self.state.max_steps, 1) // count)
        # As many as there are to be, or all if these are fewer, evenly spread over the run, from the first batch on.
        if -batch * samples % batches < samples:
            index = next((i for i, rollout in enumerate(rollouts) if self.teaching.accepts(rollout.score)), 0)
            seed = reveal_seed(seeds[index * len(seeds) // len(rollouts)])  # a row may have several responses
            update = self.state.global_step + 1
            path = Path(self.args.output_dir or ".") / look.FOLDER / f"update-{update}.json"
            with self.method.free_passes():
                ranks.on_first_process(lambda: look.keep(path, self.method, [rollouts[index]], [seed], update=update))

    def require_finite(self) -> None:
        """Raise RunError unless all that an update changed is finite; looks once at the device."""
        adapters = [local(parameter) for parameter in of_adapters(self.student).values()]
        finite = torch.stack([parameter.isfinite().all() for parameter in adapters])
        if not finite.all():
            count = int((~finite).sum())
            raise self.not_finite(f"{count} of {len(finite)} tensors of the adapter are not finite behind")

    def not_finite(self, what: str) -> RunError:
        """The error with which the update under way ends the run."""
        left = checkpoints.unharmed(Path(self.args.output_dir or "."))
        help = "A lower learning_rate, clip_form=nonnegative or fp32 may help"
        return RunError(f"{what} update {self.state.global_step + 1}; {left}. {help}")

    def decoded(self, decode: Callable[[Decoder, tqdm], list[Rollout]], **bar: Any) -> list[Rollout]:
        """What ``decode`` makes of a decoder of all processes; ``bar`` are the options of the progress bar."""
        decoder = SharedDecoder(**vars(self.method.decoder), locally=self.memory.decoding)
        with tqdm(**bar, **self.bar.inner()) as shown, self.method.free_passes():
            return decode(decoder, shown)

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Greedy accuracy on the validation rows (or ``eval_dataset``), logged as the Trainer logs its own."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        rollouts = self.decode_rows(rows, self.rollouts.decoding(), "validate")
        scores = [rollout.score for rollout in rollouts]
        metrics = {
            f"{metric_key_prefix}_accuracy": mean(scores),
            f"{metric_key_prefix}_standard_error": standard_error(scores),
        }
        self.log(dict(metrics))
        for tracker in self.trackers:
            tracker.show(rollouts)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def decode_rows(self, rows: Sequence[Row], decoding: Decoding, description: str) -> list[Rollout]:
        """Decode rows once each; every process gets all of them, in order."""
        seeds = mix_seeds(self.args.seed, EVALUATION, torch.arange(len(rows)))
        return self.decoded(
            lambda decoder, bar: decoder.once(rows, decoding, seeds, on_rows=bar.update),
            total=len(ranks.mine(rows)),
            desc=description,
            unit="problem",
        )

    # ---- what the Trainer asks for ----

    def get_train_dataloader(self) -> DataLoader:
        """Batches of the rows of all processes: which computes what of them is decided where it is computed."""
        args = self.args
        loader: DataLoader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            args.train_batch_size * args.world_size,
            sampler=self._get_train_sampler(),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            drop_last=args.dataloader_drop_last,
        )
        return prepare_data_loader(loader, num_processes=1, process_index=0)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        chunk = self.args.train_batch_size * self.args.world_size
        return PromptSampler(len(self.train_dataset), chunk, self.teaching.updates_per_batch, seed)  # type: ignore[arg-type]

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
        output = Path(self.args.output_dir or ".")
        folder = output / f"checkpoint-{self.state.global_step}"
        try:
            with files.writing(folder):
                self.fill_checkpoint(folder, model, trial)
        except RunError as error:
            raise RunError(f"{error}; {checkpoints.unharmed(output)}") from error
        if self.is_world_process_zero():
            checkpoints.rotate(folder, self.kept_checkpoints, self.state.best_model_checkpoint)

    def fill_checkpoint(self, folder: Path, model: Any, trial: Any) -> None:
        """Write every file of a checkpoint, the manifest last."""
        ranks.on_first_process(lambda: checkpoints.begin(folder))
        folder.mkdir(parents=True, exist_ok=True)  # where processes have no disk in common
        metrics = list(chain(*ranks.gather(self.update_metrics)))
        if self.is_world_process_zero():
            Pending(self.batch_size, self.slices, self.method.sizes, metrics).save(folder)
        super()._save_checkpoint(model, trial)
        ranks.meet()
        ranks.on_first_process(lambda: checkpoints.seal(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_adapters(resume_from_checkpoint)
        pending = Pending.load(Path(resume_from_checkpoint), self.method.example_type)
        self.batch_size, self.slices, sizes, metrics = pending
        self.update_metrics = metrics if self.is_world_process_zero() else []  # one has those of all
        if self.memory.plan is not None and sizes != self.method.sizes:
            log.warning(f"the checkpoint's sizes are kept, and not those planned: {asdict(sizes)}")
        self.method.resize(sizes)  # the same sums, and so the same bits

    def load_adapters(self, checkpoint: str) -> None:
        """The student's and an averaged teacher's, and nothing else of a checkpoint."""
        check_saved(self.student, checkpoint)
        restore_adapters(self.student, checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapters; all processes call it."""
        tensors = adapter_tensors(self.student)
        if self.args.should_save:
            self._save(output_dir, state_dict=tensors)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with whole_state(self.optimizer, self.is_world_process_zero()):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoints.reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        share_state(self.optimizer)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint or "")
        why = checkpoints.fault(best, checkpoints.run_id(best.parent))
        if why is None:
            self.load_adapters(str(best))
        else:
            log.warning(f"{best}, the best by validation, can't be used: {why}; the last adapter is what is left")
            self.state.best_model_checkpoint = None

    def restore(self, checkpoint: str) -> None:
        """What training left that ended with ``checkpoint``, without an update: its state, its adapter or the best."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / checkpoints.STATE_FILE))
        self.find_best()
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()

    def find_best(self) -> None:
        """In a run that goes on, the best checkpoint is where this run has it, or is said to be missing in the end."""
        if self.state.best_global_step is not None:
            self.state.best_model_checkpoint = f"{self.args.output_dir}/checkpoint-{self.state.best_global_step}"

    def save_adapter(self, folder: Path) -> str:
        """The student's adapter alone, ready for ``--adapter``; returns the hash of its tensors' file."""
        tensors = adapter_tensors(self.student)
        return ranks.on_first_process(lambda: save_adapter(self.student, folder, self.base, tensors))


def require_shardable(model: Any, model_arguments: ModelArguments, teaching: TeachingArguments, args: Any) -> None:
    """Raise UsageError unless the processes can share the weights of ``model`` as ``--fsdp`` says."""
    require_layers(model, "fsdp", args.fsdp, "none")
    reasons = {
        "one process has none to share weights with: torchrun or accelerate launch start several": args.world_size > 1,
        "weights of 8 bits can't be cut: --quantize nf4, or none": model_arguments.quantize != "int8",
        "what a process can't compute again alone is not probed: no --memory_budget": teaching.memory_budget is None,
        "what is compiled does not gather weights: --torch_compile false": not args.torch_compile,
        "gradients in parts are not scaled for fp16: --bf16 true, or neither": not args.fp16,
        "of optimisers adamw_torch, adamw_torch_fused and sgd know parts of parameters": args.optim in SHARD_OPTIMIZERS,
    }
    for reason, fine in reasons.items():
        require(fine, "fsdp", args.fsdp, reason)


class TeacherFollows(TrainerCallback):
    """After each optimiser step: what it left must be finite, and where it moved the student an average follows."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.find_best()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.require_finite()
        if self.trainer.batch_size:
            self.trainer.method.teacher.after_update()
