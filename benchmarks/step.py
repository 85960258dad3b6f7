"""One update of a model of LLaDA-8B's shape with random weights, and the rollout before it: time, arithmetic, memory.

The trajectory is made up: 128 states, two random tokens a step; what they are changes neither shapes nor arithmetic.
Phases are those of `dopsd.trainer`: the teacher's pass with its choice of K, the student's pass with the loss and the
backward, and the optimiser. ``plain`` is what straightforward code does with the same states: logits and softmax of
every position, on both sides. Ours comes with every kind of reuse and cache, and with the linear layers in NF4.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.utils import is_bitsandbytes_available

from benchmarks.measure import Trial, ceilings, interleave, of_ceiling, rates
from benchmarks.results import DEVICE, Recorder, Row
from dopsd.cache import Cache
from dopsd.confidence import most_confident
from dopsd.config import ModelArguments, TeachingArguments
from dopsd.memory.probe import synthetic_trajectory
from dopsd.models import quantization
from dopsd.models.llada import LLaDAConfig, LLaDAModelLM
from dopsd.objective import Objective
from dopsd.sampler import Decoding, decode
from dopsd.step_batch import Inputs, Reuse, StepBatch, step_batches
from dopsd.teacher import TeacherWeights

ROUNDS = 3

Quantize = Literal["none", "nf4"]


@dataclass(frozen=True)
class Setting:
    """Sizes of the model and of the update."""

    config: Any
    dtype: torch.dtype
    lora_r: int
    prompt: int
    response: int
    block: int
    sizes: tuple[int, ...]  # states of a micro-batch; plain code gets the first

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.response, self.block, stop_at_eos=False)


_OF_8B: dict[str, float] = {"mlp_hidden_size": 12288, "rope_theta": 500000.0, "weight_tying": False}
LLADA_8B = Setting(LLaDAConfig(**_OF_8B), torch.bfloat16, 128, prompt=200, response=256, block=32, sizes=(16, 64))
_TOKENS: dict[str, int] = {"vocab_size": 64, "mask_token_id": 63, "eos_token_id": 62, "pad_token_id": 62}
# NF4 has blocks of 64 weights.
_SMALL: dict[str, int] = {"d_model": 64, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 128, "max_sequence_length": 64}
REHEARSED = Setting(
    LLaDAConfig(**_TOKENS, **_SMALL, weight_tying=False), torch.float32, 4, prompt=5, response=16, block=8, sizes=(4, 8)
)


class Stopwatch:
    """Seconds by phase and, on a GPU, the most memory in use; what is in a phase within another counts for that alone.

    On a GPU, work that was begun before or in a phase is waited for at its ends.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.running: list[str] = []
        self.start = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.lap()
        self.running.append(name)
        yield
        self.lap()
        self.running.pop()

    def lap(self) -> None:
        """Count what was since the last lap for the phase that is running."""
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        for name in self.running[-1:]:
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.start
            if self.cuda:
                self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated())
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def total(self, name: str) -> None:
        """Count all phases so far as one: its time is their sum, and its peak their highest."""
        self.seconds[name] = sum(self.seconds.values())
        if self.cuda:
            self.peaks[name] = max(self.peaks.values())


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
    """The model with its adapter, optimiser and fixed teacher."""

    def __init__(self, setting: Setting, device: torch.device, quantize: Quantize = "none") -> None:
        self.setting, self.device = setting, device
        self.mask_id, self.eos_id = setting.config.mask_token_id, setting.config.eos_token_id
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(setting.dtype)
        try:
            with device:
                self.network = LLaDAModelLM(setting.config)
        finally:
            torch.set_default_dtype(default)
        self.parameters = sum(p.numel() for p in self.network.parameters())
        if quantize == "nf4":
            to_nf4(self.network)
        self.model = ModelArguments(lora_r=setting.lora_r).student(self.network)
        self.network.gradient_checkpointing_enable({"use_reentrant": False})
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        fused = device.type == "cuda"  # as transformers' default optimiser is
        self.optimizer = torch.optim.AdamW(self.trained, lr=5e-6, betas=(0.9, 0.99), weight_decay=0.1, fused=fused)
        self.teacher = TimedTeacher(self.model, "fixed", 0.0, from_adapter=False)
        self.prompt = torch.arange(setting.prompt)

    def autocast(self) -> torch.autocast:
        """As the trainer does for 16-bit weights."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting.dtype == torch.bfloat16)

    def batches(self, objective: Objective, size: int) -> Iterator[StepBatch]:
        """The update's states in micro-batches; what the teacher sees at each step is drawn as in training."""
        vocab = self.setting.config.vocab_size - 2
        trajectory = synthetic_trajectory(self.prompt, self.setting.decoding, vocab, self.eos_id)
        example = objective.example(trajectory, self.prompt, eos_id=self.eos_id, seed=0)
        ids = {"mask_id": self.mask_id, "pad_id": self.eos_id}
        return step_batches([example], size, reuse=objective.reuse, device=self.device, **ids)

    def rollout(self, provider: str, cache: Cache) -> Stopwatch:
        """One whole response, decoded greedily."""
        prompt, seeds = self.prompt.to(self.device), torch.zeros(1, dtype=torch.int64)
        decoding = replace(self.setting.decoding, cache=cache)
        stopwatch = Stopwatch(self.device)
        self.model.eval()
        with stopwatch.phase("rollout"), self.autocast():
            if provider == "plain":
                plain_decode(self.network, prompt, decoding, self.mask_id)
            else:
                decode(self.network, [prompt], decoding, mask_id=self.mask_id, eos_id=self.eos_id, seeds=seeds)
        return stopwatch

    def update(self, batches: Iterator[StepBatch], forward: Forward) -> Stopwatch:
        """One optimiser update as in the trainer, by phase."""
        stopwatch = self.teacher.stopwatch = Stopwatch(self.device)
        self.model.train()
        with stopwatch.phase("student"):
            for batch in batches:
                with self.autocast():
                    loss = forward(self.network, self.teacher, batch, self.mask_id)
                loss.backward()
        with stopwatch.phase("optimiser"):
            torch.nn.utils.clip_grad_norm_(self.trained, 0.2)
            self.optimizer.step()
            self.optimizer.zero_grad()
        stopwatch.total("update")
        return stopwatch


def to_nf4(network: Any) -> None:
    """Store the linear layers but the LM head as ``--quantize nf4`` does; of one layer at a time there are two copies.

    transformers' own loading does this from a checkpoint only.
    """
    from bitsandbytes.nn import Params4bit
    from transformers.integrations import replace_with_bnb_linear

    for layer in network.layers:
        weights = {name: module.weight for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        replace_with_bnb_linear(layer, quantization_config=quantization("nf4"))  # without weights
        for name, weight in weights.items():
            module = layer.get_submodule(name)
            module.weight = Params4bit(weight.data, **vars(module.weight)).to(weight.device)
    network.is_loaded_in_4bit = True  # read by PEFT


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
            confidence = probability.max(-1).values.gather(1, batch.columns + batch.teacher.offset)
            chosen = most_confident(confidence, batch.candidates, batch.k)
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


def pairs_of(inputs: Any) -> int:
    """How many pairs of a query and a key the attention of a pass has."""
    if isinstance(inputs, Inputs):
        states, length = inputs.input_ids.shape
        return states * length**2
    packed, own = inputs.packed, inputs.packed.input_ids.shape[1]
    keys = packed.prefix_mask.sum(-1)[packed.anchor] + own
    return pairs_of(inputs.anchors) + own * int(keys.sum())


def network_flops(config: Any, tokens: int, pairs: int, read: int, rank: int = 0) -> tuple[int, int, int]:
    """Return what a pass multiplies by weights, by an adapter of this rank, and in its attention.

    The last layer's outputs are needed at the positions that are read.
    """
    width, hidden, layers = config.d_model, config.mlp_hidden_size, config.n_layers
    key_width = width // config.n_heads * config.n_kv_heads

    def products(size: Callable[[int, int], int]) -> int:
        everywhere = 2 * size(width, key_width)
        when_read = 2 * size(width, width) + 3 * size(width, hidden)
        return 2 * (tokens * (layers * (everywhere + when_read) - when_read) + read * when_read)

    weights = products(lambda fan_in, fan_out: fan_in * fan_out)
    adapter = products(lambda fan_in, fan_out: rank * (fan_in + fan_out))
    return weights, adapter, 4 * width * (pairs * (layers - 1) + pairs * read // tokens)


def update_needs(student: Student, batches: Sequence[StepBatch]) -> dict[str, Row]:
    """Return what every phase of an update needs, by phase.

    A pass over frozen weights costs as much backwards as forwards, attention and the adapter twice as much. The head is
    needed at the teacher's candidates, and at K for both sides and for the gradient.
    """
    config, rank = student.setting.config, student.setting.lora_r
    teacher, own = {"tokens": 0, "flops": 0}, {"tokens": 0, "flops": 0}
    head = 2 * config.d_model * config.vocab_size
    for batch in batches:
        looked_at, chosen = batch.columns.numel(), int(batch.rows_by_confidence.sum())
        teacher["tokens"] += batch.teacher.tokens
        teacher["flops"] += sum(network_flops(config, batch.teacher.tokens, pairs_of(batch.teacher), looked_at))
        teacher["flops"] += head * len(batch.candidate_index)
        weights, *others = network_flops(config, batch.student.tokens, pairs_of(batch.student), chosen, rank)
        own["tokens"] += batch.student.tokens
        own["flops"] += 2 * weights + 3 * (sum(others) + head * chosen)
    # AdamW reads parameter, gradient and two moments, and writes all but the gradient.
    moved = 7 * sum(p.numel() * p.itemsize for p in student.trained)
    update = {name: teacher[name] + own[name] for name in own}
    return {"teacher": teacher, "student": own, "optimiser": {"tokens": 0, "bytes": moved}, "update": update}


def rollout_needs(setting: Setting, cache: Cache) -> Row:
    """Return what decoding one response needs: a pass per step, and the head at the block's masked positions.

    With a cache, a block's later steps compute the block alone (``block``) or all from its start on (``prefix``), and
    these tokens attend to all.
    """
    config, length = setting.config, setting.prompt + setting.response
    flops = tokens = 0
    for block, schedule in enumerate(setting.decoding.schedule()):
        behind = setting.response - block * setting.block
        later = {"none": length, "prefix": behind, "block": setting.block}[cache]
        for step in range(len(schedule)):
            own = later if step else length
            masked = sum(schedule[step:])
            flops += sum(network_flops(config, own, own * length, masked, setting.lora_r))
            flops += 2 * config.d_model * config.vocab_size * masked
            tokens += own
    return {"tokens": tokens, "flops": flops}


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


def objective(reuse: Reuse = "none") -> Objective:
    """The paper's, with what a block's states may reuse of its first."""
    return TeachingArguments(clip=0.05, reveal_scope="masked", reuse=reuse).objective()


@dataclass(frozen=True)
class Way:
    """One way to do the update, or the rollout before it."""

    provider: Literal["ours", "plain"]
    size: int  # states of a micro-batch; of a rollout, sequences
    phase: Literal["update", "rollout"] = "update"
    reuse: Reuse = "none"  # of an update of ours
    cache: Cache = "none"  # of a rollout of ours
    quantize: Quantize = "none"  # the student's linear layers

    def run(self, student: Student, short: bool = False) -> Stopwatch:
        """Do it once. A short update has one micro-batch: it compiles, and makes what the optimiser keeps."""
        if self.phase == "rollout":
            return student.rollout(self.provider, self.cache)
        goal = objective(self.reuse)
        forward: Forward = lambda *inputs: goal.forward(*inputs).loss  # noqa: E731
        if self.provider == "plain":
            forward = plain_forward(goal)
        return student.update(islice(student.batches(goal, self.size), 1 if short else None), forward)

    def needs(self, student: Student) -> dict[str, Row]:
        """What each of its phases needs."""
        if self.phase == "rollout":
            return {"rollout": rollout_needs(student.setting, self.cache)}
        return update_needs(student, list(student.batches(objective(self.reuse), self.size)))

    def about(self, setting: Setting, status: str = "ok") -> Row:
        """The columns that say what its row is about."""
        options = {"quantize": self.quantize, "reuse": self.reuse, "cache": self.cache}
        return {
            "part": "step",
            "provider": self.provider,
            "variant": ", ".join(f"{name}={kind}" for name, kind in options.items() if kind != "none"),
            "states_per_forward": self.size,
            "phase": self.phase,
            "prefix": setting.prompt,
            "length": setting.response,
            "states": setting.decoding.total_steps,
            "dtype": str(setting.dtype).removeprefix("torch."),
            "status": status,
        }


def ways(setting: Setting) -> list[Way]:
    """What tells most comes first: ours and plain code at equal micro-batches, rollouts, NF4, then the rest."""
    size, *larger = setting.sizes
    caches: tuple[Cache, ...] = ("block", "none", "prefix")
    return [
        Way("ours", size),
        Way("plain", size),
        Way("ours", size, reuse="block"),
        Way("plain", 1, "rollout"),
        *(Way("ours", 1, "rollout", cache=cache) for cache in caches),
        Way("ours", size, quantize="nf4"),
        Way("ours", size, reuse="block", quantize="nf4"),
        Way("ours", size, reuse="prompt"),
        *(Way("ours", size, reuse=reuse) for size in larger for reuse in get_args(Reuse)),
    ]


def measure(recorder: Recorder, until: float, rehearsal: bool) -> bool:
    """Write a row per way and phase; return whether all of ours ran, or had no time or memory to."""
    setting = REHEARSED if rehearsal else LLADA_8B
    left = [way for way in ways(setting) if recorder.new([way.about(setting)])]
    for quantize, group in groupby(list(left), lambda way: way.quantize):
        students: list[Student] = []
        built = Trial(lambda: students.append(Student(setting, DEVICE, quantize)))  # noqa: B023
        if quantize == "nf4" and not is_bitsandbytes_available():
            built.status = "skipped: bitsandbytes is not installed: pip install 'dopsd[quant]'"
        for way in group:
            recorder.announce([way.about(setting, built.status)])
            if built.status == "ok" and time.time() > until:
                built.status = "out of time"
            if not students:
                built.attempt(built.run)
            # Each has an equal share of the time that is left: further rounds of one must not cost another its first.
            enough = time.time() + (until - time.time()) / len(left)
            left.remove(way)
            if built.status == "ok":
                recorder.add(measure_way(students[0], way, enough, rehearsal))
            else:
                recorder.add([way.about(setting, built.status)])
        # Before the next student is built, this one goes.
        students.clear()
        gc.collect()
        torch.cuda.empty_cache()
    ours = [row["status"] for row in recorder.rows if (row["part"], row["provider"]) == ("step", "ours")]
    return not any(status.startswith("failed") for status in ours)


def measure_way(student: Student, way: Way, enough: float, rehearsal: bool) -> list[Row]:
    """Time a way: one round, and further ones that will have ended when it is ``enough``. A row for every phase."""
    found: list[Stopwatch] = []
    before, ceiling, about = 0, {}, way.about(student.setting)

    def rounds() -> None:
        nonlocal before, ceiling
        way.run(student, short=True)
        before = torch.cuda.memory_allocated()
        while len(found) < ROUNDS and not (found and time.time() + found[-1].seconds[way.phase] > enough):
            found.append(way.run(student))
            limits = ceilings(student.setting.dtype, rehearsal)
            interleave([trial for _, trial in limits.values()], 0.0, 3, 3)
            ceiling = rates(limits)
            del limits  # its memory is not the next round's

    trial = Trial(rounds)
    trial.attempt(rounds)
    if trial.status != "ok":
        student.optimizer.zero_grad()
        return [{**about, "status": trial.status}]
    sizes = {"parameters": student.parameters, "trained": sum(p.numel() for p in student.trained)}
    rows = []
    for phase, needs in way.needs(student).items():
        total = max((stopwatch.peaks[phase] for stopwatch in found if stopwatch.cuda), default=None)
        times = [(stopwatch.seconds[phase], None) for stopwatch in found]
        measured = Trial(rounds, times=times, peak_bytes=None if total is None else total - before).figures()
        row = {**about, "phase": phase, **sizes, **measured, **needs, "total_bytes": total}
        rows.append({**row, **of_ceiling(row, ceiling)})
    return rows
