"""Reuse of an anchor's activations: against attention under an explicit mask, and against the exact computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_dream import small_dream
from test_objective import BLOCK, DEFAULTS, EOS, LENGTH, examples_of, make_rollouts, make_setup, make_trajectory
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from dopsd.drift import mean_drifts
from dopsd.models import add_lora
from dopsd.models.bidirectional import BidirectionalModel, eager, positions_of
from dopsd.models.llada import LLaDABlock, LLaDAModelLM
from dopsd.models.packed import Packed
from dopsd.objective import Objective, StepOutput
from dopsd.rollout import Rollout
from dopsd.step_batch import Example, PackedInputs, Reuse, StepBatch, collate, step_batches
from dopsd.trajectory import Trajectory
from dopsd_kernels.lora_layer import elementwise

CPU = torch.device("cpu")
MASK = 36
MODES: tuple[Reuse, ...] = ("prompt", "block")


def batches_of(examples: Sequence[Example], reuse: Reuse, size: int = 1000) -> list[StepBatch]:
    return list(step_batches(examples, size, reuse=reuse, mask_id=MASK, pad_id=EOS, device=CPU))


def examples_for(reuse: Reuse, rollouts: Sequence[Rollout] | None = None, **changes: Any) -> list[Example]:
    """Examples of the objective's tests: 4, 3 and 2 blocks of one to three steps, prompts of 3, 6 and 5 tokens."""
    options = Objective(**{**DEFAULTS, "reuse": reuse, **changes})
    rollouts = make_rollouts(37) if rollouts is None else rollouts
    return examples_of(options, rollouts)


def models(small_llada: Callable[..., LLaDAModelLM], name: str) -> BidirectionalModel:
    return small_llada(n_kv_heads=2) if name == "llada" else small_dream()


def concatenated(model: BidirectionalModel, anchor: Tensor, own: Tensor, start: int, prefix: Tensor) -> Tensor:
    """States (T' + T, d) of an anchor followed by the tokens that stand at its column ``start`` and behind.

    The anchor's tokens see the anchor; the others see each other and the anchor's columns ``prefix``.
    """
    width, length = len(anchor), len(own)
    seen = torch.zeros(width + length, width + length, dtype=torch.bool)
    seen[:width, :width] = True
    seen[width:, width:] = True
    seen[width:, :width] = prefix
    x = model.get_input_embeddings()(torch.cat((anchor, own)))[None]
    positions = torch.cat((torch.arange(width), start + torch.arange(length)))
    for layer in model.layers:
        x, _, _ = layer(x, model._rotary(positions[None]), seen[None, None], None)
    return model.final_norm(x)[0]


def literal(
    model: BidirectionalModel, example: Example, reuse: Reuse, teacher: bool, columns: Tensor
) -> Tensor:  # (S, R, d)
    """The states of one side at the response positions ``columns`` (S, R), one state after the other."""
    trajectory, starts = example.trajectory, example.trajectory.block_starts(example.steps).tolist()
    prompt = example.teacher_prompt_ids if teacher else trajectory.prompt_ids
    state, shown = example.views(range(len(example.steps)), MASK)
    rows = [torch.cat((prompt, row)) for row in (shown if teacher else state)]
    out = []
    for i, row in enumerate(rows):
        anchor = rows[starts.index(starts[i])]
        begin, length = (len(prompt) + starts[i], BLOCK) if reuse == "block" else (len(prompt), LENGTH)
        column = torch.arange(len(row))
        prefix = column < len(prompt) if reuse == "prompt" else (column < begin) | (column >= begin + length)
        states = concatenated(model, anchor, row[begin : begin + length], begin, prefix)
        read = (columns[i] + len(prompt) - model.shift).clamp_min(0)
        if starts.index(starts[i]) == i:
            out.append(states[read])
        else:
            out.append(states[torch.where(read < begin, read, read - begin + len(row))])
    return torch.stack(out)


def gradients(model: nn.Module) -> Tensor:
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(grads)


# ---- against attention under an explicit mask ----


@pytest.mark.parametrize("size", [1000, 3])
@pytest.mark.parametrize("teacher", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("name", ["llada", "dream"])
@pytest.mark.parametrize("reuse", MODES)
def test_reuse_is_attention_under_a_mask(
    small_llada: Callable[..., LLaDAModelLM], reuse: Reuse, name: str, teacher: bool, size: int
) -> None:
    """Values and all gradients, prompts of three lengths and a block that batches of three states cut included."""
    model = models(small_llada, name)
    examples = examples_for(reuse, teacher_context="reference" if teacher else "self_future")
    examples[0] = Example(examples[0].trajectory, examples[0].steps, examples[0].reveal, torch.tensor([7]))
    expected = torch.cat(
        [
            literal(model, one, reuse, teacher, one.trajectory.block_starts(one.steps)[:, None] + torch.arange(BLOCK))
            for one in examples
        ]
    )
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (expected * weight).sum().backward()
    expected_gradients = gradients(model)
    done, got = 0, []
    for batch in batches_of(examples, reuse, size):
        side = batch.teacher if teacher else batch.student
        got.append(side.hidden_states(model, batch.columns))
        (got[-1] * weight[done : done + len(batch)]).sum().backward()
        done += len(batch)
    torch.testing.assert_close(torch.cat(got), expected, rtol=1e-9, atol=1e-9)
    found = gradients(model)
    assert float((found - expected_gradients).norm()) <= 1e-9 * float(expected_gradients.norm())


@pytest.mark.parametrize("name", ["llada", "dream"])
@pytest.mark.parametrize("reuse", MODES)
def test_an_empty_prompt_and_single_columns(small_llada: Callable[..., LLaDAModelLM], reuse: Reuse, name: str) -> None:
    """Without a prompt the first token's state lies at itself; the last layer computes only what is read."""
    model = models(small_llada, name)
    trajectories = [make_trajectory([[2, 1, 1], [2, 2], [2, 2], [2]], prompt, 37, 0) for prompt in (0, 2)]
    examples = examples_for(reuse, [Rollout({}, trajectory, "", 1.0, 1) for trajectory in trajectories])
    (batch,) = batches_of(examples, reuse)
    for column in range(BLOCK):
        read = batch.columns[:, column : column + 1]
        expected = torch.cat(
            [literal(model, one, reuse, False, part) for one, part in zip(examples, read.chunk(2), strict=True)]
        )
        torch.testing.assert_close(batch.student.hidden_states(model, read), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reuse", MODES)
def test_gradients_match_finite_differences(small_llada: Callable[..., LLaDAModelLM], reuse: Reuse) -> None:
    """Through an anchor that no state of the batch is read at: only its keys and values matter."""
    model = small_llada(d_model=4, n_heads=2, n_layers=1, mlp_hidden_size=4)
    (example,) = examples_for(reuse, make_rollouts(37)[:1])
    batch = collate([example], [(0, 1), (0, 2), (0, 4)], reuse=reuse, mask_id=MASK, pad_id=EOS, device=CPU)
    inputs = batch.student
    assert isinstance(inputs, PackedInputs) and len(inputs.anchors.input_ids) == 2
    names = [name for name, _ in model.named_parameters() if any(part in name for part in ("k_proj", "v_proj", "wte"))]
    leaves = [dict(model.named_parameters())[name].detach().requires_grad_() for name in names]

    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return inputs.hidden_states(self.model, batch.columns[:, :2])

    reading = Reading()

    def states(*values: Tensor) -> Tensor:
        weights = {f"model.{name}": value for name, value in zip(names, values, strict=True)}
        return functional_call(reading, weights, ())

    assert torch.autograd.gradcheck(states, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(lambda key: states(key, *leaves[1:]), leaves[:1])


# ---- against the exact computation ----


class BlockCausal(LLaDABlock):
    """A layer in which the prompt sees the prompt, and block b of the response the prompt and blocks up to b."""

    def forward(self, x: Tensor, rotary: Any, key_mask: Any, read: Tensor | None, *prefix: Any) -> Any:
        self.read = read
        return super().forward(x, rotary, key_mask, read, *prefix)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, at: Tensor, key_at: Tensor, seen: Any, prompt: int) -> Any:
        at = at.expand(len(query), -1) if self.read is None else at.expand(len(query), -1).gather(1, self.read)
        block, key_block = ((x - prompt).clamp_min(-1) // BLOCK for x in (at, key_at))
        allowed = block[:, :, None] >= key_block[:, None, :]
        return eager(query, key, value, (allowed if seen is None else allowed & seen[:, None])[:, None])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        width = key.shape[2]
        seen = None if key_mask is None else key_mask[:, 0, 0]
        at = torch.arange(width)[None]
        return self.mix(query, key, value, at, at, seen, width - LENGTH)

    def _attend_to_prefix(
        self, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, packed: Packed
    ) -> Tensor:
        anchor, own, width = packed.anchor, packed.columns(), prefix_key.shape[2]
        at = torch.cat((torch.arange(width).expand(len(own), -1), own), 1)
        seen = torch.cat((packed.prefix_mask[anchor], torch.ones_like(own, dtype=torch.bool)), 1)
        prompt = width if key.shape[2] == LENGTH else width - LENGTH
        keys, values = torch.cat((prefix_key[anchor], key), 2), torch.cat((prefix_value[anchor], value), 2)
        return self.mix(query, keys, values, own, at, seen, prompt)


def update(setup: Any, examples: Sequence[Example], reuse: Reuse, size: int = 1000) -> tuple[Tensor, list[StepOutput]]:
    """Loss and gradients of an update as one vector, and the outputs."""
    options, outputs = Objective(**{**DEFAULTS, "reuse": reuse}), []
    for batch in batches_of(examples, reuse, size):
        outputs.append(options.forward(setup.network, setup.teacher, batch, setup.mask_id))
        outputs[-1].loss.backward()
    return torch.cat((sum(one.loss.detach() for one in outputs)[None], gradients(setup.model))), outputs


@pytest.mark.parametrize("reuse", MODES)
def test_reuse_is_exact_for_a_block_causal_model(small_llada: Callable[..., LLaDAModelLM], reuse: Reuse) -> None:
    """What an anchor computes for prompt and earlier blocks is then what its block's other states compute."""
    setup = make_setup(small_llada, "ema")
    examples = examples_for(reuse)
    full, _ = update(setup, examples, "none")
    for layer in setup.network.layers:
        layer.__class__ = BlockCausal
    exact, exact_outputs = update(setup, examples, "none")
    reused, outputs = update(setup, examples, reuse)
    assert float((exact - full).norm()) > 0.01 * float(full.norm())  # the mask does something
    torch.testing.assert_close(reused, exact, rtol=1e-10, atol=1e-10 * float(exact.norm()))
    assert torch.equal(outputs[0].chosen, exact_outputs[0].chosen)
    torch.testing.assert_close(outputs[0].divergence, exact_outputs[0].divergence, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reuse", MODES)
def test_anchors_are_exact(small_llada: Callable[..., LLaDAModelLM], reuse: Reuse) -> None:
    """With full attention: no drift where every block has one state, and none in the anchors of other blocks."""
    setup = make_setup(small_llada, "ema")
    once = [Rollout({}, make_trajectory([[4]] * 4, prompt, 37, prompt), "", 1.0, 1) for prompt in (3, 5)]
    examples = examples_for(reuse, once)
    torch.testing.assert_close(
        update(setup, examples, reuse)[0], update(setup, examples, "none")[0], rtol=0, atol=1e-13
    )

    examples = examples_for(reuse)
    (exact,), (reused,) = batches_of(examples, "none"), batches_of(examples, reuse)
    with torch.no_grad():
        sides = [getattr(batch, side) for batch in (exact, reused) for side in ("student", "teacher")]
        states = [side.hidden_states(setup.network, exact.columns) for side in sides]
    first = torch.cat([one.anchors() == torch.arange(len(one.steps)) for one in examples])
    assert first.sum() == 10 and len(first) == 20
    for ours, theirs in zip(states[2:], states[:2], strict=True):
        torch.testing.assert_close(ours[first], theirs[first], rtol=1e-11, atol=1e-12)
        drift = (ours[~first] - theirs[~first]).flatten(1).norm(dim=1) / theirs[~first].flatten(1).norm(dim=1)
        assert float(drift.min()) > 1e-3 and float(drift.max()) < 1


@pytest.mark.parametrize("reuse", MODES)
def test_batches_do_not_matter(small_llada: Callable[..., LLaDAModelLM], reuse: Reuse) -> None:
    """Examples with prompts of different lengths together, each on its own, or cut anywhere: the same update."""
    setup = make_setup(small_llada, "fixed")
    examples = examples_for(reuse)
    together, _ = update(setup, examples, reuse)
    for others in ([update(setup, [one], reuse)[0] for one in examples], [update(setup, examples, reuse, 3)[0]]):
        torch.testing.assert_close(sum(others), together, rtol=1e-9, atol=1e-10 * float(together.norm()))


@pytest.mark.parametrize("reuse", MODES)
def test_states_come_in_the_order_asked_for(small_llada: Callable[..., LLaDAModelLM], reuse: Reuse) -> None:
    """Any states of any examples, an anchor behind the states that reuse it included."""
    model, examples = small_llada(), examples_for(reuse)
    (batch,) = batches_of(examples, reuse)
    index = [(1, 3), (1, 2), (1, 0), (0, 2), (0, 7), (0, 0)]
    some = collate(examples, index, reuse=reuse, mask_id=MASK, pad_id=EOS, device=CPU)
    rows = [8 * number + step for number, step in index]
    for side in ("student", "teacher"):
        got, expected = (getattr(one, side).hidden_states(model, one.columns) for one in (some, batch))
        torch.testing.assert_close(got, expected[rows], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reuse", MODES)
def test_gradient_checkpointing_changes_nothing(small_llada: Callable[..., LLaDAModelLM], reuse: Reuse) -> None:
    """Activations recomputed in the backward pass, keys and values of the anchors included."""
    setup, examples = make_setup(small_llada, "ema"), examples_for(reuse)
    setup.model.train()
    plain, _ = update(setup, examples, reuse)
    setup.network.gradient_checkpointing_enable({"use_reentrant": False})
    again, _ = update(setup, examples, reuse)
    torch.testing.assert_close(again, plain, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reuse", MODES)
def test_drift_is_the_kl_between_exact_and_reused(small_llada: Callable[..., LLaDAModelLM], reuse: Reuse) -> None:
    """A sampled state's drift is that KL over K from full logits; an example's is the mean, and an anchor's is 0."""
    setup, examples = make_setup(small_llada, "ema"), examples_for(reuse)
    objective = Objective(**{**DEFAULTS, "reuse": reuse})
    (exact,), (reused,) = batches_of(examples, "none"), batches_of(examples, reuse)
    setup.model.train()
    drift = objective.drift(setup.network, setup.teacher, exact, reused, MASK)
    assert setup.model.training and not drift.requires_grad
    chosen = objective.forward(setup.network, setup.teacher, reused, MASK).chosen
    with torch.no_grad():
        sides = [batch.student.hidden_states(setup.network, exact.columns) for batch in (exact, reused)]
        p, q = ((side @ setup.network.lm_head_weight.mT).log_softmax(-1) for side in sides)
    kl = (p.exp() * (p - q)).sum(-1)
    expected = (kl * chosen).sum(-1) / chosen.sum(-1).clamp_min(1)
    torch.testing.assert_close(drift, expected, rtol=1e-9, atol=1e-12)
    first = torch.cat([one.anchors() == torch.arange(len(one.steps)) for one in examples])
    assert float(drift[first].abs().max()) < 1e-12 and float(drift[~first].median()) > 1e-5

    options: dict[str, Any] = {"seed": 0, "mask_id": MASK, "pad_id": EOS, "device": CPU}
    means = mean_drifts(objective, setup.network, setup.teacher, examples, samples=1000, size=3, **options)
    expected = torch.stack([part.mean() for part in drift.split([8, 8, 4])]).float()
    torch.testing.assert_close(means, expected, rtol=1e-5, atol=0)
    few = [
        mean_drifts(objective, setup.network, setup.teacher, examples, samples=1, size=size, **options)
        for size in (1, 100)
    ]
    torch.testing.assert_close(*few)
    assert all(float((part - one).abs().min()) < 1e-6 for part, one in zip(drift.split([8, 8, 4]), few[0], strict=True))


# ---- what is computed ----


@pytest.mark.parametrize(("reuse", "tokens"), [("none", 58368), ("prompt", 34368), ("block", 7488)])
def test_tokens_computed(small_llada: Callable[..., LLaDAModelLM], reuse: Reuse, tokens: int) -> None:
    """128 states of a response of 256 tokens in blocks of 32 behind a prompt of 200: operations of linear layers."""
    width, hidden = 2, 2
    model = small_llada(d_model=width, n_heads=1, mlp_hidden_size=hidden, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(32, generator=generator) // 2 + 16 * block for block in range(8)])
    trajectory = Trajectory(torch.ones(200, dtype=torch.int64), torch.ones(256, dtype=torch.int64), order, 32)
    example = Example(trajectory, torch.arange(128), torch.zeros(128, 256, dtype=torch.bool), trajectory.prompt_ids)
    (batch,) = batches_of([example], reuse)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        batch.student.hidden_states(model, batch.columns[:, :2])
    counts = counter.get_flop_counts()["Global"]
    linear = sum(count for name, count in counts.items() if name in (torch.ops.aten.mm, torch.ops.aten.addmm))
    keys, others = 2 * width**2, 2 * width**2 + 3 * width * hidden
    # Two layers, in the last of which a state's two positions need more than keys and values.
    assert linear == 2 * (tokens * (2 * keys + others) + 128 * 2 * others)


@pytest.mark.parametrize("reuse", MODES)
def test_dropout_is_drawn_once_per_computed_token(
    small_llada: Callable[..., LLaDAModelLM], reuse: Reuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's keys are made once for an anchor, with one draw, and are what its block's other states attend to."""
    network = small_llada()
    model = add_lora(network, None, 3, 6, 0.5).train()
    examples = examples_for(reuse)
    (batch,) = batches_of(examples, reuse)
    assert isinstance(batch.student, PackedInputs)
    groups, others = 10, 10
    padded = batch.student.anchors.input_ids.shape[1]
    own = LENGTH if reuse == "prompt" else BLOCK
    drawn: list[tuple[int, int]] = []  # how many tokens, and the seed

    def drop(x: Tensor, probability: float, seed: int) -> Tensor:
        drawn.append((len(x), seed))
        return x

    monkeypatch.setattr(elementwise, "drop", drop)
    calls: list[tuple[tuple[Any, ...], tuple[Tensor, ...]]] = []
    for module in model.modules():
        if isinstance(module, LLaDABlock):
            module.register_forward_hook(lambda _, args, out: calls.append((args, out)))
    batch.student.hidden_states(network, batch.columns)
    tokens = [count for count, _ in drawn]
    # All seven linear layers of the first block, and of the last one keys and values; its five others are of what is
    # read, which with reuse=block is as much as a state computes.
    assert len(tokens) == 28 == len({seed for _, seed in drawn})
    assert tokens.count(groups * padded) == 7 + 2
    assert tokens.count(others * own) == 7 + 2 + (2 * 5 if reuse == "block" else 0)
    for (_, (_, key, value)), (args, _) in zip(calls[:2], calls[2:], strict=True):
        width = args[4].shape[2]
        assert width == (padded - LENGTH if reuse == "prompt" else padded)
        for made, used in zip((key, value), args[4:6], strict=True):
            assert used.data_ptr() == made.data_ptr() and torch.equal(used, made[:, :, :width])


# ---- examples ----


@pytest.mark.parametrize("scope", ["future_blocks", "masked"])
def test_the_reveal_is_drawn_once_per_block(scope: str) -> None:
    """Each block's first state has the reveal that it has without reuse; the others the part that is still masked."""
    changes = {"reveal_scope": scope, "retain_ratio": 0.5}
    assert any(exact.reveal.any() for exact in examples_for("none", **changes))
    for exact, reused in zip(examples_for("none", **changes), examples_for("block", **changes), strict=True):
        anchors, reveal_step = exact.anchors().tolist(), exact.trajectory.reveal_step
        for row, anchor in enumerate(anchors):
            masked = reveal_step >= exact.steps[row]
            assert torch.equal(reused.reveal[row], exact.reveal[anchor] & masked)
            begin = int(exact.trajectory.block_starts(exact.steps)[row])
            assert torch.equal(reused.reveal[row, begin + BLOCK :], reused.reveal[anchor, begin + BLOCK :])
    for exact, reused in zip(examples_for("none", **changes), examples_for("prompt", **changes), strict=True):
        assert torch.equal(exact.reveal, reused.reveal)


def test_anchors_of_a_slice_lie_in_the_slice() -> None:
    """A part of an example starts a block of its own where the example was cut."""
    (example,) = examples_for("none", make_rollouts(37)[:1])
    assert example.anchors().tolist() == [0, 0, 0, 3, 3, 5, 5, 7]
    assert example.slice(1, 4).anchors().tolist() == [0, 1] and example.slice(1, 2).anchors().tolist() == [0, 1, 1, 3]


def test_positions_count_from_the_first_real_token(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """Packed tokens have the positions of the columns at which they stand, behind left padding too."""
    (batch,) = batches_of(examples_for("block"), "block")
    inputs = batch.student
    assert isinstance(inputs, PackedInputs) and inputs.anchors.attention_mask is not None
    positions = positions_of(inputs.anchors.attention_mask)[inputs.packed.anchor].gather(1, inputs.packed.columns())
    prompts = torch.tensor([3, 6, 5])[batch.example]
    expected = (prompts[:, None] + batch.columns)[inputs.row >= len(inputs.anchors.input_ids)]
    assert torch.equal(positions, expected)
