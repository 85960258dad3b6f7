"""Step concatenation against loops, slices of an example, and its JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dopsd.step_batch import Example, StepBatch, collate, step_batches, with_prompts
from dopsd.trajectory import NEVER, Trajectory

MASK, PAD, BLOCK, LENGTH = 50, 0, 4, 12
CPU = torch.device("cpu")


def make_example(commits: Sequence[Sequence[int]], prompt: int, teacher: int, seed: int, every: int = 1) -> Example:
    """A random trajectory with these commits per step and block, one in `every` of its steps, and random reveals."""
    generator = torch.Generator().manual_seed(seed)
    reveal_step = torch.full((LENGTH,), NEVER)
    step = 0
    for block, counts in enumerate(commits):
        order = (block * BLOCK + torch.randperm(BLOCK, generator=generator)).tolist()
        for count in counts:
            for _ in range(count):
                reveal_step[order.pop()] = step
            step += 1
    tokens = torch.randint(1, 40, (LENGTH,), generator=generator)
    tokens[reveal_step == NEVER] = PAD
    ids = torch.randint(1, 40, (prompt + teacher,), generator=generator)
    trajectory = Trajectory(ids[:prompt], tokens, reveal_step, BLOCK)
    steps = torch.arange(step)[::every]
    masked = reveal_step >= steps[:, None]
    reveal = masked & (torch.rand(len(steps), LENGTH, generator=generator) < 0.4)
    return Example(trajectory, steps, reveal, ids[prompt:])


def make_examples() -> list[Example]:
    """Three examples: steps of one to four commits, some steps left out, prompts of five lengths."""
    return [
        make_example([[1, 2, 1], [4], [2, 2]], 3, 3, 0),
        make_example([[2, 2], [3, 1], [2]], 6, 1, 1, every=2),
        make_example([[1, 1, 1, 1], [1, 3]], 2, 9, 2),
    ]


def check_row(batch: StepBatch, row: int, examples: Sequence[Example], number: int, index: int) -> None:
    """One state of a batch, field by field, from the trajectory's plain lists."""
    example = examples[number]
    trajectory, step = example.trajectory, int(example.steps[index])
    tokens, reveal_step = trajectory.tokens.tolist(), trajectory.reveal_step.tolist()
    state = [token if when < step else MASK for token, when in zip(tokens, reveal_step, strict=True)]
    shown = [tokens[i] if example.reveal[index, i] else state[i] for i in range(LENGTH)]
    for side, prompt, response in (
        (batch.student, trajectory.prompt_ids.tolist(), state),
        (batch.teacher, example.teacher_prompt_ids.tolist(), shown),
    ):
        padding = side.offset - len(prompt)
        assert side.input_ids[row].tolist() == [PAD] * padding + prompt + response
        real = [False] * padding + [True] * (len(prompt) + LENGTH)
        if side.attention_mask is None:
            assert all(real)
        else:
            assert side.attention_mask.dtype == torch.bool and side.attention_mask[row].tolist() == real
    committed = [i for i, when in enumerate(reveal_step) if when == step]
    start = committed[0] // BLOCK * BLOCK
    columns = list(range(start, start + BLOCK))
    assert batch.columns[row].tolist() == columns
    assert batch.candidates[row].tolist() == [state[i] == MASK and shown[i] == MASK for i in columns]
    assert batch.committed[row].tolist() == [i in committed for i in columns]
    assert int(batch.k[row]) == len(committed)
    assert int(batch.example[row]) == number
    assert float(batch.weight[row]) == pytest.approx(1 / len(example.steps), rel=2**-23)


@pytest.mark.parametrize("size", [1, 2, 5, 13, 14, 100])
def test_batches_hold_every_state_in_order(size: int) -> None:
    """Each state of each example comes once, in order, in batches of the asked size that may mix examples."""
    examples = make_examples()
    index = [(number, i) for number, example in enumerate(examples) for i in range(len(example.steps))]
    assert [len(example.steps) for example in examples] == [6, 3, 6]
    row = 0
    for batch in step_batches(examples, size, mask_id=MASK, pad_id=PAD, device=CPU):
        assert len(batch) == min(size, len(index) - row)
        present = [examples[number] for number, _ in index[row : row + len(batch)]]
        # No wider than its own longest prompt.
        assert batch.student.offset == max(len(example.trajectory.prompt_ids) for example in present)
        assert batch.teacher.offset == max(len(example.teacher_prompt_ids) for example in present)
        for at in range(len(batch)):
            check_row(batch, at, examples, *index[row + at])
        row += len(batch)
    assert row == len(index)


def test_any_states_can_be_batched() -> None:
    """`collate` takes any states of any examples, grouped by example."""
    examples = make_examples()
    index = [(2, 5), (2, 0), (0, 3)]
    batch = collate(examples, index, mask_id=MASK, pad_id=PAD, device=CPU)
    for row, (number, at) in enumerate(index):
        check_row(batch, row, examples, number, at)


def test_weights_sum_to_the_number_of_examples() -> None:
    """The states' weights are 1/T each, over all batches of an update."""
    batches = step_batches(make_examples(), 4, mask_id=MASK, pad_id=PAD, device=CPU)
    assert float(sum(batch.weight.double().sum() for batch in batches)) == pytest.approx(3, rel=2**-22)


def test_no_examples_no_batches() -> None:
    """Without examples, or without steps in them, there is no batch."""
    assert list(step_batches([], 4, mask_id=MASK, pad_id=PAD, device=CPU)) == []
    empty = make_examples()[0].slice(0, 100)
    assert len(empty.steps) == 0
    assert list(step_batches([empty], 4, mask_id=MASK, pad_id=PAD, device=CPU)) == []


def test_padding_is_told_from_end_of_text() -> None:
    """A prompt or response may hold the padding's id: only what is in front of the prompt is masked out."""
    prompts: list[Tensor] = [torch.tensor([PAD, 5]), torch.tensor([6, 7, PAD, 8])]
    inputs = with_prompts(prompts, torch.full((2, 3), PAD), PAD)
    assert inputs.offset == 4 and inputs.attention_mask is not None
    assert inputs.attention_mask.tolist() == [[False] * 2 + [True] * 5, [True] * 7]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 9])
def test_slices_cover_every_step_once(count: int) -> None:
    """The slices of an example are consecutive, nearly equal, and together the example."""
    for example in make_examples():
        parts = [example.slice(number, count) for number in range(count)]
        assert torch.equal(torch.cat([part.steps for part in parts]), example.steps)
        assert torch.equal(torch.cat([part.reveal for part in parts]), example.reveal)
        sizes = [len(part.steps) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert all(len(part.reveal) == len(part.steps) and part.trajectory is example.trajectory for part in parts)


def test_json_round_trip() -> None:
    """An example read back from JSON is the same, one with an empty reveal and one without steps included."""
    examples = [*make_examples(), make_examples()[0].slice(0, 100)]
    first = examples[0]
    examples.append(Example(first.trajectory, first.steps, torch.zeros_like(first.reveal), first.teacher_prompt_ids))
    for example in examples:
        again = Example.from_json(json.loads(json.dumps(example.to_json())))
        for name in ("steps", "reveal", "teacher_prompt_ids"):
            got, expected = getattr(again, name), getattr(example, name)
            assert got.dtype == expected.dtype and torch.equal(got, expected), name
        for name in ("prompt_ids", "tokens", "reveal_step"):
            assert torch.equal(getattr(again.trajectory, name), getattr(example.trajectory, name)), name
        assert again.trajectory.block_length == BLOCK
