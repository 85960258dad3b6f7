"""Trajectories: states, commits and blocks against loops, JSON, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dopsd.trajectory import NEVER, Trajectory

MASK = 99


def example() -> Trajectory:
    """Three blocks of four: one token to three a step, the last block left unfinished."""
    reveal_step = torch.tensor([1, 0, 0, 2, 4, 3, 4, 4, NEVER, 5, NEVER, NEVER])
    tokens = torch.tensor([11, 12, 13, 14, 15, 16, 17, 18, 0, 0, 0, 0])
    return Trajectory(torch.tensor([7, 8, 9]), tokens, reveal_step, 4)


def finished() -> Trajectory:
    """Two blocks of two, every position decoded."""
    return Trajectory(torch.tensor([1]), torch.tensor([4, 5, 6, 7]), torch.tensor([1, 0, 2, 2]), 2)


@pytest.mark.parametrize("trajectory", [example(), finished()])
def test_states_commits_and_blocks_equal_loops(trajectory: Trajectory) -> None:
    """Position i is visible before step s iff it was revealed at an earlier step; a step's block is its commits'."""
    reveal_step, tokens = trajectory.reveal_step.tolist(), trajectory.tokens.tolist()
    last = max(step for step in reveal_step if step != NEVER)
    assert trajectory.num_steps == last + 1
    steps = torch.tensor([last, 0, 1, last])
    states, commits, starts = trajectory.states(steps, MASK), trajectory.commits(steps), trajectory.block_starts(steps)
    for row, step in enumerate(steps.tolist()):
        visible = [token if when < step else MASK for token, when in zip(tokens, reveal_step, strict=True)]
        committed = [i for i, when in enumerate(reveal_step) if when == step]
        assert states[row].tolist() == visible
        assert commits[row].nonzero().flatten().tolist() == committed
        assert int(starts[row]) == committed[0] // trajectory.block_length * trajectory.block_length
    assert states.shape == commits.shape == (4, len(tokens)) and commits.dtype == torch.bool


def test_states_unfold_into_the_response() -> None:
    """Each state is the one before it plus that step's commits, from all masks to all that was decoded."""
    trajectory = example()
    states = trajectory.states(torch.arange(trajectory.num_steps + 1), MASK)
    commits = trajectory.commits(torch.arange(trajectory.num_steps))
    assert (states[0] == MASK).all()
    for step in range(trajectory.num_steps):
        assert torch.equal(torch.where(commits[step], trajectory.tokens, states[step]), states[step + 1])
    decoded = trajectory.reveal_step != NEVER
    assert torch.equal(states[-1], torch.where(decoded, trajectory.tokens, MASK))
    assert torch.equal(commits.sum(0), decoded.long())


def test_no_steps_are_fine() -> None:
    """A response of which nothing was decoded has no steps and no states."""
    trajectory = Trajectory(torch.tensor([1]), torch.zeros(4, dtype=torch.int64), torch.full((4,), NEVER), 2)
    assert trajectory.num_steps == 0
    assert trajectory.states(torch.arange(0), MASK).shape == (0, 4)
    assert trajectory.block_starts(torch.arange(0)).shape == (0,)


def test_text_ends_at_the_first_end_of_text() -> None:
    """The text is what comes before the first end-of-text token; all of it without one."""
    assert example().text_length(0) == 8
    assert example().text_length(11) == 0
    assert example().text_length(16) == 5
    assert example().text_length(77) == 12


@pytest.mark.parametrize("trajectory", [example(), finished()])
def test_json_round_trip(trajectory: Trajectory) -> None:
    """What is written to JSON is read back the same, positions never decoded included."""
    fields = json.loads(json.dumps(trajectory.to_json()))
    assert fields["reveal_step"] == [-1 if step == NEVER else step for step in trajectory.reveal_step.tolist()]
    again = Trajectory.from_json(fields)
    for name in ("prompt_ids", "tokens", "reveal_step"):
        assert torch.equal(getattr(again, name), getattr(trajectory, name))
        assert getattr(again, name).dtype == torch.int64
    assert again.block_length == trajectory.block_length


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt_ids": torch.zeros(1, 3, dtype=torch.int64)}, r"prompt_ids .*shape \(1, 3\)"),
        ({"prompt_ids": torch.zeros(3)}, "prompt_ids .*float32"),
        ({"tokens": torch.zeros(4, dtype=torch.int32)}, "tokens .*int32"),
        ({"tokens": torch.zeros((), dtype=torch.int64)}, "tokens .*1-D"),
        ({"reveal_step": torch.zeros(4, dtype=torch.bool)}, "reveal_step .*bool"),
        ({"reveal_step": torch.tensor([0, 1, 2])}, "tokens has 4 positions and reveal_step has 3"),
        ({"block_length": 3}, "block_length=3 does not divide"),
        ({"block_length": 0}, "block_length=0"),
        ({"reveal_step": torch.tensor([0, 1, -2, 3])}, "reveal_step must not be negative"),
        ({"reveal_step": torch.tensor([0, 1, 3, 3])}, "reveal_step reaches 3 but leaves out"),
        ({"reveal_step": torch.tensor([1, 1, 2, 3])}, "reveal_step reaches 3 but leaves out"),
        # the second block before the first, two blocks by turns, both in one step, the first never finished
        ({"reveal_step": torch.tensor([2, 3, 0, 1])}, "reveal_step must finish one block"),
        ({"reveal_step": torch.tensor([0, 2, 1, 3])}, "reveal_step must finish one block"),
        ({"reveal_step": torch.tensor([0, 1, 1, 2])}, "reveal_step must finish one block"),
        ({"reveal_step": torch.tensor([0, NEVER, 1, 2])}, "reveal_step must finish one block"),
        ({"reveal_step": torch.tensor([NEVER, NEVER, 0, 1])}, "reveal_step must finish one block"),
    ],
    ids=str,
)
def test_malformed_trajectories_are_refused(changes: dict[str, Any], sentence: str) -> None:
    """What is not a block-by-block decoding raises a sentence that names the field."""
    fields = {
        "prompt_ids": torch.tensor([1, 2]),
        "tokens": torch.tensor([4, 5, 6, 7]),
        "reveal_step": torch.tensor([0, 1, 2, 3]),
        "block_length": 2,
    }
    Trajectory(**fields)
    with pytest.raises(ValueError, match=sentence):
        Trajectory(**{**fields, **changes})
