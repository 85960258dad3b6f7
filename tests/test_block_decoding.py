"""Decoding of block-causal models: against a plain loop over whole sequences, with the exact cache and without."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_block_causal import EOS, FAMILIES, MASK, small_model
from test_sampler import loop_decode, make_prompts, run, same
from torch import Tensor

from dopsd.models.packed import Packed
from dopsd.sampler import Decoding
from dopsd.trajectory import NEVER, Trajectory

LENGTHS = (5, 4, 7, 1, 2, 9, 3)  # every remainder of a block of 4, and prompts shorter than one
CASES: list[dict[str, Any]] = [
    {"steps": 6},
    {"temperature": 0.9, "steps": 12, "stop_at_eos": False},
    {"threshold": 0.4, "temperature": 0.5},
    {"threshold": 0.3, "sub_block_length": 2},
    {"remasking": "leftmost", "steps": 12, "stop_at_eos": False},
]


def likely_to_stop(family: str, **changes: Any) -> Any:
    model = small_model(family, **changes)
    with torch.no_grad():
        model.lm_head_weight[EOS] *= 1.6
    return model


class Literal:
    """Logits by one pass over the whole sequence, read where the model reads them."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.model.hidden_states(ids) @ self.model.lm_head_weight.mT)


@pytest.mark.parametrize("changes", CASES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_a_loop_over_whole_sequences(family: str, changes: dict[str, Any]) -> None:
    """One batch of prompts of every remainder, token for token and step for step; hints too."""
    model, prompts = likely_to_stop(family), make_prompts(*LENGTHS)
    seeds = torch.arange(len(prompts)) * 7
    hints = torch.randint(1, MASK, (len(prompts), 12), generator=torch.Generator().manual_seed(9))
    leads = [len(prompt) % 4 if model.block_origin == "token_0" else 0 for prompt in prompts]
    literal: Any = Literal(model)
    decodings = [
        Decoding(**{"gen_length": 12, "block_length": 4, "cache": kind, **changes}) for kind in ("none", "block")
    ]
    expected = [
        loop_decode(literal, prompt, decodings[0], int(seed), lead=lead, ahead=model.shift == 1)
        for prompt, seed, lead in zip(prompts, seeds, leads, strict=True)
    ]
    for decoding in decodings:
        found = run(model, prompts, decoding, seeds)
        assert all(map(same, found, expected)), decoding.cache
        assert [trajectory.lead for trajectory in found] == leads
        # What stands behind a block is invisible, so hints there change nothing.
        assert all(map(same, run(model, prompts, decoding, seeds, hints=hints), expected)), decoding.cache


@pytest.mark.parametrize("family", ["sdar", "Fast_dLLM_Qwen", "a2d-qwen3"])
def test_an_exact_cache_computes_blocks_alone(family: str) -> None:
    """The prompts once, each finished block once, and every step its block; in fp32 the tokens are the same too."""
    model, prompts = small_model(family, dtype=torch.float32), make_prompts(*LENGTHS)
    computed: list[int] = []
    model.on_pass = computed.append
    decoding = Decoding(12, 4, 12, stop_at_eos=False)
    whole = run(model, prompts, decoding, torch.arange(7))
    without, computed[:] = list(computed), []
    cached = run(model, prompts, Decoding(**{**vars(decoding), "cache": "block"}), torch.arange(7))
    assert all(map(same, whole, cached))
    begin, blocks, steps = 7 * (9 + 4), 3 + any(one.lead for one in whole), len(without)
    assert computed[0] == begin and len(computed) == 1 + (blocks - 1) + steps
    assert sum(computed) <= begin + (blocks - 1 + steps) * 7 * 4 < sum(without) / 2


def test_keys_of_the_last_denoising_step_are_not_those_of_a_clean_pass() -> None:
    """Which is why finished blocks are computed once more: their tokens saw masks beside them."""
    model = small_model("sdar")
    ids = torch.randint(1, MASK, (1, 8), generator=torch.Generator().manual_seed(3))
    masked = ids.clone()
    masked[0, 6] = MASK
    keys = []
    for block in (ids, masked):
        cache = model.clean_pass(ids, None, torch.tensor([4]), torch.tensor([0]), 1, 4)
        packed = Packed(block[:, 4:], torch.tensor([4]), torch.tensor([0]), 1, torch.ones(1, 4, dtype=torch.bool))
        _, layers = model.packed_states(cache, packed, torch.tensor([[4]]))
        keys.append(layers[-1][0])
    _, whole = model._states(ids, None, None, 8)
    torch.testing.assert_close(keys[0], whole[-1][0][:, :, 4:], rtol=1e-9, atol=1e-9)
    assert not torch.isclose(keys[0], keys[1]).all(-1).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_prompt(family: str) -> None:
    """There is then nothing to attend to but the block; all of its masks are equally sure."""
    model, prompts = small_model(family), [torch.zeros(0, dtype=torch.int64)]
    options: dict[str, Any] = {"temperature": 0.9, "remasking": "leftmost", "stop_at_eos": False}
    decodings = (Decoding(8, 4, cache="none", **options), Decoding(8, 4, cache="block", **options))
    plain, cached = (run(model, prompts, decoding, torch.arange(1)) for decoding in decodings)
    assert same(plain[0], cached[0])


def test_a_trajectory_with_a_shorter_first_block() -> None:
    """Blocks begin in the prompt, a last one takes the rest, and every state and commit follows as before."""
    order = torch.tensor([0, 1, 3, 2, 3, 2, 5, 4])
    trajectory = Trajectory(torch.arange(6), torch.arange(8), order, 4, lead=2)
    steps = torch.arange(6)
    assert trajectory.block_starts(steps).tolist() == [-2, -2, 2, 2, 6, 6]
    again = Trajectory.from_json(trajectory.to_json())
    assert again.lead == 2 and torch.equal(again.block_starts(steps), trajectory.block_starts(steps))
    old = {name: value for name, value in trajectory.to_json().items() if name != "lead"}
    with pytest.raises(ValueError, match="finish one block before the next"):
        Trajectory.from_json(old)
    with pytest.raises(ValueError, match="lead=4"):
        Trajectory(torch.arange(6), torch.arange(8), order, 4, lead=4)
    with pytest.raises(ValueError, match="finish one block before the next"):
        Trajectory(torch.arange(6), torch.arange(8), torch.tensor([NEVER, 0, 2, 1, 2, 1, 4, 3]), 4, lead=2)
