"""The script that makes the shipped model."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import dopsd.assets.pretrain
from dopsd.assets.pretrain import (
    BLOCK_LENGTH,
    MASK,
    REFERENCE_EVERY,
    RESPONSE_LENGTH,
    Attention,
    character_tokenizer,
    diffusion_loss,
    pretrain,
    sample_batch,
    two_copy_states,
)
from dopsd.models import SHIPPED, load_model
from dopsd.rollout import Decoder
from dopsd.sampler import Decoding
from dopsd.tasks import Row
from dopsd.tasks.sudoku import Sudoku

ATTENTIONS = get_args(Attention)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_same_seed_gives_the_same_weights(attention: Attention) -> None:
    first, second, other = (pretrain(2, 2, 4, seed, attention)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("name", "attention"), list(zip(SHIPPED, ATTENTIONS, strict=True)))
def test_the_shipped_files_have_the_architecture_and_tokenizer_that_the_script_makes(
    name: str, attention: Attention
) -> None:
    model, tokenizer = load_model(name)
    fresh, made = pretrain(0, 0, 4, 0, attention)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in fresh.state_dict().items()
    }
    assert tokenizer.get_vocab() == made.get_vocab() and tokenizer.mask_token == MASK
    norms = 2 * 32 * 6 if attention == "block_causal" else 0  # of the heads of queries and keys
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_212_288 + norms
    assert type(model) is type(fresh) and model.block_size == fresh.block_size


def test_every_character_is_one_token_and_comes_back() -> None:
    tokenizer = character_tokenizer()
    text = "0123401234012340:a1p4=1234341221434321"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_loss_of_a_uniform_model_is_the_entropy_of_the_vocabulary(attention: Attention) -> None:
    """Cross-entropy over the mask ratio is unbiased for the mean over tokens: log V for uniform predictions."""
    tokenizer = character_tokenizer()
    model = pretrain(0, 0, 4, 0, attention)[0]
    torch.nn.init.zeros_(model.lm_head_weight)
    del model.layers[1:]  # nothing that they compute is seen
    ids, prompt_length = sample_batch(tokenizer, 64, Sudoku().prompt, random.Random(0))
    assert ids.shape == (64, prompt_length + RESPONSE_LENGTH)
    generator = torch.Generator().manual_seed(0)
    losses = torch.stack([diffusion_loss(model, ids, prompt_length, generator).detach() for _ in range(30)])
    expected = torch.log(torch.tensor(float(len(tokenizer))))
    assert abs(losses.mean() - expected) < 4 * losses.std() / 30**0.5


def test_a_block_is_learned_behind_clean_tokens() -> None:
    """The states that the loss reads are those of whole sequences with one noisy block each."""
    tokenizer = character_tokenizer()
    model: Any = pretrain(0, 0, 4, 0, "block_causal")[0].double()
    clean, start = sample_batch(tokenizer, 3, Sudoku().reference_prompt, random.Random(0))
    noisy = clean.clone()
    noisy[:, start:][torch.rand(3, RESPONSE_LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5] = 1
    with torch.no_grad():
        states = two_copy_states(model, noisy, clean, start)
        for begin in range(0, RESPONSE_LENGTH, BLOCK_LENGTH):
            block = slice(start + begin, start + begin + BLOCK_LENGTH)
            ids = clean.clone()
            ids[:, block] = noisy[:, block]
            expected = model.hidden_states(ids)[:, block]
            torch.testing.assert_close(states[:, begin : begin + BLOCK_LENGTH], expected, rtol=1e-11, atol=1e-11)


def test_one_batch_in_four_is_behind_solved_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompts are an AR-style teacher's, others the student's; each response solves the problem that it follows."""
    tokenizer, task = character_tokenizer(), Sudoku()
    kinds = []

    def look(model: Any, ids: Tensor, prompt_length: int, generator: torch.Generator) -> Tensor:
        batch = set()
        for row in ids.tolist():
            text, response = tokenizer.decode(row[:prompt_length]), tokenizer.decode(row[prompt_length:])
            response = response.removesuffix(tokenizer.eos_token * response.count(tokenizer.eos_token))
            problem = {"puzzle": text[-17:-1], "solution": response[-16:]}
            assert task.score(problem, response) == 1
            batch.add(next(name for name in ("prompt", "reference_prompt") if getattr(task, name)(problem) == text))
        kinds.extend(batch)
        return diffusion_loss(model, ids, prompt_length, generator)

    monkeypatch.setattr(dopsd.assets.pretrain, "diffusion_loss", look)
    pretrain(REFERENCE_EVERY, REFERENCE_EVERY, 2, 0)
    assert kinds == [*["prompt"] * (REFERENCE_EVERY - 1), "reference_prompt"] * 2


def test_the_shipped_model_reads_a_solved_copy(shipped: Decoder) -> None:
    """Behind one it is right more often: an AR-style teacher has something to teach."""

    class Shown(Sudoku):
        def prompt(self, row: Row) -> str:
            return self.reference_prompt(row)

    rows = Sudoku().problems("validation", 64)
    with_copy, without = (
        sum(r.score for r in replace(shipped, task=task).once(rows, Decoding(48, 8, 24), torch.arange(64))) / 64
        for task in (Shown(), Sudoku())
    )
    assert 0.15 < without < with_copy < 0.8
