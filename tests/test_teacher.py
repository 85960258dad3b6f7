"""What the teacher is shown, and whose weights it has."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dopsd.errors import UsageError
from dopsd.models import adapter_parameters, add_lora, load_adapter
from dopsd.models.llada import LLaDAModelLM
from dopsd.step_batch import Example, collate
from dopsd.teacher import STUDENT, TEACHER, TeacherView, TeacherWeights, self_future
from dopsd.trajectory import NEVER, Trajectory

EOS, BLOCK, LENGTH = 0, 4, 16


def make_trajectory(end: int | None, decoded_blocks: int = 4, seed: int = 0) -> Trajectory:
    """Two commits a step; the first end-of-text token at ``end``, and only so many blocks decoded."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 30, (LENGTH,), generator=generator)
    if end is not None:
        tokens[end] = EOS
    reveal_step = torch.full((LENGTH,), NEVER)
    for block in range(decoded_blocks):
        order = block * BLOCK + torch.randperm(BLOCK, generator=generator)
        for i, position in enumerate(order.tolist()):
            reveal_step[position] = 2 * block + i // 2
    tokens[decoded_blocks * BLOCK :] = EOS
    return Trajectory(torch.tensor([3, 4]), tokens, reveal_step, BLOCK)


def candidates_of(trajectory: Trajectory, step: int, scope: str, tail: bool) -> set[int]:
    """The positions that may be revealed at a step, from the definition."""
    tokens, reveal_step = trajectory.tokens.tolist(), trajectory.reveal_step.tolist()
    end = tokens.index(EOS) if EOS in tokens else LENGTH
    start = next(i for i in range(LENGTH) if reveal_step[i] == step) // BLOCK * BLOCK
    found = set()
    for i in range(LENGTH):
        hidden = step <= reveal_step[i] < NEVER
        in_text = tail or i <= end
        if scope == "future_blocks":
            hidden = hidden and i >= start + BLOCK and start + BLOCK < end
        if hidden and in_text:
            found.add(i)
    return found


def draw(
    trajectory: Trajectory,
    steps: Tensor,
    ratio: float,
    scope: Any,
    tail: bool,
    seed: int = 0,
    gap: int | None = None,
    rounding: Any = "nearest",
) -> Tensor:
    """`self_future` with this file's end-of-text token."""
    return self_future(
        trajectory,
        steps,
        retain_ratio=ratio,
        scope=scope,
        gap=gap,
        tail=tail,
        rounding=rounding,
        eos_id=EOS,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("scope", ["future_blocks", "masked"])
@pytest.mark.parametrize("ratio", [0.0, 0.125, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("end", "decoded"), [(None, 4), (0, 4), (5, 4), (7, 4), (8, 4), (11, 3), (15, 4), (6, 2)])
def test_reveals_are_the_rounded_share_of_the_candidates(
    end: int | None, decoded: int, ratio: float, scope: str, tail: bool
) -> None:
    """At every step, round-half-up(ratio * candidates) positions, all of them candidates, none of them visible; or as
    many as the whole part of that product says."""
    trajectory = make_trajectory(end, decoded)
    steps = torch.arange(trajectory.num_steps)
    for seed in range(3):
        reveal = draw(trajectory, steps, ratio, scope, tail, seed)
        fewer = draw(trajectory, steps, ratio, scope, tail, seed, rounding="down")
        assert not (fewer & ~reveal).any()
        assert reveal.dtype == torch.bool and reveal.shape == (len(steps), LENGTH)
        for step, row in enumerate(reveal):
            candidates = candidates_of(trajectory, step, scope, tail)
            shown = set(row.nonzero().flatten().tolist())
            assert shown <= candidates
            assert len(shown) == math.floor(Fraction(ratio) * len(candidates) + Fraction(1, 2))
            assert int(fewer[step].sum()) == math.floor(Fraction(ratio) * len(candidates))
            assert not (row & (trajectory.reveal_step < step)).any()
            if scope == "future_blocks":
                block = int(trajectory.block_starts(torch.tensor([step])))
                assert not row[: block + BLOCK].any()


def test_candidates_by_hand() -> None:
    """End of text at 9, in the third of four blocks: worked out by hand, for the first step of each block."""
    trajectory, steps = make_trajectory(9), torch.tensor([0, 2, 4, 6])

    def shown(scope: str, tail: bool) -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for row in draw(trajectory, steps, 1.0, scope, tail)]

    assert shown("future_blocks", True) == [list(range(4, 16)), list(range(8, 16)), [], []]
    assert shown("future_blocks", False) == [list(range(4, 10)), [8, 9], [], []]
    assert shown("masked", True) == [list(range(first, 16)) for first in (0, 4, 8, 12)]
    assert shown("masked", False) == [list(range(10)), list(range(4, 10)), [8, 9], []]


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("gap", [1, 3, None])
@pytest.mark.parametrize(("end", "decoded"), [(None, 4), (5, 4), (6, 2)])
def test_a_later_state_is_the_students_own(end: int | None, decoded: int, gap: int | None, tail: bool) -> None:
    """All of it shown, the teacher sees the state so many steps later, or the whole response, with the commits of this
    step masked again, and nothing behind the end of the text without the tail. They are then left for K."""
    trajectory, mask = make_trajectory(end, decoded), 99
    tokens, reveal_step = trajectory.tokens.tolist(), trajectory.reveal_step.tolist()
    steps = torch.arange(trajectory.num_steps)
    reveal = draw(trajectory, steps, 1.0, "later_state", tail, gap=gap)
    example = Example(trajectory, steps, reveal, trajectory.prompt_ids)
    now, shown = example.views(steps, mask)
    for step in steps.tolist():
        for i in range(LENGTH):
            taken = reveal_step[i] < (NEVER if gap is None else step + 1 + gap)  # of the later state
            if reveal_step[i] == step or (not tail and end is not None and i > end and reveal_step[i] > step):
                taken = False
            assert int(shown[step, i]) == (tokens[i] if taken else mask), (step, i)
    assert (now != shown).any(-1)[:-1].any()
    index = [(0, step) for step in steps.tolist()]
    batch = collate([example], index, mask_id=mask, pad_id=EOS, device=torch.device("cpu"))
    assert torch.equal(batch.rows_by_commit, batch.k) and torch.equal(batch.rows_by_confidence, batch.k)
    half = draw(trajectory, steps, 0.5, "later_state", tail, gap=gap)
    assert not (half & ~reveal).any() and torch.equal(half.sum(-1), (reveal.sum(-1) * 0.5 + 0.5).long())


def test_what_a_later_state_does_not_go_with() -> None:
    """A gap of another scope, none of at least a step, and reuse in which a block has one draw."""
    view = {"teacher_context": "self_future", "retain_ratio": 1.0, "reveal_tail": True, "skip_last_block": False}
    for changes, said in (
        ({"reveal_scope": "masked", "reveal_gap": 2}, "reveal_gap=2 .* reveal_scope=later_state"),
        ({"reveal_scope": "later_state", "reveal_gap": 0}, "reveal_gap must be at least 1, or none, but is 0"),
        ({"reveal_scope": "later_state", "reuse": "block"}, "reveal_scope='later_state' .* reuse=none or prompt"),
    ):
        with pytest.raises(UsageError, match=said):
            TeacherView(**{**view, **changes})  # type: ignore[arg-type]
    assert TeacherView(**view, reveal_scope="later_state", reveal_gap=None, reuse="prompt")  # type: ignore[arg-type]


@pytest.mark.parametrize("scope", ["future_blocks", "masked", "later_state"])
def test_what_was_never_decoded_is_never_shown(scope: str) -> None:
    """Where decoding stopped at the end of the text, what stands behind it is a filling, and no future."""
    trajectory, steps = make_trajectory(6, decoded_blocks=2), torch.arange(4)
    reveal = draw(trajectory, steps, 1.0, scope, True)
    assert not reveal[:, 8:].any()
    assert reveal[0, 4:8].all() and not draw(trajectory, steps, 1.0, scope, False)[:, 7].any()


def test_nothing_is_shown_where_no_text_is_left() -> None:
    """A block that ends where the first end-of-text stands has no text behind it, and one a token before it has."""
    for end, shown in ((4, []), (5, list(range(4, 16)))):
        (row,) = draw(make_trajectory(end), torch.tensor([0]), 1.0, "future_blocks", True)
        assert row.nonzero().flatten().tolist() == shown


@pytest.mark.parametrize("end", [None, 0, 5, 7, 8, 15])
def test_steps_before_which_the_text_stands_can_be_left_out(end: int | None) -> None:
    """With ``skip_tail``, the steps are those before which something up to the first end-of-text is masked."""
    trajectory = make_trajectory(end)
    last = LENGTH - 1 if end is None else end
    expected = [step for step in range(8) if any(at >= step for at in trajectory.reveal_step.tolist()[: last + 1])]
    view = TeacherView(
        teacher_context="self_future",
        retain_ratio=0.25,
        reveal_scope="masked",
        reveal_tail=True,
        skip_last_block=False,
        skip_tail=True,
    )
    example = view.example(trajectory, trajectory.prompt_ids, eos_id=EOS, seed=0)
    assert example.steps.tolist() == expected and len(example.reveal) == len(expected)
    assert (len(expected) == 8) == (end in (None, 15))


def test_every_subset_is_equally_likely() -> None:
    """Over many draws the subsets revealed are uniform (chi-square) and drawn anew for each step."""
    trajectory, draws = make_trajectory(None), 28_000
    # Block 2 of 4 is current at step 2: eight candidates behind it, of which two are shown, 28 pairs.
    reveal = draw(trajectory, torch.full((draws,), 2), 0.25, "future_blocks", True)
    counts = Counter(tuple(row.nonzero().flatten().tolist()) for row in reveal)
    pairs = set(combinations(range(8, 16), 2))
    assert counts.keys() == pairs
    expected = draws / len(pairs)
    chi_square = sum((counts[pair] - expected) ** 2 / expected for pair in pairs)
    assert 7.5 < chi_square < 63.5  # about the 0.01% and 99.99% points at 27 degrees of freedom
    repeats = int((reveal[1:] == reveal[:-1]).all(-1).sum())
    assert abs(repeats - expected) < 5 * math.sqrt(expected)


def test_draws_depend_on_the_generator_alone() -> None:
    """The same seed gives the same reveal, another seed another."""
    trajectory = make_trajectory(None)
    steps = torch.arange(trajectory.num_steps)
    first = draw(trajectory, steps, 0.5, "masked", True, seed=1)
    draw(make_trajectory(3, seed=2), steps, 0.5, "masked", True, seed=9)
    assert torch.equal(first, draw(trajectory, steps, 0.5, "masked", True, seed=1))
    assert not torch.equal(first, draw(trajectory, steps, 0.5, "masked", True, seed=2))


# ---- weights ----

IDS = torch.arange(12)[None]


def make_student(small_llada: Callable[..., LLaDAModelLM], dropout: float = 0.0) -> PeftModel:
    """A random model with a random adapter, in training mode."""
    model = add_lora(small_llada(), None, 4, 8, dropout)
    shift(model, 1)
    return model.train()


def shift(model: PeftModel, seed: int) -> None:
    """A step of the student, as an optimiser would take."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in adapter_parameters(model, STUDENT).values():
            value += 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)


def states(model: PeftModel) -> Tensor:
    """Hidden states of the shared network as it is, without dropout."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        found = model.get_base_model().hidden_states(IDS)
    model.train(was_training)
    return found


def copies(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """An adapter's values."""
    return {name: value.detach().clone() for name, value in adapter_parameters(model, adapter).items()}


def only_the_student_trains(model: PeftModel) -> bool:
    """Its adapter requires gradients and nothing else does."""
    return all(p.requires_grad == (f".{STUDENT}." in name) for name, p in model.named_parameters())


def teacher_states(model: PeftModel, teacher: TeacherWeights) -> Tensor:
    """What the network computes as the teacher."""
    with teacher.active():
        return model.get_base_model().hidden_states(IDS)


def test_a_fixed_teacher_is_the_base_model(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """Over a fresh adapter, the teacher is the network without adapters, however far the student went."""
    with torch.no_grad():
        base = small_llada().hidden_states(IDS)
    model = make_student(small_llada)
    teacher = TeacherWeights(model, "fixed", 0.9, from_adapter=False)
    assert list(model.peft_config) == [STUDENT]
    for seed in (2, 3):
        assert torch.equal(teacher_states(model, teacher), base)
        assert not torch.allclose(states(model), base, atol=1e-3)
        shift(model, seed)
        teacher.after_update()


def test_a_fixed_teacher_of_a_continued_run_is_its_start(
    small_llada: Callable[..., LLaDAModelLM], tmp_path: Path
) -> None:
    """Where the run starts from an adapter on disk, the teacher keeps that adapter."""
    source = make_student(small_llada)
    source.save_pretrained(tmp_path)
    model = load_adapter(small_llada(), str(tmp_path), trainable=True)
    start = states(model)
    assert torch.equal(start, states(source))
    teacher = TeacherWeights(model, "fixed", 0.9, from_adapter=True)
    assert torch.equal(states(model), start) and only_the_student_trains(model)
    shift(model, 2)
    teacher.after_update()
    assert torch.equal(teacher_states(model, teacher), start)
    assert not torch.allclose(states(model), start, atol=1e-3)


def test_a_live_teacher_is_the_student(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """It computes what the student computes without dropout, before and after a step."""
    model = make_student(small_llada)
    teacher = TeacherWeights(model, "live", 0.9, from_adapter=False)
    for seed in (2, 3):
        assert torch.equal(teacher_states(model, teacher), states(model))
        shift(model, seed)
        teacher.after_update()
    assert list(model.peft_config) == [STUDENT]


@pytest.mark.parametrize("from_adapter", [False, True])
def test_an_averaged_teacher_follows_the_student(small_llada: Callable[..., LLaDAModelLM], from_adapter: bool) -> None:
    """It starts as the student and after each step is decay * itself + (1 - decay) * the student."""
    model, decay = make_student(small_llada), 0.8
    teacher = TeacherWeights(model, "ema", decay, from_adapter=from_adapter)
    average = copies(model, STUDENT)
    assert torch.equal(teacher_states(model, teacher), states(model))
    for seed in (2, 3, 4):
        shift(model, seed)
        student = copies(model, STUDENT)
        teacher.after_update()
        found = copies(model, TEACHER)
        assert found.keys() == average.keys() and len(found) == 2 * 2 * 7
        for name, value in average.items():
            average[name] = decay * value + (1 - decay) * student[name]
            torch.testing.assert_close(found[name], average[name], rtol=1e-14, atol=1e-15)
        assert all(torch.equal(value, student[name]) for name, value in copies(model, STUDENT).items())
    # A model whose only adapter holds the average computes the same.
    other = make_student(small_llada)
    with torch.no_grad():
        for name, value in adapter_parameters(other, STUDENT).items():
            value.copy_(average[name])
    torch.testing.assert_close(teacher_states(model, teacher), states(other), rtol=1e-12, atol=1e-12)


CASES = [("fixed", False), ("fixed", True), ("ema", False), ("live", False)]


@pytest.mark.parametrize(("kind", "from_adapter"), CASES)
def test_inside_and_after(small_llada: Callable[..., LLaDAModelLM], kind: Any, from_adapter: bool) -> None:
    """No dropout and no gradient inside; after it dropout is on and the student's adapter alone trains."""
    model = make_student(small_llada, dropout=0.5)
    network = model.get_base_model()
    teacher = TeacherWeights(model, kind, 0.9, from_adapter)
    assert only_the_student_trains(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _ in range(2):
        with teacher.active():
            first, second = network.hidden_states(IDS), network.hidden_states(IDS)
            assert not any(module.training for module in model.modules())
        assert torch.equal(first, second) and not first.requires_grad
        assert only_the_student_trains(model) and all(module.training for module in model.modules())
        first, second = network.hidden_states(IDS), network.hidden_states(IDS)
        assert not torch.equal(first, second)
        model.zero_grad()
        second.pow(3).sum().backward()
        found = [parameter for parameter in model.parameters() if parameter.grad is not None]
        assert {id(parameter) for parameter in found} == {id(parameter) for parameter in trainable}
        assert all(bool(parameter.grad.abs().max() > 0) for parameter in found if parameter.grad is not None)


@pytest.mark.parametrize(("kind", "from_adapter"), CASES)
def test_an_error_inside_brings_the_student_back(
    small_llada: Callable[..., LLaDAModelLM], kind: Any, from_adapter: bool
) -> None:
    """After an exception in the teacher's pass the network is the student again, and trains."""
    model = make_student(small_llada)
    teacher = TeacherWeights(model, kind, 0.9, from_adapter)
    shift(model, 2)
    before = states(model)
    with pytest.raises(RuntimeError, match="inside"), teacher.active():
        raise RuntimeError("inside")
    assert torch.equal(states(model), before) and only_the_student_trains(model) and model.training


def test_the_students_file_holds_no_teacher(small_llada: Callable[..., LLaDAModelLM], tmp_path: Path) -> None:
    """Saving the student's adapter beside an averaged teacher, and loading it, gives the student."""
    model = make_student(small_llada)
    teacher = TeacherWeights(model, "ema", 0.5, from_adapter=False)
    shift(model, 2)
    teacher.after_update()
    model.save_pretrained(tmp_path, selected_adapters=[STUDENT])
    loaded = load_adapter(small_llada(), str(tmp_path), trainable=False)
    assert torch.equal(states(loaded), states(model))
    assert not torch.allclose(teacher_states(model, teacher), states(model), atol=1e-3)
