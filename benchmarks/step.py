"""One update of a model of LLaDA-8B's shape with random weights: where its time goes, and what plain code would take.

The trajectory is made up: 128 states, two random tokens a step. What is random changes neither shapes nor arithmetic.
Phases are those of `dopsd.trainer`: the teacher's pass with its choice of K, the student's pass with the loss and the
backward, and the optimiser. ``plain`` is what straightforward code does with the same states: logits and softmax of
every position, on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.measure import attempt
from benchmarks.problems import DEVICE
from benchmarks.results import Recorder, Row, dtype_name, figures
from dopsd.confidence import most_confident
from dopsd.config import ModelArguments, TeachingArguments
from dopsd.models.llada import LLaDAConfig, LLaDAModelLM
from dopsd.objective import Objective
from dopsd.rollout import Decoder, Rollout
from dopsd.sampler import Decoding, decode
from dopsd.step_batch import Inputs, Lesson, Reuse, StepBatch, step_batches
from dopsd.teacher import TeacherWeights
from dopsd.trainer import with_adapter
from dopsd.trajectory import Trajectory

ROUNDS = 3


@dataclass(frozen=True)
class Setting:
    """Sizes of the model and of the update."""

    config: LLaDAConfig
    dtype: torch.dtype
    lora_r: int
    prompt: int
    response: int
    block: int
    sizes: tuple[int, ...]  # states of a micro-batch; plain code gets the first

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.response, self.block, stop_at_eos=False)


LLADA_8B = Setting(LLaDAConfig(), torch.bfloat16, 128, prompt=200, response=256, block=32, sizes=(16, 64))
REHEARSED = Setting(
    LLaDAConfig(
        vocab_size=64,
        d_model=32,
        n_layers=2,
        n_heads=2,
        mlp_hidden_size=48,
        max_sequence_length=64,
        mask_token_id=63,
        eos_token_id=62,
        pad_token_id=62,
    ),
    torch.float32,
    4,
    prompt=5,
    response=16,
    block=8,
    sizes=(4, 8),
)


class Stopwatch:
    """Seconds by phase; on a GPU, work that was begun before or in a phase is waited for at its ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start


class TimedTeacher(TeacherWeights):
    """The teacher, whose passes are timed."""

    stopwatch: Stopwatch

    @contextmanager
    def active(self) -> Iterator[None]:
        with self.stopwatch.phase("teacher"), super().active():
            yield


# (the network, the teacher, the states, the mask token) -> the loss
Forward = Callable[[Any, TeacherWeights, StepBatch, int], Tensor]


class Student:
    """The model with its adapter, optimiser and fixed teacher, and the update's only lesson."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device, config = setting, device, setting.config
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(setting.dtype)
        try:
            with device:
                self.network = LLaDAModelLM(config)
        finally:
            torch.set_default_dtype(default)
        self.parameters = sum(p.numel() for p in self.network.parameters())
        self.model = with_adapter(self.network, ModelArguments(lora_r=setting.lora_r))
        self.network.gradient_checkpointing_enable({"use_reentrant": False})
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        fused = device.type == "cuda"  # as transformers' default optimiser is
        self.optimizer = torch.optim.AdamW(self.trained, lr=5e-6, betas=(0.9, 0.99), weight_decay=0.1, fused=fused)
        self.teacher = TimedTeacher(self.model, "fixed", 0.0, from_adapter=False)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(setting.config.vocab_size - 2, (setting.prompt + setting.response,), generator=generator)
        prompt, response = tokens.split([setting.prompt, setting.response])
        # Two positions of a block at a time, in a random order.
        rank = torch.rand(setting.response // setting.block, setting.block, generator=generator).argsort(-1).flatten()
        block = torch.arange(setting.response) // setting.block
        self.trajectory = Trajectory(prompt, response, (block * setting.block + rank) // 2, setting.block)

    def autocast(self) -> Any:
        """As the trainer does for 16-bit weights."""
        if self.setting.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.setting.dtype)

    def lesson(self, objective: Objective) -> Lesson:
        """What the teacher sees at each step, drawn as in training."""
        mask_id, eos_id = self.special_ids()
        decoder = Decoder(self.network, None, Any, mask_id, eos_id, 1)  # type: ignore[arg-type]
        return objective.lesson(Rollout({}, self.trajectory, "", 1.0, 1), decoder, 0)

    def special_ids(self) -> tuple[int, int]:
        """The mask and the end-of-text token."""
        config: Any = self.setting.config
        return config.mask_token_id, config.eos_token_id

    def batches(self, objective: Objective, size: int) -> Iterator[StepBatch]:
        """The update's states in micro-batches."""
        mask_id, eos_id = self.special_ids()
        lessons = [self.lesson(objective)]
        return step_batches(lessons, size, reuse=objective.reuse, mask_id=mask_id, pad_id=eos_id, device=self.device)

    def update(self, batches: Iterator[StepBatch], forward: Forward) -> dict[str, float]:
        """One optimiser update as in the trainer; its seconds by phase."""
        stopwatch = self.teacher.stopwatch = Stopwatch(self.device)
        self.model.train()
        with stopwatch.phase("update"):
            for batch in batches:
                with self.autocast():
                    loss = forward(self.network, self.teacher, batch, self.special_ids()[0])
                loss.backward()
            with stopwatch.phase("optimiser"):
                torch.nn.utils.clip_grad_norm_(self.trained, 0.2)
                self.optimizer.step()
                self.optimizer.zero_grad()
        seconds = stopwatch.seconds
        return {**seconds, "student": seconds["update"] - seconds["teacher"] - seconds["optimiser"]}


# ------------------------------------------------------------------------------------------------------------
# Plain code
# ------------------------------------------------------------------------------------------------------------


def plain_forward(objective: Objective) -> Forward:
    """The paper's loss (reverse KL, clipped, mean over K and steps) by logits and softmaxes of every position."""

    def forward(network: Any, teacher: TeacherWeights, batch: StepBatch, mask_id: int) -> Tensor:
        assert isinstance(batch.teacher, Inputs) and isinstance(batch.student, Inputs)
        with teacher.active():
            log_t = network(batch.teacher.input_ids, batch.teacher.attention_mask).logits.float().log_softmax(-1)
            probability = log_t.exp()
            probability[..., mask_id] = 0  # the mask token is no choice
            surest = probability.max(-1).values.gather(1, batch.columns + batch.teacher.offset)
            chosen = most_confident(surest, batch.candidates, batch.k)
        log_s = network(batch.student.input_ids, batch.student.attention_mask).logits.float().log_softmax(-1)
        contributions = log_s.exp() * (log_s - log_t)
        divergence = contributions.clamp(max=objective.clip).sum(-1)  # (S, P + L)
        of_block = divergence.gather(1, batch.columns + batch.student.offset)
        of_state = (of_block * chosen).sum(-1) / chosen.sum(-1).clamp_min(1)
        return (of_state * batch.weight).sum()

    return forward


@torch.no_grad()
def plain_decode(network: Any, prompt: Tensor, decoding: Decoding, mask_id: int) -> Tensor:
    """Greedy decoding of one response with the logits of every position at every step."""
    tokens = torch.cat((prompt, prompt.new_full((decoding.gen_length,), mask_id)))[None]
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    for block, schedule in enumerate(decoding.schedule()):
        end = len(prompt) + (block + 1) * decoding.block_length
        for reveals in schedule:
            logits = network(tokens).logits.float()
            logits[..., mask_id] = -torch.inf
            confidence, choice = logits.softmax(-1).max(-1)
            confidence = confidence.masked_fill((tokens != mask_id) | (positions >= end), -torch.inf)
            places = confidence.topk(reveals).indices
            tokens.scatter_(1, places, choice.gather(1, places))
    return tokens[0, len(prompt) :]


# ------------------------------------------------------------------------------------------------------------
# Arithmetic
# ------------------------------------------------------------------------------------------------------------


def fed(inputs: Any) -> tuple[int, int]:
    """Return how many tokens a pass computes, and how many pairs of a query and a key its attention has."""
    if isinstance(inputs, Inputs):
        states, length = inputs.input_ids.shape
        return states * length, states * length**2
    tokens, pairs = fed(inputs.anchors)
    packed, own = inputs.packed, inputs.packed.input_ids.shape[1]
    keys = packed.prefix_mask.sum(-1)[packed.anchor] + own
    return tokens + packed.input_ids.numel(), pairs + own * int(keys.sum())


def network_flops(config: Any, tokens: int, pairs: int, read: int) -> tuple[int, int]:
    """Return what a pass multiplies by weights, and in its attention; the last layer's outputs are needed when read."""
    width, layers = config.d_model, config.n_layers
    key_width = width // config.n_heads * config.n_kv_heads
    when_read = 2 * width**2 + 3 * width * config.mlp_hidden_size
    everywhere = layers * (when_read + 2 * width * key_width) - when_read
    weights = 2 * (everywhere * tokens + when_read * read)
    return weights, 4 * width * (pairs * (layers - 1) + pairs * read // tokens)


def update_needs(student: Student, batches: Sequence[StepBatch]) -> dict[str, Row]:
    """Return what every phase of an update needs, by phase.

    A pass over frozen weights costs as much backwards as forwards, attention twice as much, the adapter twice. The head
    is needed at the teacher's candidates, and at K for both sides and for the gradient.
    """
    config: Any = student.setting.config
    trained = sum(p.numel() for p in student.trained)
    head = 2 * config.d_model * config.vocab_size
    teacher = own = tokens = teacher_tokens = 0
    for batch in batches:
        count, pairs = fed(batch.teacher)
        teacher += sum(network_flops(config, count, pairs, batch.columns.numel()))
        teacher += head * len(batch.candidate_index)
        teacher_tokens += count
        count, pairs = fed(batch.student)
        chosen = int(batch.rows_by_confidence.sum())
        weights, attention = network_flops(config, count, pairs, chosen)
        own += 2 * weights + 3 * attention + 3 * 2 * trained * count + 3 * head * chosen
        tokens += count
    # AdamW reads parameter, gradient and two moments, and writes all but the gradient.
    moved = 7 * sum(p.numel() * p.itemsize for p in student.trained)
    return {
        "teacher": {"tokens": teacher_tokens, "flops": teacher},
        "student": {"tokens": tokens, "flops": own},
        "optimiser": {"tokens": 0, "bytes": moved},
        "update": {"tokens": tokens + teacher_tokens, "flops": teacher + own},
    }


def rollout_needs(student: Student) -> Row:
    """Return what decoding one response needs: a pass per step, and the head at the block's masked positions."""
    setting, config = student.setting, student.setting.config
    length = setting.prompt + setting.response
    trained = sum(p.numel() for p in student.trained)
    flops = tokens = 0
    for schedule in setting.decoding.schedule():
        for step in range(len(schedule)):
            masked = sum(schedule[step:])
            flops += sum(network_flops(config, length, length**2, masked)) + 2 * trained * length
            flops += 2 * config.d_model * config.vocab_size * masked
            tokens += length
    return {"tokens": tokens, "flops": flops}


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


def objective(reuse: Reuse = "none") -> Objective:
    """The paper's, with what a block's states may reuse of its first."""
    return TeachingArguments(clip=0.05, reveal_scope="masked", reuse=reuse).objective()


@dataclass(frozen=True)
class Trial:
    """One way to do the update."""

    provider: str
    reuse: Reuse
    size: int

    def about(self, student: Student | None, setting: Setting, phase: str, status: str) -> Row:
        """The columns that say what a row is about."""
        sizes = {}
        if student is not None:
            sizes = {"parameters": student.parameters, "trained": sum(p.numel() for p in student.trained)}
        return {
            "part": "step",
            "provider": self.provider,
            "variant": "" if self.reuse == "none" else f"reuse={self.reuse}",
            "states_per_forward": self.size,
            "phase": phase,
            "prefix": setting.prompt,
            "length": setting.response,
            "states": setting.decoding.total_steps,
            "dtype": dtype_name(setting.dtype),
            "status": status,
            **sizes,
        }


def trials(setting: Setting) -> list[Trial]:
    """Ours and plain code at equal micro-batches first, then every kind of reuse, then larger micro-batches."""
    ours = [Trial("ours", reuse, size) for size in setting.sizes for reuse in get_args(Reuse)]
    return [ours[0], Trial("plain", "none", setting.sizes[0]), *ours[1:]]


def measure(recorder: Recorder, until: float, rehearsal: bool) -> bool:
    """Write a row per trial and phase; return whether all of ours ran."""
    setting = REHEARSED if rehearsal else LLADA_8B
    built: list[Student] = []
    status = attempt(lambda: built.append(Student(setting, DEVICE)))
    if not built:
        recorder.add([trial.about(None, setting, "update", status) for trial in trials(setting)])
        return not status.startswith("failed")
    student, fine = built[0], True
    for provider in ("ours", "plain"):
        fine &= measure_rollout(recorder, student, provider, until)
    for trial in trials(setting):
        fine &= measure_update(recorder, student, trial, until)
    return fine


def measure_rollout(recorder: Recorder, student: Student, provider: str, until: float) -> bool:
    """Time a whole response, decoded greedily; return whether it ran, or had no time or memory to."""
    mask_id, eos_id = student.special_ids()
    prompt = student.trajectory.prompt_ids.to(student.device)
    decoding, seeds = student.setting.decoding, torch.zeros(1, dtype=torch.int64)
    found: list[float] = []

    def action() -> None:
        student.model.eval()
        for _ in range(1 + ROUNDS):
            if len(found) > 1 and time.time() > until:
                break
            stopwatch = Stopwatch(student.device)
            with stopwatch.phase("rollout"), student.autocast():
                if provider == "ours":
                    decode(student.network, [prompt], decoding, mask_id=mask_id, eos_id=eos_id, seeds=seeds)
                else:
                    plain_decode(student.network, prompt, decoding, mask_id)
            found.append(stopwatch.seconds["rollout"])

    status = attempt(action) if time.time() < until else "out of time"
    about = Trial(provider, "none", 1).about(student, student.setting, "rollout", status)
    if status == "ok":
        about |= {**figures(found[1:], None), **rollout_needs(student)}
    recorder.add([about])
    return not status.startswith("failed")


def measure_update(recorder: Recorder, student: Student, trial: Trial, until: float) -> bool:
    """Time updates of one kind, by phase; return whether it ran, or had no time or memory to."""
    goal = objective(trial.reuse)
    forward: Forward = lambda *inputs: goal.forward(*inputs).loss  # noqa: E731
    if trial.provider == "plain":
        forward = plain_forward(goal)
    found: list[dict[str, float]] = []
    total: list[int | None] = [None]
    cuda = student.device.type == "cuda"

    def action() -> None:
        # One micro-batch and an optimiser step: compiles, and makes what the optimiser keeps.
        student.update(iter([next(student.batches(goal, trial.size))]), forward)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(ROUNDS):
            if found and time.time() + found[-1]["update"] > until:
                break
            found.append(student.update(student.batches(goal, trial.size), forward))
        if cuda:
            total[0] = torch.cuda.max_memory_allocated()

    status = attempt(action) if time.time() < until else "out of time"
    if status != "ok":
        student.optimizer.zero_grad()
        recorder.add([trial.about(student, student.setting, "update", status)])
        return not (status.startswith("failed") and trial.provider == "ours")
    for phase, needs in update_needs(student, list(student.batches(goal, trial.size))).items():
        row = trial.about(student, student.setting, phase, status)
        row |= {**figures([seconds[phase] for seconds in found], None), **needs, "total_bytes": total[0]}
        recorder.add([row])
    return True
