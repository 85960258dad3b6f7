"""Step concatenation of block-causal models: reuse equals whole states one by one and the two-copy training pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_block_causal import EOS, FAMILIES, MASK, blocks_of, oracle, small_model
from test_block_decoding import LENGTHS, likely_to_stop
from test_dream import close
from test_published_configs import CONFIGS
from test_reuse import gradients
from test_sampler import make_prompts, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dopsd.models.a2d import A2DQwen3Config, A2DQwen3LMHeadModel
from dopsd.sampler import Decoding
from dopsd.step_batch import BlockInputs, Example, Reuse, StepBatch, step_batches
from dopsd.trajectory import Trajectory

BLOCK, LENGTH = 4, 12


def examples_of(model: Any, **changes: Any) -> list[Example]:
    """What the model decodes for prompts of every remainder, and a teacher that sees half of what a block has left."""
    decoding = Decoding(**{"gen_length": LENGTH, "block_length": BLOCK, "steps": 9, "temperature": 0.7, **changes})
    prompts = make_prompts(*LENGTHS)
    generator = torch.Generator().manual_seed(2)
    examples = []
    for trajectory in run(model, prompts, decoding, torch.arange(len(prompts))):
        steps = torch.arange(trajectory.num_steps)
        position = torch.arange(LENGTH) - trajectory.block_starts(steps)[:, None]
        left = (trajectory.reveal_step > steps[:, None]) & (position >= 0) & (position < BLOCK)
        reveal = left & (torch.rand(left.shape, generator=generator) < 0.5)
        examples.append(Example(trajectory, steps, reveal, trajectory.prompt_ids))
    assert any(example.reveal.any() for example in examples)
    return examples


def batches_of(
    examples: Sequence[Example], reuse: Reuse, size: int = 1000, block_causal: bool = True
) -> list[StepBatch]:
    options: dict[str, Any] = {"mask_id": MASK, "pad_id": EOS, "device": torch.device("cpu")}
    return list(step_batches(examples, size, reuse=reuse, block_causal=block_causal, **options))


def side_of(batch: StepBatch, teacher: bool) -> Any:
    return batch.teacher if teacher else batch.student


def literal(model: Any, example: Example, teacher: bool) -> list[Tensor]:
    """Each state's states (n, d) of its block's positions in the response, by transformers' pass over two copies.

    The first copy has, in each block, one of its states, and each block of it sees itself and the second's earlier
    blocks; the second is clean and block-causal. With a shift, a block's first token is read off the second copy.
    """
    plain, trajectory = oracle(model), example.trajectory
    # Weights by their names, so that gradients reach the model's own.
    weights = dict(model.named_parameters())
    prompt, total = len(trajectory.prompt_ids), len(trajectory.prompt_ids) + LENGTH
    blocks = torch.tensor(blocks_of(model, total))
    clean = torch.cat((trajectory.prompt_ids, trajectory.tokens))
    state, shown = example.views(range(len(example.steps)), MASK)
    starts = trajectory.block_starts(example.steps)
    late = blocks > blocks[:, None]
    same, before = blocks == blocks[:, None], blocks < blocks[:, None]
    seen = torch.cat((torch.cat((same, before), 1), torch.cat((torch.zeros_like(same), ~late), 1)))
    hidden = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e300)[None, None]
    out: list[Tensor] = [torch.empty(0)] * len(starts)
    rounds = [int((starts[:index] == start).sum()) for index, start in enumerate(starts)]
    for number in range(max(rounds) + 1):
        noisy = clean.clone()
        chosen = [index for index, its in enumerate(rounds) if its == number]
        spans = {}
        for index in chosen:
            own = [p for p in range(LENGTH) if 0 <= p - int(starts[index]) < BLOCK]
            spans[index] = own
            noisy[[prompt + p for p in own]] = (shown if teacher else state)[index, own]
        inputs = {
            "inputs_embeds": weights[model_embedding(model)][torch.cat((noisy, clean))][None],
            "attention_mask": hidden,
            "position_ids": torch.arange(total).repeat(2)[None],
            "use_cache": False,
        }
        body = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
        states = torch.func.functional_call(plain.model, body, (), inputs).last_hidden_state[0]
        for index, own in spans.items():
            rows = []
            for p in own:
                column = prompt + p - model.shift
                outside = column < prompt + int(starts[index])
                rows.append(states[total + column if outside else column])
            out[index] = torch.stack(rows)
    return out


def model_embedding(model: Any) -> str:
    return next(name for name, value in model.named_parameters() if value is model.get_input_embeddings().weight)


@pytest.mark.parametrize("size", [1000, 3])
@pytest.mark.parametrize("teacher", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reuse_equals_the_two_copy_pass(family: str, teacher: bool, size: int) -> None:
    """Values and all gradients, and so do states one by one; a block that batches of three states cut included."""
    model = likely_to_stop(family)
    examples = examples_of(model)
    expected = [states for example in examples for states in literal(model, example, teacher)]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(states.shape, generator=generator, dtype=torch.float64) for states in expected]
    sum((states * weight).sum() for states, weight in zip(expected, weights, strict=True)).backward()
    wanted = gradients(model)
    for reuse in ("none", "block"):
        done = 0
        for batch in batches_of(examples, reuse, size):
            states = side_of(batch, teacher).hidden_states(model, batch.columns)
            loss = torch.zeros((), dtype=torch.float64)
            for row, example in zip(states, batch.example.tolist(), strict=True):
                step = done - sum(len(one.steps) for one in examples[:example])
                begin = int(examples[example].trajectory.block_starts(examples[example].steps)[step])
                inside = [0 <= begin + offset < LENGTH for offset in range(BLOCK)]
                close(row[inside].detach(), expected[done].detach())  # up to fp32 rounding of the rotary angles
                loss = loss + (row[inside] * weights[done]).sum()
                done += 1
            loss.backward()
        found = gradients(model)
        assert done == len(expected)
        assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_reuse_is_exact(family: str) -> None:
    """The two ways to compute a batch differ by fp64's rounding, gradients through the clean pass included."""
    model = small_model(family)
    examples = examples_of(model, stop_at_eos=False)
    results = []
    for reuse in ("none", "block"):
        (batch,) = batches_of(examples, reuse)
        states = batch.student.hidden_states(model, batch.columns)
        states = torch.where(batch.candidates[..., None], states, 0)
        states.pow(3).sum().backward()
        results.append((states.detach(), gradients(model)))
    (exact, exact_gradient), (reused, gradient) = results
    torch.testing.assert_close(reused, exact, rtol=1e-11, atol=1e-11)
    assert float((gradient - exact_gradient).norm()) <= 1e-11 * float(exact_gradient.norm())
    clean = model.clean_pass(torch.ones(1, 8, dtype=torch.int64), None, torch.tensor([4]), torch.tensor([0]), 1, 4)
    assert all(key.requires_grad for key, _ in clean.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_states_give_the_commits(family: str) -> None:
    """Every greedy token of every trajectory is the likeliest one where its state is computed again, reuse or not."""
    model = small_model(family)
    examples = examples_of(model, temperature=0.0, stop_at_eos=False)
    assert {example.trajectory.lead for example in examples} == ({0} if family.startswith("a2d") else {0, 1, 2, 3})
    for reuse in ("none", "block"):
        for batch in batches_of(examples, reuse, 11):
            with torch.no_grad():
                logits = batch.student.hidden_states(model, batch.columns) @ model.lm_head_weight.mT
            logits[..., MASK] = -torch.inf
            final = torch.stack([example.trajectory.tokens for example in examples])[batch.example]
            tokens = final.gather(1, batch.columns)
            assert bool(batch.committed.any(-1).all())
            assert torch.equal(logits.argmax(-1)[batch.committed], tokens[batch.committed])
            assert batch.committed.sum(-1).tolist() == batch.k.tolist()


def operations(batch: StepBatch, block_size: int) -> int:
    """Products and sums of the student's pass, with Qwen3-0.6B's 28 layers, but for the last all alike.

    It is read where two tokens are revealed.
    """
    fields, _ = CONFIGS["Qwen3-0.6B-A2D"]

    def counted(layers: int) -> int:
        with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
            config = A2DQwen3Config(**{**fields, "num_hidden_layers": layers, "block_size": block_size})
            batch.student.hidden_states(A2DQwen3LMHeadModel(config), batch.columns[:, :2])
        return counter.get_total_flops()

    one, two = counted(1), counted(2)
    return one + 27 * (two - one)


def test_what_is_computed() -> None:
    """128 states of 256 tokens behind a prompt of 200: one clean pass of all but the last block, and 128 blocks.

    The tokens and operations are those that docs/block_models.md prints.
    """
    order = torch.arange(256) // 2
    trajectory = Trajectory(torch.ones(200, dtype=torch.int64), torch.ones(256, dtype=torch.int64), order, 32)
    nothing = torch.zeros(128, 256, dtype=torch.bool)
    example = Example(trajectory, torch.arange(128), nothing, trajectory.prompt_ids)
    (exact,), (reused,) = batches_of([example], "none"), batches_of([example], "block")
    assert exact.tokens == 128 * 456 and reused.tokens == 456 - 32 + 128 * 32 == 4520
    assert isinstance(reused.student, BlockInputs) and reused.student.packed.prefix_mask.shape == (1, 424)
    (approximate,) = batches_of([example], "block", block_causal=False)
    assert approximate.tokens == 8 * 456 + 120 * 32
    page = (Path(__file__).parents[1] / "docs" / "block_models.md").read_text()
    for batch, size in ((exact, 32), (approximate, 0), (reused, 32)):
        assert f"| {batch.tokens:,} | {operations(batch, size) / 1e12:.1f} |" in page
