"""The options: dataclasses whose fields they are, and what the commands make of a command line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from typing import Any, ClassVar, Literal

import torch
import transformers
from peft import PeftModel

from dopsd import ranks
from dopsd.cache import Cache
from dopsd.confidence import Confidence
from dopsd.errors import must_be, must_be_choices, require
from dopsd.models import add_copies, add_lora, has_copies, load_adapter
from dopsd.models.bidirectional import DiffusionModel
from dopsd.objective import Objective
from dopsd.parser import check_numbers
from dopsd.precision import has_bf16
from dopsd.prompt_file import PromptFile
from dopsd.sampler import Decoding, Remasking, SamplingDtype
from dopsd.sharding import require_own_sharding
from dopsd.step_batch import Reuse
from dopsd.tasks import Grading, Row, Task
from dopsd.teacher import RevealRounding, RevealScope, TeacherContext, TeacherKind
from dopsd.units import read_bytes
from dopsd_kernels.step_kl import Divergence

MethodName = Literal["d_opsd", "sft", "rejection", "diffu_grpo", "vrpo", "off_policy"]

# The fields of an objective that are options.
OF_OBJECTIVE = [f.name for f in fields(Objective) if f.name not in ("workspace_bytes", "block_causal")]

# Which methods an option is for, if not for all.
OF_METHODS: dict[str, tuple[MethodName, ...]] = {
    **dict.fromkeys(OF_OBJECTIVE, ("d_opsd",)),
    **dict.fromkeys(["teacher", "ema_decay", "equal_slices", "drift_samples", "drift_limit"], ("d_opsd",)),
    "correct_only": ("d_opsd", "rejection"),
    "score_threshold": ("d_opsd", "rejection", "vrpo"),
    **dict.fromkeys(["pass_k", "temperature"], ("d_opsd", "rejection", "diffu_grpo", "vrpo")),
    **dict.fromkeys(["first_temperature", "all_tries"], ("d_opsd", "rejection")),
    "learn_tail": ("sft", "rejection"),
    **dict.fromkeys(["mask_ratio", "entropy_weight"], ("off_policy",)),
    **dict.fromkeys(["advantage", "likelihood", "prompt_mask", "share_prompt_mask"], ("diffu_grpo",)),
    **dict.fromkeys(["ratio_clip", "kl_weight"], ("diffu_grpo",)),
    **dict.fromkeys(["elbo_draws", "preference_beta", "sft_weight"], ("vrpo",)),
}

TASK_HELP = (
    "sudoku (the tiny model's), gsm8k, math, countdown, sudoku4x4, one that a package registers as dopsd.tasks, or "
    "path/to/file.py:ClassName, whose code then runs (so a recipe can't name a file)."
)
GRADING_HELP = (
    "strict: only an answer marked as such counts; lenient: or else one is looked for; published: as the literature's "
    "figures were graded. sudoku has one way of grading."
)


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text; lists get a fresh copy."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def at_least_one(group: Any, *names: str) -> None:
    """Raise UsageError unless each of these options of ``group`` is at least 1, or not given."""
    for name in names:
        given = getattr(group, name)
        must_be(given is None or given >= 1, name, given, "at least 1")


def given_once(group: Any, *names: str) -> None:
    """Raise UsageError if a value occurs twice in one of these options of ``group``."""
    for name in names:
        given = getattr(group, name) or []
        require(len(set(given)) == len(given), name, given, "each value may be given once")


@dataclass
class LoadArguments:
    """How a model is loaded, for training and evaluation alike."""

    model: str = option("tiny", "'tiny' or 'tiny-causal' (which ship), a folder in Hugging Face layout, or a hub id.")
    adapter: str | None = option(None, "PEFT adapter folder, to start from or to evaluate.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "Of the base weights; auto: as stored.")
    quantize: Literal["none", "nf4", "int8"] = option(
        "none", "Store the linear layers but the LM head in 4 or 8 bits (needs a CUDA GPU and the extra 'quant')."
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = option(
        "sdpa", "Attention; flash_attention_2 needs a GPU and the extra 'flash'."
    )
    mask_token_id: int | None = option(None, "The mask token; none: as the checkpoint names it.")
    shift_logits: bool = option(
        False, "Whether a transformers model's logits predict the next position's token (LLaDA and Dream say it)."
    )
    block_size: int | None = option(
        None,
        "Tokens of a block-causal model's blocks; 0: it has none, and full attention; none: as its config.json says.",
    )

    def loading(self) -> dict[str, Any]:
        """The fields that :func:`dopsd.models.load_model` takes."""
        return {f.name: getattr(self, f.name) for f in fields(LoadArguments) if f.name != "adapter"}


@dataclass
class ModelArguments(LoadArguments):
    """Which model is taught, and its adapter."""

    _argument_group_name: ClassVar[str] = "model"

    recipe: str | None = option(
        None,
        "A recipe that ships (tiny, tiny-causal, paper, block_causal, reference) or a YAML file of options, over those "
        "of the recipe that it names (or of its model's); none: its model's, which is paper for most.",
    )
    full_finetune: bool = option(False, "Train a copy of all weights but embedding and LM head; no LoRA.")
    lora_r: int = option(128, "LoRA rank.")
    lora_alpha: int = option(64, "LoRA scale: the update is multiplied by alpha / r.")
    lora_dropout: float = option(0.05, "Dropout on LoRA inputs, while training only.")
    lora_targets: list[str] | None = option(
        None, "Linear layers to adapt, or 'reference' (q, k, v and up, as the authors' code does); none: all of them."
    )

    def __post_init__(self) -> None:
        at_least_one(self, "lora_r", "lora_alpha")
        must_be(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "in [0, 1)")
        whole = self.quantize == "none" or not self.full_finetune
        require(whole, "quantize", self.quantize, "weights that full_finetune trains are not quantised")

    def student(self, base: DiffusionModel) -> PeftModel:
        """``base`` with the adapter to train: the one that is named, or a :meth:`fresh` one."""
        if self.adapter is not None:
            student = load_adapter(base, self.adapter, trainable=True)
            own = has_copies(student)
            hint = f"adapter={self.adapter!r} {'has all weights' if own else 'is LoRA'}, and is what is trained"
            require(own == self.full_finetune, "full_finetune", self.full_finetune, hint)
            return student
        return self.fresh(base)

    def fresh(self, base: DiffusionModel) -> PeftModel:
        """``base`` with a fresh adapter."""
        if self.full_finetune:
            return add_copies(base)
        return add_lora(base, self.lora_targets, self.lora_r, self.lora_alpha, self.lora_dropout)


@dataclass
class PromptArguments:
    """How a row becomes a prompt, in training and evaluation alike."""

    prompt_file: str | None = option(
        None,
        "Text file that asks instead of the task's own words: {column} is a row's, {{ and }} are braces; below a first "
        "line [system] it has a system's turn, up to a line [user].",
    )
    prefill: str | None = option(
        None, "Text behind the prompt (and the chat template's header) from which responses go on; no part of them."
    )
    prompt_sha256: str | None = field(init=False, default=None)  # of prompt_file, to be recorded along with it

    def __post_init__(self) -> None:
        if self.prompt_file is not None:
            self.prompt_sha256 = PromptFile.read(self.prompt_file).sha256

    def asking(self, task: Task, rows: Sequence[Row]) -> dict[str, Any]:
        """The fields that :class:`~dopsd.rollout.Decoder` takes; UsageError if some of ``rows`` can't be asked so."""
        prompt_file = None if self.prompt_file is None else PromptFile.read(self.prompt_file)
        if prompt_file is not None:
            prompt_file.check(task, rows)
        return {"prompt_file": prompt_file, "prefill": self.prefill or ""}


@dataclass
class TaskArguments(PromptArguments):
    """Which problems."""

    _argument_group_name: ClassVar[str] = "task"

    task: str = option("sudoku", TASK_HELP)
    grading: Grading = option("lenient", GRADING_HELP)
    train_file: str | None = option(None, "Training rows (csv, jsonl, parquet); none: the task's own.")
    validation_file: str | None = option(None, "Rows that choose the best adapter; none: the task's own.")
    test_file: str | None = option(None, "Held-out rows for accuracy before and after; none: the task's own.")
    train_problems: int = option(4096, "Training problems, at most, without train_file.")
    validation_problems: int = option(256, "Validation problems, at most, without validation_file.")
    eval_problems: int = option(768, "Held-out problems, at most: the first so many.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "train_problems", "validation_problems", "eval_problems")


@dataclass
class DecodingArguments:
    """How responses are decoded, in training and evaluation alike, beside their lengths."""

    remasking: Remasking = option("low_confidence", "What keeps a position masked.")
    threshold: float | None = option(None, "Reveal every token at least this probable (parallel decoding).")
    sub_block_length: int | None = option(None, "With a threshold: decode a block in parts of so many tokens.")
    stop_at_eos: bool = option(True, "Stop a sequence when all before its first end-of-text is revealed.")
    sampling_dtype: SamplingDtype = option("float32", "Of logits and noise when sampling.")
    cache: Cache = option(
        "none",
        "What a block's later steps take from its first when decoding: nothing (exact), the keys and values of all "
        "before the block, or of all but the block (exact for block-causal models).",
    )
    sequences_per_forward: int = option(256, "Sequences decoded at a time.")

    def sampling(self) -> dict[str, Any]:
        """The fields that :class:`~dopsd.sampler.Decoding` takes."""
        names = [f.name for f in fields(DecodingArguments) if f.name != "sequences_per_forward"]
        return {name: getattr(self, name) for name in names}


@dataclass
class RolloutArguments(DecodingArguments):
    """How the student decodes."""

    _argument_group_name: ClassVar[str] = "rollout"

    gen_length: int = option(256, "L: response length in tokens.")
    block_length: int = option(32, "B: tokens per block.")
    steps: int | None = option(None, "T: denoising steps; none: gen_length / 2.")
    pass_k: int = option(8, "Tries at each prompt: until one is correct; diffu_grpo and vrpo make all.")
    temperature: float = option(0.9, "Gumbel temperature of tries, but of the first where that has one of its own.")
    first_temperature: float = option(0.0, "Gumbel temperature of the first try; 0 is greedy.")
    all_tries: bool = option(False, "Make all tries at each prompt, and keep the best; of equal ones the last.")
    eval_tokens_per_step: list[int] = option([], "Also report held-out accuracy at these rates, greedy.")

    def __post_init__(self) -> None:
        at_least_one(self, "pass_k", "sequences_per_forward")
        must_be(
            self.pass_k == 1 or self.temperature > 0,
            "temperature",
            self.temperature,
            f"positive when pass_k={self.pass_k} allows for more than one try",
        )
        must_be(self.first_temperature >= 0, "first_temperature", self.first_temperature, "at least 0")
        given_once(self, "eval_tokens_per_step")
        for rate in self.eval_tokens_per_step:
            accepted = f"between 1 and block_length={self.block_length}"
            must_be(1 <= rate <= self.block_length, "eval_tokens_per_step", rate, accepted)
        self.decoding()

    def decoding(self, tokens_per_step: int | None = None) -> Decoding:
        """Greedy decoding as configured, or at another rate."""
        steps = self.steps if tokens_per_step is None else -(-self.gen_length // tokens_per_step)
        decoding = Decoding(self.gen_length, self.block_length, steps, **self.sampling())
        return decoding if tokens_per_step is None else replace(decoding, threshold=None, sub_block_length=None)

    def first_try(self) -> Decoding:
        """How a prompt's first try is decoded."""
        return replace(self.decoding(), temperature=self.first_temperature)


@dataclass
class TeachingArguments:
    """By which method the student learns; for d-OPSD, what the teacher sees and what is taught."""

    _argument_group_name: ClassVar[str] = "method"

    method: MethodName = option("d_opsd", "How the student learns.")
    teacher: TeacherKind = option("fixed", "The teacher's weights: as at the start, averaged, own.")
    ema_decay: float = option(0.99, "Share of an ema teacher kept at each update.")
    teacher_context: TeacherContext = option(
        "self_future", "Shown to the teacher: its own future tokens, or a reference solution in the prompt."
    )
    retain_ratio: float = option(0.25, "rho: share of the candidate tokens revealed to the teacher.")
    reveal_scope: RevealScope = option(
        "future_blocks",
        "Where candidates lie: behind the current block, anywhere, in it, or in a later state of the student.",
    )
    reveal_gap: int | None = option(1, "By how many steps later_state is later; none: when all is revealed.")
    reveal_tail: bool = option(True, "Whether tokens behind the first end-of-text are candidates, if decoded.")
    reveal_rounding: RevealRounding = option("nearest", "Of that share, to a whole number: the nearest, or down.")
    selection: Literal["teacher", "student"] = option("teacher", "Who chooses the positions K of a step.")
    confidence: Confidence = option("probability", "By what K is chosen.")
    divergence: Divergence = option("reverse_kl", "D(student || teacher).")
    beta: float = option(0.5, "Weight of the teacher in the mixture of jsd and of the skew divergences.")
    clip: float | None = option(0.05, "Upper bound on each vocabulary entry's contribution; none: no bound.")
    clip_form: Literal["plain", "nonnegative"] = option("plain", "The paper's contributions, or nonnegative ones.")
    top_k: int | None = option(None, "Restrict to the teacher's so many likeliest entries; none: full vocabulary.")
    tail: Literal["renormalize", "bucket"] = option(
        "renormalize", "With top_k: drop the rest, or keep it as one entry."
    )
    normalization: Literal["step_mean", "batchmean"] = option(
        "step_mean", "Mean over K and steps (Eq. 12), or sum over K and mean over steps."
    )
    skip_last_block: bool = option(False, "Leave the steps of the last block out.")
    skip_tail: bool = option(False, "Leave the steps out before which the text and its end are revealed.")
    correct_only: bool = option(True, "Train on responses graded at least score_threshold only.")
    score_threshold: float = option(1.0, "Least grade of a response that trains, or, with vrpo, is preferred.")
    learn_tail: bool = option(True, "Whether end-of-text behind the first is learnt too, up to gen_length.")
    mask_ratio: float = option(0.8, "Largest share of a window that is masked; the least rises to it.")
    entropy_weight: float = option(1.0, "Weight of the entropy of tokens that are predicted right.")
    advantage: Literal["mean", "standardized"] = option(
        "mean", "Rewards less their group's mean, or these over its standard deviation."
    )
    likelihood: Literal["one_step", "exact"] = option(
        "one_step", "Of a response's tokens: from one pass with all of it masked, or each from those before it."
    )
    prompt_mask: float = option(0.15, "Share of the prompt's tokens that are masked in a one-step pass.")
    share_prompt_mask: bool = option(False, "Whether a group has one mask of the prompt, and so one pass for all.")
    ratio_clip: float = option(0.5, "How far from 1 the ratio to the policy that responded still gains.")
    kl_weight: float = option(0.04, "Weight of the divergence from the policy at the start; 0: not computed.")
    elbo_draws: int = option(8, "Times, with a mask each, from which the ELBO of a response is estimated.")
    preference_beta: float = option(0.2, "By what a difference of ELBOs is multiplied inside the sigmoid.")
    sft_weight: float = option(0.05, "Weight of the cross-entropy per token of the response that is preferred.")
    updates_per_batch: int = option(1, "Updates per batch: each learns a slice of it; diffu_grpo's learn all.")
    equal_slices: bool = option(False, "Slices of (S - 1) // updates_per_batch of S states, as in the authors' code.")
    reuse: Reuse = option(
        "none",
        "What a block's other states take from its first: nothing (exact), the prompt's keys and values, or those of "
        "all but their block, whose reveal is then drawn once. For block-causal models block is exact, and takes all "
        "before the block from one pass over the final tokens.",
    )
    drift_samples: int = option(
        1, "States per trajectory and update whose drift, the KL that reuse makes on K, is measured; 0: none."
    )
    drift_limit: float | None = option(
        None, "Mean drift above which a trajectory is computed without reuse; none: no limit."
    )
    states_per_forward: int = option(128, "Denoising states per forward and backward.")
    memory_budget: str | None = option(
        None,
        "Memory that a process may use: GiB (24), or a share of its device's (0.8). Probes before the run then choose "
        "states_per_forward, sequences_per_forward, the ops' workspace and gradient_checkpointing, whatever else is "
        "said of these.",
    )

    def __post_init__(self) -> None:
        must_be_choices(self)
        must_be(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        must_be(0 <= self.score_threshold <= 1, "score_threshold", self.score_threshold, "in [0, 1]")
        must_be(0 < self.mask_ratio <= 1, "mask_ratio", self.mask_ratio, "above 0 and at most 1")
        must_be(self.entropy_weight >= 0, "entropy_weight", self.entropy_weight, "at least 0")
        at_least_one(self, "updates_per_batch", "states_per_forward", "elbo_draws")
        must_be(self.preference_beta > 0, "preference_beta", self.preference_beta, "positive")
        must_be(self.sft_weight >= 0, "sft_weight", self.sft_weight, "at least 0")
        must_be(self.drift_samples >= 0, "drift_samples", self.drift_samples, "at least 0")
        must_be(0 <= self.prompt_mask < 1, "prompt_mask", self.prompt_mask, "in [0, 1)")
        must_be(self.ratio_clip > 0, "ratio_clip", self.ratio_clip, "positive")
        must_be(self.kl_weight >= 0, "kl_weight", self.kl_weight, "at least 0")
        hint = "an exact likelihood masks nothing of the prompt"
        require(self.likelihood == "one_step" or not self.share_prompt_mask, "share_prompt_mask", True, hint)
        limit = self.drift_limit
        must_be(limit is None or limit >= 0, "drift_limit", limit, "at least 0, or none")
        require(
            limit is None or (self.drift_samples > 0 and self.reuse != "none"),
            "drift_limit",
            limit,
            "it goes with a reuse and with drift_samples of at least 1",
        )
        if self.memory_budget is not None:
            read_bytes("memory_budget", self.memory_budget, 1 << 62)  # the device is not known yet
        self.objective()

    def accepts(self, score: float) -> bool:
        """Whether a response with this grade is trained on."""
        return score >= (self.score_threshold if self.correct_only else 0.0)

    def objective(self) -> Objective:
        """The fields that define the loss, of a model that is not known yet."""
        return Objective(**{name: getattr(self, name) for name in OF_OBJECTIVE}, block_causal=None)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own, with the defaults that this method needs."""

    _argument_group_name: ClassVar[str] = "training (transformers.TrainingArguments)"

    output_dir: str | None = option(None, "Where everything is written; none: runs/DATE-TIME.")
    disable_tqdm: bool = option(False, "No progress bars, also on a terminal.")
    push_to_hub: bool = option(False, "Publish adapter and card (no checkpoints) as hub_model_id in the end.")
    ddp_timeout: int = option(
        1800,
        "Seconds after which a run on several processes ends if one of them is silent. How long work takes does not "
        "count, but it must be more than loading or writing the largest file takes.",
    )
    bf16: bool | None = option(  # type: ignore[assignment]
        None, "Compute in bf16 (autocast); none: where the GPU or CPU has it in hardware."
    )
    load_best_model_at_end: bool | None = option(  # type: ignore[assignment]
        None, "Leave the best adapter by validation, not the last; none: where checkpoints are saved at evaluations."
    )
    fsdp: str | None = option(
        None,
        "full_shard: the processes share weights, gradients and optimiser state; none: each has all of them.",
    )
    on_collapse: Literal["stop", "rollback", "ignore"] = option(
        "stop",
        "What is done when validation or first-try accuracy falls far below its best: end the run there, with the best "
        "adapter; go on from that one at half the learning rate; or only say so.",
    )
    collapse_threshold: float | None = option(
        None,
        "Fall of validation accuracy below its best that is a collapse (0.1: ten points); none: five points or three "
        "standard errors, whichever is more.",
    )
    figure_width: Literal["page", "column"] = option(
        "page", "Of pictures on paper: a page's text, or one of its two columns."
    )
    inspect_samples: int = option(
        16,
        "Trajectories kept with figures for python -m dopsd.inspect: of so many held-out problems before and after "
        "training, and one of so many updates; 0: none.",
    )

    def __post_init__(self) -> None:
        if self.output_dir is None:
            self.output_dir = time.strftime("runs/%Y%m%d-%H%M%S")
        for f in fields(self):
            check_numbers(f.name, getattr(self, f.name))
        for name in ("seed", "data_seed"):
            given = getattr(self, name)
            must_be(given is None or given >= 0, name, given, "at least 0")
        for name in ("save_steps", "eval_steps", "logging_steps"):
            given = getattr(self, name)
            must_be(given is None or float(given) > 0, name, given, "positive: updates, or below 1 a share of all")
        require_own_sharding(self.fsdp, fsdp_config=self.fsdp_config, deepspeed=self.deepspeed)
        must_be(self.ddp_timeout >= ranks.LOST, "ddp_timeout", self.ddp_timeout, f"at least {ranks.LOST:g} seconds")
        # transformers takes bf16 on a machine without an accelerator for a mistake unless this is said.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = self.saves_evaluations()
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "accuracy"
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_bf16(self.use_cpu)
        ranks.join(self.use_cpu, self.ddp_backend, timedelta(seconds=self.ddp_timeout))
        super().__post_init__()
        kwargs = self.gradient_checkpointing_kwargs
        accepted = "none: layers are checkpointed one by one, without re-entry"
        require(kwargs in (None, {"use_reentrant": False}), "gradient_checkpointing_kwargs", kwargs, accepted)
        self.remove_unused_columns = False
        self.label_names = []
        self.logging_nan_inf_filter = False
        at_least_one(self, "per_device_train_batch_size")
        limit = self.collapse_threshold
        must_be(limit is None or 0 < limit <= 1, "collapse_threshold", limit, "above 0 and at most 1, or none")
        hint = "validation accuracy is not measured with eval_strategy=no"
        require(limit is None or self.eval_strategy != "no", "collapse_threshold", limit, hint)
        require(
            self.on_collapse != "rollback" or (self.load_best_model_at_end and not self.save_only_model),
            "on_collapse",
            self.on_collapse,
            "it goes back to a checkpoint: it needs load_best_model_at_end, and all that a run goes on from in it",
        )
        must_be(self.inspect_samples >= 0, "inspect_samples", self.inspect_samples, "at least 0")
        accepted = "at least 1, or -1 for num_train_epochs"
        must_be(self.max_steps >= 1 or self.max_steps == -1, "max_steps", self.max_steps, accepted)
        require(
            self.gradient_accumulation_steps == 1,
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            "an update already accumulates every state of its batch; raise per_device_train_batch_size instead",
        )

    def _process_fsdp_args(self) -> None:
        """Nothing of accelerate's: it knows no FSDP on a CPU, where that of :mod:`dopsd.sharding` is the same."""
        self.fsdp_config = {}

    def saves_evaluations(self) -> bool:
        """Whether each checkpoint is saved at an evaluation, so that the best can be told."""
        if self.save_strategy == "best":
            return self.eval_strategy != "no"
        if self.eval_strategy != self.save_strategy or self.eval_strategy == "no":
            return False
        # Updates, or shares of all, as transformers compares them; a share is no multiple of a number of updates.
        save, evaluate = 1e6 * float(self.save_steps), 1e6 * float(self.eval_steps or self.logging_steps)
        return self.eval_strategy == "epoch" or ((save < 1e6) == (evaluate < 1e6) and save % evaluate == 0)


@dataclass
class SampleArguments(LoadArguments):
    """What ``python -m dopsd.sample`` completes."""

    _argument_group_name: ClassVar[str] = "sample"

    model: str = option(
        "tiny", "'tiny', 'tiny-causal', a run's folder, a model's folder in Hugging Face layout, or a hub id."
    )
    prompt: list[str] = option([], "Prompts, each completed; a user's turn where the model has a chat template.")
    prompt_lines: str | None = option(None, "Text file with a prompt a line.")
    prefill: str | None = option(None, "Text behind each prompt from which completions go on; none: the run's.")
    temperature: float = option(0.0, "Gumbel temperature; 0 is greedy.")
    seed: int = option(0, "Of what is drawn.")
    gen_length: int | None = option(None, "Response length in tokens; none: the run's, or that of the model's recipe.")
    block_length: int | None = option(None, "Tokens per block; none: likewise.")
    steps: int | None = option(None, "Denoising steps; none: as many tokens a step, likewise.")
    show: bool = option(False, "Draw the decoding step by step: a dot is a masked token, and new ones are marked.")

    def __post_init__(self) -> None:
        must_be(self.seed >= 0, "seed", self.seed, "at least 0")
        require(bool(self.prompt or self.prompt_lines), "prompt", self.prompt, "give some, or prompt_lines")

    def decoding(self) -> dict[str, Any]:
        """What :meth:`dopsd.generate.Model.generate` is told about lengths."""
        given = {name: getattr(self, name) for name in ("gen_length", "block_length", "steps")}
        return {name: value for name, value in given.items() if value is not None}
