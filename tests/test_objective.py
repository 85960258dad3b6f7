"""The objective against a literal transcription of Eq. 12, and what it must never compute."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.func import functional_call

from dopsd.models import add_lora
from dopsd.models.llada import LLaDAModelLM
from dopsd.objective import Objective, StepOutput
from dopsd.rollout import Rollout
from dopsd.step_batch import Example, step_batches
from dopsd.teacher import STUDENT, TeacherWeights
from dopsd.trajectory import NEVER, Trajectory
from dopsd_kernels.step_kl.divergences import DIVERGENCES

BLOCK, LENGTH, EOS = 4, 16, 0
DEFAULTS: dict[str, Any] = {
    "retain_ratio": 0.25,
    "reveal_scope": "future_blocks",
    "reveal_tail": True,
    "teacher_context": "self_future",
    "selection": "teacher",
    "confidence": "probability",
    "divergence": "reverse_kl",
    "beta": 0.5,
    "clip": 0.05,
    "clip_form": "plain",
    "top_k": None,
    "tail": "renormalize",
    "normalization": "step_mean",
    "skip_last_block": False,
}

# Commits per step, block by block. Numbers of states and of commits are powers of two, so that 1/T and 1/|K| are exact
# in any precision.
EVEN = ([[2, 1, 1], [2, 2], [2, 2], [2]], [[2, 2]] * 4, [[2, 2], [2, 1]])
STATES_EVEN = [8, 8, 4]


def make_trajectory(commits: Sequence[Sequence[int]], prompt: int, vocab: int, seed: int) -> Trajectory:
    """Random tokens revealed in a random order within each block; what is left over is the end-of-text tail."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab - 1, (LENGTH,), generator=generator)
    reveal_step = torch.full((LENGTH,), NEVER)
    step = 0
    for block, counts in enumerate(commits):
        order = (block * BLOCK + torch.randperm(BLOCK, generator=generator)).tolist()
        for count in counts:
            for _ in range(count):
                reveal_step[order.pop()] = step
            step += 1
    tokens[reveal_step == NEVER] = EOS
    return Trajectory(torch.randint(1, vocab - 1, (prompt,), generator=generator), tokens, reveal_step, BLOCK)


def make_rollouts(vocab: int, commits: Sequence[Sequence[Sequence[int]]] = EVEN) -> list[Rollout]:
    """Rollouts with prompts of different lengths."""
    return [
        Rollout({}, make_trajectory(counts, prompt, vocab, seed), "", 1.0, 1)
        for seed, (counts, prompt) in enumerate(zip(commits, (3, 6, 5), strict=True))
    ]


# One token longer than the longest prompt.
REFERENCE = torch.tensor([5, 4, 3, 2, 1, 2, 3])


def examples_of(options: Objective, rollouts: Sequence[Rollout]) -> list[Example]:
    """The examples of rollouts, each drawn from its number."""
    return [
        options.example(
            rollout.trajectory,
            REFERENCE if options.teacher_context == "reference" else rollout.trajectory.prompt_ids,
            eos_id=EOS,
            seed=seed,
        )
        for seed, rollout in enumerate(rollouts)
    ]


@dataclass
class Setup:
    """A student with a random adapter, its teacher, and the same two as plain weights that peft has no part in."""

    model: PeftModel
    network: Any
    teacher: TeacherWeights
    plain: LLaDAModelLM
    student_lora: dict[str, Tensor]  # leaves, by "<layer>.A" and "<layer>.B"
    teacher_lora: dict[str, Tensor] | None
    mask_id: int = field(init=False)

    def __post_init__(self) -> None:
        self.mask_id = self.plain.config.mask_token_id

    def weights(self, lora: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """W + (alpha / r) B A for every adapted layer."""
        weights = dict(self.plain.named_parameters())
        if lora is None:
            return weights
        for name in {key[:-2] for key in lora}:
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + SCALE * lora[f"{name}.B"] @ lora[f"{name}.A"]
        return weights


RANK, ALPHA = 3, 6
SCALE = ALPHA / RANK


def randomise(model: PeftModel, seed: int) -> None:
    """Give the student's adapter random values that change the network's output a good deal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{STUDENT}." in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.15 * noise)


def lora_of(model: PeftModel, adapter: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of an adapter's tensors, named by layer of the plain model."""
    found = {}
    for name, parameter in model.named_parameters():
        for side in "AB":
            ending = f".lora_{side}.{adapter}.weight"
            if name.endswith(ending):
                layer = name.removeprefix("base_model.model.").removesuffix(ending)
                found[f"{layer}.{side}"] = parameter.detach().to(dtype, copy=True)
    return found


def make_setup(
    small_llada: Callable[..., LLaDAModelLM], kind: str, dtype: torch.dtype = torch.float64, **changes: Any
) -> Setup:
    """``kind`` is fixed, from_adapter (a fixed teacher where the run starts from an adapter), ema or live."""
    network = small_llada(dtype=dtype, d_model=16, n_heads=2, **changes)
    plain = copy.deepcopy(network).double()
    model = add_lora(network, None, RANK, ALPHA, 0.0)
    randomise(model, 1)
    start = lora_of(model, STUDENT, torch.float64)
    teacher = TeacherWeights(
        model, "fixed" if kind == "from_adapter" else kind, 0.75, from_adapter=kind == "from_adapter"
    )
    randomise(model, 2)
    teacher.after_update()
    student = lora_of(model, STUDENT, torch.float64)
    seen = {
        "fixed": None,
        "from_adapter": start,
        "ema": {name: 0.75 * start[name] + 0.25 * student[name] for name in start},
        "live": {name: value.clone() for name, value in student.items()},
    }[kind]
    for value in student.values():
        value.requires_grad_(True)
    return Setup(model, network, teacher, plain, student, seen)


@dataclass
class Oracle:
    """What Eq. 12 gives, and the figures of every row of K in order of state and position."""

    loss: Any
    chosen: list[list[int]]
    divergence: list[float]
    clip_fraction: list[float]
    overlap: list[float]
    state_divergence: list[float]


def confidence_of(logits: Tensor, kind: str, mask_id: int) -> float:
    """The confidence of a row of logits, when the mask token cannot be chosen."""
    allowed = [value for index, value in enumerate(logits.tolist()) if index != mask_id]
    total = sum(math.exp(value) for value in allowed)
    probabilities = sorted((math.exp(value) / total for value in allowed), reverse=True)
    if kind == "logit":
        return max(allowed)
    if kind == "margin":
        return probabilities[0] - probabilities[1]
    if kind == "entropy":
        return sum(p * math.log(p) for p in probabilities)
    return probabilities[0]


def contributions_of(logits_s: Tensor, logits_t: Tensor, options: Objective) -> tuple[Tensor, Tensor]:
    """Each vocabulary entry's part of the divergence, as clipped and as it is."""
    if options.top_k is not None:
        order = sorted(range(len(logits_t)), key=lambda v: -float(logits_t[v].detach()))
        kept, rest = order[: options.top_k], order[options.top_k :]
        s, t = logits_s.softmax(-1), logits_t.softmax(-1)
        if options.tail == "renormalize":
            s, t = s[kept] / s[kept].sum(), t[kept] / t[kept].sum()
        else:
            s, t = torch.cat((s[kept], s[rest].sum()[None])), torch.cat((t[kept], t[rest].sum()[None]))
    else:
        s, t = logits_s.softmax(-1), logits_t.softmax(-1)
    m = (1 - options.beta) * s + options.beta * t
    exact, extra = {
        "reverse_kl": (s * (s / t).log(), t - s),
        "forward_kl": (t * (t / s).log(), s - t),
        "jsd": ((1 - options.beta) * s * (s / m).log() + options.beta * t * (t / m).log(), 0),
        "skew_reverse_kl": (s * (s / m).log(), m - s),
        "skew_forward_kl": (t * (t / m).log(), m - t),
    }[options.divergence]
    return (exact + extra if options.clip_form == "nonnegative" else exact), exact


def top(logits: Tensor, count: int) -> set[int]:
    """The ids of the largest entries."""
    return set(sorted(range(len(logits)), key=lambda v: -float(logits[v].detach()))[:count])


def eq12(setup: Setup, examples: Sequence[Example], options: Objective) -> Oracle:
    """Eq. 12 in loops: full logits of every state on its own, one divergence per position of K."""
    student, teacher = setup.weights(setup.student_lora), setup.weights(setup.teacher_lora)
    oracle = Oracle(torch.zeros((), dtype=torch.float64), [], [], [], [], [])
    for example in examples:
        trajectory = example.trajectory
        tokens, reveal_step = trajectory.tokens.tolist(), trajectory.reveal_step.tolist()
        losses = []
        for row, step in enumerate(example.steps.tolist()):
            state = [token if when < step else setup.mask_id for token, when in zip(tokens, reveal_step, strict=True)]
            shown = [tokens[i] if example.reveal[row, i] else state[i] for i in range(LENGTH)]
            student_prompt, teacher_prompt = trajectory.prompt_ids.tolist(), example.teacher_prompt_ids.tolist()
            ids = torch.tensor([student_prompt + state])
            student_logits = functional_call(setup.plain, student, (ids,)).logits[0, len(student_prompt) :]
            with torch.no_grad():
                ids = torch.tensor([teacher_prompt + shown])
                teacher_logits = functional_call(setup.plain, teacher, (ids,)).logits[0, len(teacher_prompt) :]

            committed = [i for i in range(LENGTH) if reveal_step[i] == step]
            start = committed[0] // BLOCK * BLOCK
            masked = [i for i in range(start, start + BLOCK) if shown[i] == setup.mask_id]
            if options.selection == "student":
                chosen = [i for i in committed if i in masked]
            else:
                confidence = {i: confidence_of(teacher_logits[i], options.confidence, setup.mask_id) for i in masked}
                chosen = sorted(sorted(masked, key=lambda i: -confidence[i])[: len(committed)])

            divergences, exact_sum = [], 0.0
            for i in chosen:
                contributions, exact = contributions_of(student_logits[i], teacher_logits[i], options)
                clip = math.inf if options.clip is None else options.clip
                divergences.append(contributions.clamp(max=clip).sum())
                oracle.clip_fraction.append(float((contributions > clip).double().mean()))
                oracle.divergence.append(float(exact.detach().sum()))
                exact_sum += oracle.divergence[-1]
                shared = top(student_logits[i], 20) & top(teacher_logits[i], 20)
                oracle.overlap.append(len(shared) / 20)
            oracle.chosen.append([i - start for i in chosen])
            oracle.state_divergence.append(exact_sum / max(1, len(chosen)))
            if divergences:
                total = torch.stack(divergences).sum()
                losses.append(total / len(chosen) if options.normalization == "step_mean" else total)
        if losses:
            oracle.loss = oracle.loss + torch.stack(losses).sum() / len(example.steps)
    oracle.loss = oracle.loss / len(examples)
    return oracle


def update(setup: Setup, examples: Sequence[Example], options: Objective, size: int) -> tuple[float, list[StepOutput]]:
    """Forward and backward over all examples, ``size`` states at a time."""
    outputs = []
    batches = step_batches(examples, size, mask_id=setup.mask_id, pad_id=EOS, device=torch.device("cpu"))
    for batch in batches:
        outputs.append(options.forward(setup.network, setup.teacher, batch, setup.mask_id))
        (outputs[-1].loss / len(examples)).backward()
    return float(sum(output.loss.detach() for output in outputs)) / len(examples), outputs


def check_update(setup: Setup, options: Objective, tolerance: float, size: int, rollouts: Sequence[Rollout]) -> Oracle:
    """Loss, adapter gradients and metrics of a whole update equal the transcription's; returns the latter."""
    examples = examples_of(options, rollouts)
    oracle = eq12(setup, examples, options)
    if oracle.divergence:
        oracle.loss.backward()
    setup.model.train()
    loss, outputs = update(setup, examples, options, size)

    assert loss == pytest.approx(float(oracle.loss.detach()), rel=tolerance, abs=1e-14)
    got = {}
    for name, parameter in setup.model.named_parameters():
        if f".{STUDENT}." not in name:
            assert parameter.grad is None, name
            continue
        layer, side = name.removeprefix("base_model.model.").removesuffix(f".{STUDENT}.weight").rsplit(".lora_", 1)
        got[f"{layer}.{side}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    assert got.keys() == setup.student_lora.keys() and len(got) == 2 * 2 * 7
    for name, leaf in setup.student_lora.items():
        expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        # The floor is for gradients that are zero but for rounding.
        assert float((got[name] - expected).norm()) <= tolerance * float(expected.norm()) + 1e-14, name
        assert float(expected.norm()) > 0 or not oracle.divergence, name

    assert [row.nonzero().flatten().tolist() for output in outputs for row in output.chosen] == oracle.chosen
    for name in ("divergence", "clip_fraction", "overlap"):
        values = torch.cat([getattr(output, name) for output in outputs]).double()
        expected = torch.tensor(getattr(oracle, name), dtype=torch.float64)
        # Shares are means in fp32.
        slack = tolerance if name == "divergence" else 1e-6
        torch.testing.assert_close(values, expected, rtol=slack, atol=slack)
    state_divergence = torch.cat([output.state_divergence() for output in outputs]).double()
    expected = torch.tensor(oracle.state_divergence, dtype=torch.float64)
    torch.testing.assert_close(state_divergence, expected, rtol=tolerance, atol=tolerance)
    return oracle


@pytest.mark.parametrize("normalization", ["step_mean", "batchmean"])
@pytest.mark.parametrize(("clip", "clip_form"), [(None, "plain"), (0.05, "plain"), (0.05, "nonnegative")])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_update_equals_eq_12_for_every_divergence(
    small_llada: Callable[..., LLaDAModelLM], divergence: str, clip: float | None, clip_form: str, normalization: str
) -> None:
    """Loss and LoRA gradients of an update in micro-batches of 7, 7 and 6 states are those of Eq. 12."""
    changes = {"divergence": divergence, "clip": clip, "clip_form": clip_form, "normalization": normalization}
    # Contributions relative to a mixture are smaller: a bound that some of them pass.
    if divergence not in ("reverse_kl", "forward_kl") and clip is not None:
        changes |= {"clip": 0.01, "beta": 0.3}
    setup = make_setup(small_llada, "fixed")
    oracle = check_update(setup, Objective(**{**DEFAULTS, **changes}), 1e-9, 7, make_rollouts(37))
    assert (max(oracle.clip_fraction) > 0) == (clip is not None)


@pytest.mark.parametrize("scope", ["future_blocks", "masked"])
@pytest.mark.parametrize("retain_ratio", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("selection", ["teacher", "student"])
@pytest.mark.parametrize("kind", ["fixed", "from_adapter", "ema", "live"])
def test_update_equals_eq_12_for_every_teacher(
    small_llada: Callable[..., LLaDAModelLM], kind: str, selection: str, retain_ratio: float, scope: str
) -> None:
    """The same for whose weights the teacher has, what it is shown and who chooses K."""
    options = Objective(
        **{**DEFAULTS, "selection": selection, "retain_ratio": retain_ratio, "reveal_scope": scope, "clip": 0.02}
    )
    oracle = check_update(make_setup(small_llada, kind), options, 1e-9, 9, make_rollouts(37))
    if scope == "masked" and retain_ratio == 1:
        # All that was decoded is revealed. In three states there are positions that never were: two, one and one.
        assert len(oracle.divergence) == (4 if selection == "teacher" else 0)
    elif kind == "live" and retain_ratio == 0:
        assert max(map(abs, oracle.divergence)) < 1e-12  # the teacher is the student
    else:
        assert len(oracle.divergence) > 10


@pytest.mark.parametrize(
    "changes",
    [
        {"confidence": "logit"},
        {"confidence": "margin"},
        {"confidence": "entropy"},
        {"top_k": 5},
        {"top_k": 5, "tail": "bucket", "clip_form": "nonnegative"},
        {"teacher_context": "reference"},
        {"reveal_tail": False, "retain_ratio": 0.5},
        {"reveal_scope": "later_state", "reveal_gap": None, "retain_ratio": 1.0},
    ],
    ids=str,
)
def test_update_equals_eq_12_for_other_options(
    small_llada: Callable[..., LLaDAModelLM], changes: dict[str, Any]
) -> None:
    """The same for the other options of the objective, one state at a time included."""
    size = 1 if "confidence" in changes else 5
    check_update(make_setup(small_llada, "ema"), Objective(**{**DEFAULTS, **changes}), 1e-9, size, make_rollouts(37))


def test_update_with_odd_numbers_of_states(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """Any numbers of states and commits: weights are fp32, so each is off by at most two roundings of 2**-24."""
    rollouts = make_rollouts(37, ([[3, 1], [1, 1, 2], [4]], [[3, 1]] * 3, [[1, 3], [3]]))
    assert [rollout.trajectory.num_steps for rollout in rollouts] == [6, 6, 3]
    check_update(make_setup(small_llada, "fixed"), Objective(**DEFAULTS), 2**-22, 4, rollouts)
    skipping = Objective(**{**DEFAULTS, "skip_last_block": True})
    check_update(make_setup(small_llada, "fixed"), skipping, 2**-22, 4, rollouts)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_update_in_single_precision(small_llada: Callable[..., LLaDAModelLM], divergence: str) -> None:
    """An fp32 model's loss and gradients are those of the transcription in fp64, to 1e-5."""
    options = Objective(**{**DEFAULTS, "divergence": divergence, "clip_form": "nonnegative"})
    check_update(make_setup(small_llada, "ema", torch.float32), options, 1e-5, 7, make_rollouts(37))


def test_tied_head_and_grouped_queries(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """Eq. 12 holds too where the head is the embedding and key heads are shared, and the embedding gets no gradient."""
    setup = make_setup(small_llada, "fixed", weight_tying=True, n_kv_heads=1)
    check_update(setup, Objective(**DEFAULTS), 1e-9, 20, make_rollouts(37))


def test_micro_batches_do_not_matter(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """The summed loss and gradients of an update are the same for any number of states per forward."""
    options = Objective(**DEFAULTS)
    reference = None
    for size in (1, 3, 20, 1000):
        setup = make_setup(small_llada, "fixed")
        examples = examples_of(options, make_rollouts(37))
        loss, outputs = update(setup, examples, options, size)
        assert [len(output.chosen) for output in outputs] == [min(size, 20 - i) for i in range(0, 20, size)]
        grads = torch.cat([p.grad.flatten() for p in setup.model.parameters() if p.grad is not None])
        result = torch.cat((torch.tensor([loss]).double(), grads))
        reference = result if reference is None else reference
        torch.testing.assert_close(result, reference, rtol=1e-9, atol=1e-12)


def test_gradient_checkpointing_changes_nothing(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """With an averaged teacher and activations recomputed in the backward pass, Eq. 12 still holds."""
    setup = make_setup(small_llada, "ema")
    setup.network.gradient_checkpointing_enable({"use_reentrant": False})
    check_update(setup, Objective(**DEFAULTS), 1e-9, 7, make_rollouts(37))


def test_a_state_of_the_skipped_block_is_left_out() -> None:
    """``skip_last_block`` drops exactly the steps of the last block."""
    rollouts = make_rollouts(37)
    whole = examples_of(Objective(**DEFAULTS), rollouts)
    cut = examples_of(Objective(**{**DEFAULTS, "skip_last_block": True}), rollouts)
    assert [example.steps.tolist() for example in whole] == [list(range(n)) for n in STATES_EVEN]
    assert [example.steps.tolist() for example in cut] == [list(range(7)), list(range(6)), list(range(4))]


def test_an_example_is_a_function_of_its_seed() -> None:
    """The same one draws the same reveal, another draws otherwise."""
    trajectory, options = make_rollouts(37)[0].trajectory, Objective(**DEFAULTS)
    drawn = [options.example(trajectory, trajectory.prompt_ids, eos_id=EOS, seed=seed).reveal for seed in (5, 5, 6)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_the_reference_teacher_reads_another_prompt() -> None:
    """An AR-style teacher has the reference prompt and no future tokens; a self-future one has the student's prompt."""
    rollouts = make_rollouts(37)
    options = Objective(**{**DEFAULTS, "teacher_context": "reference"})
    reference = examples_of(options, rollouts)
    own = examples_of(Objective(**DEFAULTS), rollouts)
    for example, rollout in zip(reference, rollouts, strict=True):
        assert torch.equal(example.teacher_prompt_ids, REFERENCE)
        assert not example.reveal.any() and example.reveal.shape == (rollout.trajectory.num_steps, LENGTH)
    assert all(torch.equal(example.teacher_prompt_ids, example.trajectory.prompt_ids) for example in own)
