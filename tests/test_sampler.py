"""Decoding against a plain loop over full logits, one prompt at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from dopsd import confidence, sampler
from dopsd.errors import UsageError
from dopsd.models.llada import LLaDAModelLM
from dopsd.sampler import Decoding, decode, inference, left_pad, spread
from dopsd.seeds import mix_seeds
from dopsd.trajectory import NEVER, Trajectory
from dopsd_kernels import fused_confidence
from dopsd_kernels.reference import gumbel_noise

MASK, EOS, VOCAB = 36, 0, 37
WORD = (1 << 64) - 1


def splitmix(*values: int) -> int:
    """The hash written out on unsigned 64-bit integers: each value is XORed in, then one step of splitmix64."""
    state = 0
    for value in values:
        state = ((state ^ (value & WORD)) + 0x9E3779B97F4A7C15) & WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
        state ^= state >> 31
    return state - (1 << 64) if state >> 63 else state


def loop_decode(
    model: Any,
    prompt: Tensor,
    decoding: Decoding,
    seed: int,
    hints: Tensor | None = None,
    lead: int = 0,
    ahead: bool = False,
) -> Trajectory:
    """One prompt, no padding, logits of every position at every step, one position after the other.

    The first block has `lead` positions in the prompt, and what is then left at the end is a block of its own. With
    sub-blocks, a block's first token may come `ahead`.
    """
    length, width = decoding.gen_length, decoding.block_length
    blocks = length // width
    total = decoding.steps if decoding.steps is not None else max(blocks, length // 2)
    tokens, reveal_step = [MASK] * length, [NEVER] * length
    step = 0
    for block in range(-(-(length + lead) // width)):
        scheduled = min(block, blocks - 1)
        steps_here = total // blocks + (1 if scheduled < total % blocks else 0)
        inside = range(max(0, block * width - lead), min(length, (block + 1) * width - lead))
        step_here = 0
        while any(reveal_step[i] == NEVER for i in inside):
            shown = list(tokens)
            if hints is not None:
                for i in range(inside.stop, length):
                    shown[i] = int(hints[i])
            with torch.no_grad():
                ids = torch.cat((prompt, torch.tensor(shown)))[None]
                logits = model(ids).logits[0, len(prompt) :].double()
            logits[:, MASK] = -math.inf
            choice, sureness, probability = {}, {}, {}
            for i in inside:
                if reveal_step[i] != NEVER:
                    continue
                noisy = logits[i]
                if decoding.temperature > 0:
                    position_seed = torch.tensor(splitmix(seed, step, i))
                    noise = gumbel_noise(position_seed, torch.arange(VOCAB), torch.float64)
                    noisy = logits[i] / decoding.temperature + noise
                choice[i] = int(noisy.argmax())
                p = logits[i].softmax(-1)
                probability[i] = float(p[choice[i]])
                if decoding.remasking == "low_confidence":
                    sureness[i] = probability[i]
                elif decoding.remasking == "margin":
                    ranked = sorted(p.tolist(), reverse=True)
                    sureness[i] = ranked[0] - ranked[1]
                elif decoding.remasking == "entropy":
                    sureness[i] = sum(q * math.log(q) for q in p.tolist() if q > 0)
                elif decoding.remasking == "leftmost":
                    sureness[i] = -float(i)
                else:
                    sureness[i] = float(splitmix(splitmix(seed, step, i), 1))
            if decoding.sub_block_length is not None:
                first = (min(choice) + lead) % width
                stop = (
                    1 if ahead and first == 0 else (first // decoding.sub_block_length + 1) * decoding.sub_block_length
                )
                choice = {i: token for i, token in choice.items() if (i + lead) % width < stop}
            order = sorted(choice, key=lambda i: -sureness[i])
            if decoding.threshold is not None:
                commit = order[:1] + [i for i in order[1:] if probability[i] >= decoding.threshold]
            else:
                commit = order[: width // steps_here + (1 if step_here < width % steps_here else 0)]
            for i in commit:
                tokens[i], reveal_step[i] = choice[i], step
            step, step_here = step + 1, step_here + 1
            # Positions not yet decoded hold MASK, so the first end-of-text token is one that was decoded.
            if decoding.stop_at_eos and EOS in tokens and MASK not in tokens[: tokens.index(EOS)]:
                tokens = [EOS if token == MASK else token for token in tokens]
                return Trajectory(prompt, torch.tensor(tokens), torch.tensor(reveal_step), width, lead)
    return Trajectory(prompt, torch.tensor(tokens), torch.tensor(reveal_step), width, lead)


def make_prompts(*lengths: int) -> list[Tensor]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, MASK, (length,), generator=generator) for length in lengths]


def same(a: Trajectory, b: Trajectory) -> bool:
    """Equal in every field."""
    return (
        torch.equal(a.prompt_ids, b.prompt_ids)
        and torch.equal(a.tokens, b.tokens)
        and torch.equal(a.reveal_step, b.reveal_step)
        and (a.block_length, a.lead) == (b.block_length, b.lead)
    )


def run(model: Any, prompts: list[Tensor], decoding: Decoding, seeds: Tensor, **options: Any) -> list[Trajectory]:
    """`decode` with this file's special tokens."""
    return decode(model, prompts, decoding, mask_id=MASK, eos_id=EOS, seeds=seeds, **options)


def eager_to_stop(model: LLaDAModelLM) -> LLaDAModelLM:
    """The same model with an end-of-text token that is chosen every few positions."""
    with torch.no_grad():
        model.model.transformer.ff_out.weight[EOS] *= 1.6
    return model


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9},
    {"temperature": 0.9, "steps": 12},
    {"temperature": 0.5, "steps": 5},
    {"steps": 7},
    {"steps": 3},
    {"remasking": "margin"},
    {"remasking": "margin", "temperature": 1.3},
    {"remasking": "entropy"},
    {"remasking": "entropy", "temperature": 0.9, "steps": 10},
    {"remasking": "random"},
    {"remasking": "random", "temperature": 0.9, "steps": 7},
    {"remasking": "leftmost", "temperature": 0.9, "steps": 7},
    {"threshold": 0.3},
    {"threshold": 0.1, "temperature": 0.9},
    {"threshold": 1.0},
    {"block_length": 12, "steps": 5},
    {"block_length": 1, "steps": None, "temperature": 0.9},
]


@pytest.mark.parametrize("stop_at_eos", [True, False])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_decoding_equals_a_loop_over_full_logits(
    small_llada: Callable[..., LLaDAModelLM], changes: dict[str, Any], stop_at_eos: bool
) -> None:
    """Tokens and order of a batch of prompts of several lengths are those of the plain loop on each alone."""
    model = eager_to_stop(small_llada())
    decoding = Decoding(**{"gen_length": 12, "block_length": 4, "stop_at_eos": stop_at_eos, **changes})
    prompts, seeds = make_prompts(5, 2, 9, 5), torch.tensor([3, -8, 1 << 40, 4])
    expected = [loop_decode(model, p, decoding, s) for p, s in zip(prompts, seeds.tolist(), strict=True)]
    for got, want in zip(run(model, prompts, decoding, seeds), expected, strict=True):
        assert same(got, want)
    assert stop_at_eos or all(bool((t.reveal_step != NEVER).all()) for t in expected)


def test_blocks_do_not_matter_from_left_to_right(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """One token a step, the leftmost: what a decoding in blocks of one token gives, whatever the blocks."""
    model, prompts, seeds = eager_to_stop(small_llada()), make_prompts(5, 2, 9), torch.arange(3)
    blocks = [Decoding(12, width, 12, temperature=1.0, remasking="leftmost") for width in (12, 4)]
    expected = run(model, prompts, Decoding(12, 1, 12, temperature=1.0), seeds)
    for decoding in blocks:
        for one, other in zip(run(model, prompts, decoding, seeds), expected, strict=True):
            assert torch.equal(one.tokens, other.tokens) and torch.equal(one.reveal_step, other.reveal_step)


def test_some_of_those_loops_stop_early(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """Early stops do occur, in the middle of a block too, and leave end-of-text tokens behind the first one only."""
    model = eager_to_stop(small_llada())
    decoding = Decoding(12, 4, temperature=0.9, steps=12)
    found = run(model, make_prompts(5) * 12, decoding, torch.arange(12))
    left = {int((t.reveal_step == NEVER).sum()) for t in found}
    assert 0 in left and any(n % 4 for n in left) and any(n > 4 for n in left)
    for trajectory in found:
        never = trajectory.reveal_step == NEVER
        assert (trajectory.tokens[never] == EOS).all()
        assert not never[: trajectory.text_length(EOS)].any()


def test_sampling_in_fp64_for_an_fp32_model(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """`sampling_dtype` float64 takes logits and noise of an fp32 model's states in fp64."""
    model = small_llada(dtype=torch.float32)
    decoding = Decoding(12, 4, temperature=0.9, sampling_dtype="float64")
    prompts = make_prompts(5, 7)

    class Watch(TorchDispatchMode):
        wide = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("mm", "addmm") and out.dtype == torch.float64:
                self.wide += 1
            return out

    with Watch() as watch:
        got = run(model, prompts, decoding, torch.tensor([1, 2]))
    assert watch.wide == 6  # one head product a step
    with Watch() as watch:
        run(model, prompts, Decoding(12, 4, temperature=0.9), torch.tensor([1, 2]))
    assert watch.wide == 0
    expected = [loop_decode(model, p, decoding, s) for p, s in zip(prompts, (1, 2), strict=True)]
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_the_batch_does_not_matter(
    small_llada: Callable[..., LLaDAModelLM], remasking: Any, temperature: float
) -> None:
    """A prompt and a seed give one trajectory: alone, among others of other lengths, in any order."""
    model = eager_to_stop(small_llada())
    decoding = Decoding(12, 4, temperature=temperature, remasking=remasking)
    prompts, seeds = make_prompts(3, 8, 1, 8, 5), torch.tensor([5, 6, 7, 8, 5])
    together = run(model, prompts, decoding, seeds)
    for index, prompt in enumerate(prompts):
        (alone,) = run(model, [prompt], decoding, seeds[index : index + 1])
        assert same(alone, together[index])
    order = [3, 0, 4, 2, 1]
    shuffled = run(model, [prompts[i] for i in order], decoding, seeds[order])
    assert all(same(shuffled[at], together[index]) for at, index in enumerate(order))
    assert all(same(a, b) for a, b in zip(run(model, prompts, decoding, seeds), together, strict=True))


def test_seeds_decide_what_is_drawn(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """Other seeds give other samples and other random orders; a greedy decoding ignores them."""
    model = small_llada()
    prompts = make_prompts(4) * 6
    for changes in ({"temperature": 0.9}, {"remasking": "random"}):
        found = run(model, prompts, Decoding(12, 6, 12, stop_at_eos=False, **changes), torch.arange(6))
        assert len({(tuple(t.tokens.tolist()), tuple(t.reveal_step.tolist())) for t in found}) == 6
    found = run(model, prompts, Decoding(12, 4), torch.arange(6))
    assert all(same(found[0], other) for other in found)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.9}, {"remasking": "entropy"}, {"threshold": 0.5}], ids=str)
def test_the_mask_token_is_never_chosen(small_llada: Callable[..., LLaDAModelLM], changes: dict[str, Any]) -> None:
    """Under a head that finds the mask token by far the likeliest everywhere, it is still not chosen."""
    model = small_llada()
    with torch.no_grad():
        # The last norm's weight makes the first feature a constant, which the head takes for the mask token.
        norm = model.model.transformer.ln_f
        norm.forward = lambda x: torch.cat((torch.ones_like(x[..., :1]), x[..., 1:]), -1)
        model.model.transformer.ff_out.weight[MASK] = 0.0
        model.model.transformer.ff_out.weight[MASK, 0] = 1e4
    prompts = make_prompts(4, 6)
    masked = torch.cat((prompts[0], torch.full((8,), MASK)))[None]
    with torch.no_grad():
        assert (model(masked).logits.argmax(-1) == MASK).all()
    for trajectory in run(model, prompts, Decoding(8, 4, stop_at_eos=False, **changes), torch.tensor([1, 2])):
        assert (trajectory.tokens != MASK).all() and (trajectory.reveal_step != NEVER).all()


@pytest.mark.parametrize(
    ("length", "block", "steps", "expected"),
    [
        (8, 4, None, [[2, 2], [2, 2]]),
        (16, 8, 5, [[3, 3, 2], [4, 4]]),
        (12, 4, 7, [[2, 1, 1], [2, 2], [2, 2]]),
        (12, 4, 12, [[1] * 4] * 3),
        (12, 4, 3, [[4]] * 3),
        (7, 7, 3, [[3, 2, 2]]),
        (3, 1, None, [[1]] * 3),
        (1, 1, None, [[1]]),
    ],
)
def test_commits_follow_the_schedule(
    small_llada: Callable[..., LLaDAModelLM], length: int, block: int, steps: int | None, expected: list[list[int]]
) -> None:
    """Steps are shared out over blocks and tokens over steps, remainders first, as in LLaDA."""
    decoding = Decoding(length, block, steps, stop_at_eos=False)
    assert decoding.schedule() == expected
    counts = [count for reveals in expected for count in reveals]
    assert decoding.total_steps == len(counts) and decoding.blocks == len(expected)
    for trajectory in run(small_llada(), make_prompts(3, 5), decoding, torch.zeros(2, dtype=torch.int64)):
        assert trajectory.num_steps == len(counts)
        assert trajectory.commits(torch.arange(len(counts))).sum(-1).tolist() == counts


class Recorder:
    """A model that remembers the responses it was shown."""

    def __init__(self, model: LLaDAModelLM, length: int) -> None:
        self.model, self.length = model, length
        self.shown: list[Tensor] = []
        self.lm_head_weight, self.lead = model.lm_head_weight, model.lead
        self.training, self.eval, self.train, self.modules = model.training, model.eval, model.train, model.modules

    def hidden_states(self, ids: Tensor, mask: Tensor | None, read: Tensor) -> Tensor:
        """The model's, with the response noted."""
        self.shown.append(ids[:, -self.length :].clone())
        return self.model.hidden_states(ids, mask, read)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_hints_are_shown_until_their_block_begins(small_llada: Callable[..., LLaDAModelLM], temperature: float) -> None:
    """Hints stand in later blocks only, are cleared on entry, and change what is decoded before them."""
    model, decoding = small_llada(), Decoding(12, 4, temperature=temperature, stop_at_eos=False)
    prompts, seeds = make_prompts(5, 3, 5), torch.tensor([1, 2, 3])
    generator = torch.Generator().manual_seed(9)
    hints = torch.randint(1, MASK, (3, 12), generator=generator)
    hints[torch.rand(3, 12, generator=generator) < 0.4] = MASK
    hints[2] = MASK
    recorder = Recorder(model, 12)
    got = run(recorder, prompts, decoding, seeds, hints=hints)
    for index, prompt in enumerate(prompts):
        assert same(got[index], loop_decode(model, prompt, decoding, int(seeds[index]), hints[index]))
    for step, shown in enumerate(recorder.shown):
        for index, trajectory in enumerate(got):
            entered = int(trajectory.block_starts(torch.tensor([step]))) + 4
            state = trajectory.states(torch.tensor([step]), MASK)[0]
            assert torch.equal(shown[index, :entered], state[:entered])
            assert torch.equal(shown[index, entered:], hints[index, entered:])
    without = run(model, prompts, decoding, seeds)
    assert not same(got[0], without[0]) and same(got[2], without[2])


def test_on_step_counts_those_still_going(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """It is called once a step, and the counts fall to zero as sequences stop."""
    model = eager_to_stop(small_llada())
    going: list[int] = []
    found = run(model, make_prompts(5) * 8, Decoding(12, 4, temperature=0.9), torch.arange(8), on_step=going.append)
    lengths = [trajectory.num_steps for trajectory in found]
    assert len(set(lengths)) > 1
    assert going == [sum(length > step + 1 for length in lengths) for step in range(max(lengths))]


class Waits(TorchDispatchMode):
    """Counts the operations for which a GPU's host waits: those whose result or its size is read there."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else []
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "masked_scatter", "equal")
        self.count += any(x is not None and x.dtype == torch.bool for x in indices)
        return func(*args, **(kwargs or {}))


def unwatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, out of sight of dispatch modes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def run_unread(
    model: Any, prompts: list[Tensor], decoding: Decoding, seeds: Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Trajectory], int, list[int]]:
    """Decode where reading is not free; also how often it was waited, and what ``on_step`` was told."""
    monkeypatch.setattr(sampler, "reading_is_free", lambda device: False)
    # On a GPU the first is kernels that wait for nothing, and the second is made of what has been brought to the host.
    monkeypatch.setattr(confidence, "fused_confidence", unwatched(fused_confidence))
    monkeypatch.setattr(sampler, "Trajectory", unwatched(Trajectory))
    going: list[int] = []
    with Waits() as waits:
        found = run(model, prompts, decoding, seeds, on_step=going.append)
    return found, waits.count, going


def test_waits_are_counted() -> None:
    """The instrument works."""
    x = torch.arange(3)
    with Waits() as waits:
        int(x.sum())
        x[x > 1]
        x[x > 1] = 0
        (x > 1).nonzero()
    assert waits.count == 4


@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "random"])
def test_a_gpu_is_waited_for_once_a_block(
    small_llada: Callable[..., LLaDAModelLM], monkeypatch: pytest.MonkeyPatch, remasking: Any
) -> None:
    """Where reading is not free, sequences that have stopped wait for the others of their block, and change nothing."""
    model = eager_to_stop(small_llada())
    decoding, prompts = Decoding(12, 4, temperature=0.9, remasking=remasking), make_prompts(5, 7) * 4
    expected = run(model, prompts, decoding, torch.arange(8))
    assert len({trajectory.num_steps for trajectory in expected}) > 1
    found, waits, going = run_unread(model, prompts, decoding, torch.arange(8), monkeypatch)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert waits == len(going) // 2  # two steps a block


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_only_masked_positions_of_the_block_meet_the_head(
    small_llada: Callable[..., LLaDAModelLM], temperature: float
) -> None:
    """A whole decoding makes logits for the masked positions of the current blocks only, in one product a step."""
    vocab, width = 1009, 32
    model = eager_to_stop(small_llada(vocab_size=vocab, mask_token_id=vocab - 1, dtype=torch.float32))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    rows, products, largest = [], [], [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in weights:
                    largest[0] = max(largest[0], tensor.numel())
                    if any(size and size % vocab == 0 for size in tensor.shape):
                        rows.append(tensor.numel() // vocab)
            if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
                left, right = args[-2:]
                if vocab in (*left.shape, *right.shape):
                    products.append(2 * left.numel() * right.shape[-1] / (2 * width * vocab))
            return out

    prompts = make_prompts(5, 9, 2, 5)
    decoding = Decoding(16, 8, 8, temperature=temperature)
    with Watch():
        found = decode(model, prompts, decoding, mask_id=vocab - 1, eos_id=EOS, seeds=torch.arange(4))
    expected = []
    for step in range(max(trajectory.num_steps for trajectory in found)):
        masked = 0
        for trajectory in found:
            if step < trajectory.num_steps:
                start = int(trajectory.block_starts(torch.tensor([step])))
                masked += int((trajectory.reveal_step[start : start + 8] >= step).sum())
        expected.append(masked)
    assert products == expected
    assert max(rows) == max(expected) == 4 * 8
    # Noise comes in fours of columns, hence 1012.
    assert largest[0] <= max(expected) * 1012


def test_mix_seeds_is_splitmix64() -> None:
    """The hash equals its definition on 64-bit words, for numbers of either sign, broadcast."""
    cases = [(0,), (1,), (-1,), (2, 3), (-(1 << 63), (1 << 63) - 1), (5, 0, 0), (5, 0), (1 << 62, -7, 12345, 6)]
    for values in cases:
        assert int(mix_seeds(*values)) == splitmix(*values)
    # The first output of the published generator from state 0.
    assert int(mix_seeds(0)) & WORD == 0xE220A8397B1DCDAF
    column, row = torch.tensor([[3], [-4]]), torch.tensor([0, 1, 2])
    mixed = mix_seeds(column, 9, row)
    assert mixed.dtype == torch.int64 and mixed.shape == (2, 3)
    assert mixed.tolist() == [[splitmix(a, 9, b) for b in (0, 1, 2)] for a in (3, -4)]
    many = mix_seeds(torch.arange(100)[:, None], torch.arange(100))
    assert len(many.unique()) == 10_000


@pytest.mark.parametrize(("total", "parts"), [(0, 3), (7, 3), (9, 3), (2, 5), (32, 1)])
def test_spread_is_even(total: int, parts: int) -> None:
    """The parts add up, differ by at most one, and the larger come first."""
    shares = spread(total, parts)
    assert len(shares) == parts and sum(shares) == total
    assert max(shares) - min(shares) <= 1 and shares == sorted(shares, reverse=True)


def test_left_pad() -> None:
    """Padding goes in front and the mask marks what is real; without padding there is no mask."""
    ids, mask = left_pad([torch.tensor([1, 2, 3]), torch.tensor([4])], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask is not None and mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    ids, mask = left_pad([torch.tensor([1, 2]), torch.tensor([4, 5])], 9)
    assert ids.tolist() == [[1, 2], [4, 5]] and mask is None


@pytest.mark.parametrize("training", [True, False])
def test_decoding_leaves_the_mode_as_it_was(small_llada: Callable[..., LLaDAModelLM], training: bool) -> None:
    """No dropout and no gradient inside; the model's mode is put back, after an error too."""
    model = small_llada().train(training)
    with inference(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="inside"), inference(model):
        raise RuntimeError("inside")
    run(model, make_prompts(3), Decoding(4, 4), torch.tensor([0]))
    assert all(module.training == training for module in model.modules()) and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gen_length", {"gen_length": 0}),
        ("gen_length", {"gen_length": -8}),
        ("block_length", {"block_length": 0}),
        ("block_length", {"block_length": -4}),
        ("block_length", {"block_length": 3}),
        ("block_length", {"block_length": 16}),
        ("steps", {"steps": 0}),
        ("steps", {"steps": 1}),
        ("steps", {"steps": 9}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": math.nan}),
        ("threshold", {"threshold": 0.0}),
        ("threshold", {"threshold": 1.1}),
        ("threshold", {"threshold": 0.5, "remasking": "margin"}),
        ("threshold", {"threshold": 0.5, "remasking": "leftmost"}),
        ("sub_block_length", {"threshold": 0.5, "sub_block_length": 3}),
        ("sub_block_length", {"threshold": 0.5, "sub_block_length": 0}),
        ("sub_block_length", {"sub_block_length": 2}),
        ("remasking", {"remasking": "confidence"}),
        ("sampling_dtype", {"sampling_dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_bad_values_are_named(name: str, changes: dict[str, Any]) -> None:
    """A value that cannot be used is a UsageError that names the argument."""
    Decoding(8, 4)
    with pytest.raises(UsageError, match=rf"^{name}(=| must be )"):
        Decoding(**{"gen_length": 8, "block_length": 4, **changes})
