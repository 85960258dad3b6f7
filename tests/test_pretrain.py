"""The script that makes the shipped model."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dopsd.assets.pretrain
from dopsd.assets.pretrain import (
    MASK,
    REFERENCE_EVERY,
    RESPONSE_LENGTH,
    character_tokenizer,
    diffusion_loss,
    pretrain,
    sample_batch,
)
from dopsd.models import load_model
from dopsd.rollout import Decoder
from dopsd.sampler import Decoding
from dopsd.tasks import Row
from dopsd.tasks.sudoku import Sudoku


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second, other = (pretrain(2, 2, 4, seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_shipped_files_have_the_architecture_and_tokenizer_that_the_script_makes() -> None:
    model, tokenizer = load_model("tiny")
    fresh, made = pretrain(0, 0, 4, 0)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in fresh.state_dict().items()
    }
    assert tokenizer.get_vocab() == made.get_vocab() and tokenizer.mask_token == MASK
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_212_288


def test_every_character_is_one_token_and_comes_back() -> None:
    tokenizer = character_tokenizer()
    text = "0123401234012340:a1p4=1234341221434321"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text


def test_the_loss_of_a_uniform_model_is_the_entropy_of_the_vocabulary() -> None:
    """Cross-entropy over the mask ratio is unbiased for the mean over tokens: log V for uniform predictions."""
    tokenizer = character_tokenizer()
    model = pretrain(0, 0, 4, 0)[0]
    torch.nn.init.zeros_(model.model.transformer.ff_out.weight)
    del model.model.transformer.blocks[1:]  # nothing that they compute is seen
    ids, prompt_length = sample_batch(tokenizer, 64, Sudoku().prompt, random.Random(0))
    assert ids.shape == (64, prompt_length + RESPONSE_LENGTH)
    generator = torch.Generator().manual_seed(0)
    losses = torch.stack([diffusion_loss(model, ids, prompt_length, generator).detach() for _ in range(30)])
    expected = torch.log(torch.tensor(float(len(tokenizer))))
    assert abs(losses.mean() - expected) < 4 * losses.std() / 30**0.5


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
    """Behind one it is right nine times in ten or more, and without it less often: there is something to teach."""

    class Shown(Sudoku):
        def prompt(self, row: Row) -> str:
            return self.reference_prompt(row)

    rows = Sudoku().problems("validation", 16)
    with_copy, without = (
        sum(r.score for r in replace(shipped, task=task).once(rows, Decoding(48, 8, 24), torch.arange(16))) / 16
        for task in (Shown(), Sudoku())
    )
    assert with_copy >= 0.9 and 0.2 < without < 0.85
