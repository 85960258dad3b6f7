"""Decoding with a cache, against attention under an explicit mask on one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_dream import small_dream
from test_reuse import BlockCausal, concatenated
from test_sampler import EOS, MASK, eager_to_stop, loop_decode, make_prompts, run, run_unread, same
from torch import Tensor

from dopsd import cache
from dopsd.models.bidirectional import BidirectionalModel
from dopsd.models.llada import LLaDAModelLM
from dopsd.sampler import Decoding

KINDS: tuple[cache.Cache, ...] = ("prefix", "block")


class Literal:
    """One sequence's logits at each call of `loop_decode`: a block's later calls see its first call's other columns."""

    def __init__(self, model: BidirectionalModel, kind: cache.Cache, prompt: int, block_length: int) -> None:
        self.model, self.kind, self.prompt, self.width = model, kind, prompt, block_length
        self.block = -1

    def __call__(self, ids: Tensor) -> Any:
        ids, column = ids[0], torch.arange(ids.shape[1])
        block = int((ids[self.prompt :] == MASK).nonzero()[0]) // self.width
        begin = self.prompt + block * self.width
        end = begin + self.width if self.kind == "block" else len(ids)
        source = (column - self.model.shift).clamp_min(0)  # where the state that predicts a column's token lies
        if block != self.block:
            self.block, self.anchor = block, ids
            states = concatenated(self.model, ids, ids[:0], 0, column < 0)[source]
        else:
            seen = (column < begin) | (column >= end)
            states = concatenated(self.model, self.anchor, ids[begin:end], begin, seen)
            own = (source >= begin) & (source < end)
            states = states[torch.where(own, source - begin + len(ids), source)]
        return SimpleNamespace(logits=(states @ self.model.lm_head_weight.mT)[None])


def models(small_llada: Callable[..., LLaDAModelLM], name: str) -> BidirectionalModel:
    if name == "dream":
        model = small_dream()
        with torch.no_grad():
            model.lm_head_weight[EOS] *= 1.6
        return model
    return eager_to_stop(small_llada(n_kv_heads=2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llada", "dream"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.9, "steps": 12}, {"threshold": 0.3, "temperature": 0.5}, {"stop_at_eos": False, "steps": 7}],
    ids=str,
)
@pytest.mark.parametrize("hinted", [False, True])
def test_decoding_equals_a_loop_over_attention_under_a_mask(
    small_llada: Callable[..., LLaDAModelLM], kind: cache.Cache, name: str, changes: dict[str, Any], hinted: bool
) -> None:
    """Prompts of several lengths, and several tries at some of them, as one batch."""
    model = models(small_llada, name)
    decoding = Decoding(**{"gen_length": 12, "block_length": 4, "cache": kind, **changes})
    prompts = make_prompts(5, 2, 9, 1)
    prompts, seeds = [*prompts, prompts[0], prompts[0], prompts[2]], torch.tensor([3, -8, 1 << 40, 4, 5, 6, 7])
    hints = None
    if hinted:
        generator = torch.Generator().manual_seed(9)
        hints = torch.randint(1, MASK, (7, 12), generator=generator)
        hints[torch.rand(7, 12, generator=generator) < 0.4] = MASK
        hints[4] = hints[0]
    expected = []
    for index, prompt in enumerate(prompts):
        literal: Any = Literal(model, kind, len(prompt), 4)
        hint = None if hints is None else hints[index]
        expected.append(loop_decode(literal, prompt, decoding, int(seeds[index]), hint))
    found = run(model, prompts, decoding, seeds, hints=hints)
    assert all(same(got, want) for got, want in zip(found, expected, strict=True))
    without = run(model, prompts, Decoding(**{**vars(decoding), "cache": "none"}), seeds, hints=hints)
    assert not all(same(got, other) for got, other in zip(found, without, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_one_step_are_exact(small_llada: Callable[..., LLaDAModelLM], kind: cache.Cache) -> None:
    """Every step is then a first one."""
    model, prompts = small_llada(), make_prompts(5, 3, 5)
    for steps, exact in ((3, True), (12, False)):
        found, expected = (
            run(model, prompts, Decoding(12, 4, steps, cache=one, stop_at_eos=False), torch.arange(3))
            for one in (kind, "none")
        )
        assert all(map(same, found, expected)) == exact


def test_a_prefix_is_exact_for_a_block_causal_model(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """Nothing before a block then depends on it."""
    model, prompts = small_llada(), make_prompts(5, 3, 8)
    full = run(model, prompts, Decoding(16, 4, stop_at_eos=False), torch.arange(3))
    for layer in model.layers:
        layer.__class__ = BlockCausal
    exact, cached = (
        run(model, prompts, Decoding(16, 4, cache=kind, stop_at_eos=False), torch.arange(3))
        for kind in ("none", "prefix")
    )
    assert all(map(same, cached, exact)) and not all(map(same, exact, full))


@pytest.mark.parametrize(("kind", "tokens"), [("none", 58368), ("prefix", 20928), ("block", 7488)])
def test_tokens_computed(small_llada: Callable[..., LLaDAModelLM], kind: cache.Cache, tokens: int) -> None:
    """128 steps of a response of 256 tokens in blocks of 32 behind a prompt of 200, once and at four tries."""
    model = small_llada(max_sequence_length=456, n_layers=1, d_model=4, n_heads=1, mlp_hidden_size=4)
    computed: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: computed.append(args[0].numel()))
    (prompt,) = make_prompts(200)
    decoding = Decoding(256, 32, temperature=0.9, stop_at_eos=False, cache=kind)
    run(model, [prompt], decoding, torch.tensor([0]))
    assert len(computed) == 128 and sum(computed) == tokens
    computed.clear()
    found = run(model, [prompt] * 4, decoding, torch.arange(4))
    assert len({tuple(trajectory.tokens.tolist()) for trajectory in found}) == 4
    # Before their first token the tries are one sequence.
    assert sum(computed) == 4 * tokens - (0 if kind == "none" else 3 * 456)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_the_batch_does_not_matter(
    small_llada: Callable[..., LLaDAModelLM], kind: cache.Cache, threshold: float | None
) -> None:
    """A prompt and a seed give one trajectory: alone, among others, and where sequences that stopped stay."""
    model = eager_to_stop(small_llada())
    decoding = Decoding(12, 4, temperature=0.9, threshold=threshold, cache=kind)
    prompts, seeds = [*make_prompts(3, 8, 8, 5), *make_prompts(3)], torch.tensor([5, 6, 7, 8, 9])
    together = run(model, prompts, decoding, seeds)
    assert len({trajectory.num_steps for trajectory in together}) > 1
    for index, prompt in enumerate(prompts):
        assert same(run(model, [prompt], decoding, seeds[index : index + 1])[0], together[index])


@pytest.mark.parametrize("kind", KINDS)
def test_waits(small_llada: Callable[..., LLaDAModelLM], monkeypatch: pytest.MonkeyPatch, kind: cache.Cache) -> None:
    """Where reading is not free: once at a block's end, and for the number of tries at a block's first step."""
    model, prompts = eager_to_stop(small_llada()), make_prompts(5, 7) * 4
    decoding = Decoding(12, 4, temperature=0.9, cache=kind)
    expected = run(model, prompts, decoding, torch.arange(8))
    found, waits, going = run_unread(model, prompts, decoding, torch.arange(8), monkeypatch)
    assert all(map(same, found, expected))
    assert len(going) == 6 and waits == 2 * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["none", *KINDS])
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_a_gpu_decodes_the_same(small_llada: Callable[..., LLaDAModelLM], name: str, kind: cache.Cache) -> None:
    """In fp64, tries at one prompt and padding included."""
    model, prompts = models(small_llada, name), make_prompts(5, 2, 9)
    prompts, seeds = [*prompts, prompts[0]], torch.arange(4)
    decoding = Decoding(12, 4, temperature=0.9, cache=kind)
    expected = run(model, prompts, decoding, seeds)
    found = run(model.cuda(), [prompt.cuda() for prompt in prompts], decoding, seeds)
    assert all(map(same, found, expected))
