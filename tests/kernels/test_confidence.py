"""fused_confidence computes what its docstring says, and its noise is the specified Philox."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd_kernels import fused_confidence, reference
from dopsd_kernels.common.topk import stable_topk
from dopsd_kernels.confidence import chunked, gumbel


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 on Python integers, after Salmon et al. (2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def noise(seed: int, column: int) -> float:
    word = philox([column // 4, 0, 0, 0], [seed % 2**32, (seed >> 32) % 2**32])[column % 4]
    return -math.log(-math.log1p(-(word + 0.5) / 2**32))


KNOWN_ANSWERS = [  # from the Random123 distribution
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    assert philox(counter, key) == words
    out = reference.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [w.item() for w in out] == words


@pytest.mark.parametrize("seed", [0, 1, -1, 0x123456789ABCDEF, -(1 << 63), (1 << 63) - 1])
def test_noise_is_the_specified_function_of_seed_and_column(seed):
    begin, columns = 40, 11
    expected = torch.tensor([noise(seed, begin + c) for c in range(columns)], dtype=torch.float64)
    seeds = torch.tensor([seed, 7])
    words = gumbel.philox(seeds[:, None], torch.arange(begin // 4, (begin + columns + 3) // 4)).flatten(1)[:, :columns]
    fast = gumbel.gumbel_of_word(words.long() & 0xFFFFFFFF, torch.float64)
    specified = reference.gumbel_noise(seeds[:, None], torch.arange(begin, begin + columns), torch.float64)
    torch.testing.assert_close(fast[0], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(specified[0], expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(fast[0], fast[1])
    single = gumbel.gumbel_of_word(words.long() & 0xFFFFFFFF, torch.float32)
    torch.testing.assert_close(single[0].double(), expected, rtol=1e-5, atol=1e-5)
    column = torch.arange(begin, begin + columns)
    assert torch.equal(gumbel.column_words(torch.full_like(column, seed), column), words[0])


@pytest.mark.parametrize("module", [reference, gumbel])
def test_noise_is_finite_for_every_word(module):
    # The largest words round to u = 1 in fp32 if nothing is done about it.
    words = torch.tensor([0, 1, 2**32 - 2, 2**32 - 1])
    for dtype, lowest in (
        (torch.float32, -math.log(24 * math.log(2))),
        (torch.float64, -math.log(33 * math.log(2))),
    ):
        noise = module.gumbel_of_word(words, dtype)
        assert noise[0].item() == pytest.approx(33 * math.log(2), rel=1e-6)
        assert noise[-1].item() == pytest.approx(lowest, rel=1e-6)


def test_words_bound_their_noise():
    edges = torch.tensor([0, 1, 2, 3, 255, 256, (1 << 24) + 1, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, (1 << 32) - 1])
    words = torch.cat([edges, torch.randint(1 << 32, (100_000,), generator=torch.Generator().manual_seed(0))])
    words = torch.cat([words, words >> 10, words >> 20])[None]
    exact = reference.gumbel_of_word(words, torch.float64)
    for dtype in (torch.float32, torch.float64):
        bound = gumbel._bound(words.to(torch.int32), torch.zeros(words.shape, dtype=dtype)).double()
        assert (bound >= exact - gumbel._MARGIN * 128).all()
        # log2 is at most 0.0861 above the line; and -log(u) is near the noise where it is large.
        small = (words > 255) & (words < 1 << 22)
        assert (bound - exact)[small].max() < 0.0862 * math.log(2) + 0.003 + gumbel._MARGIN * 128


def naive(hidden: Tensor, weight: Tensor, bias: Tensor, temperature: float, seeds: list[int], top_k: int, exclude):
    rows = []
    for h, seed in zip(hidden, seeds, strict=True):
        z = {v: (weight[v] @ h + bias[v]).item() for v in range(len(weight)) if v not in exclude}
        order = sorted(z, key=lambda v: (-z[v], v))
        token = order[0]
        if temperature:
            token = max(z, key=lambda v: z[v] / temperature + noise(seed, v))
        total = math.log(sum(math.exp(x) for x in z.values()))
        top = order[:top_k]
        entropy = sum(math.exp(x - total) * (total - x) for x in z.values())
        rows.append((token, z[token], total, z[order[0]], order[0], [z[v] for v in top], top, entropy))
    ids = (0, 4, 6)
    columns = enumerate(zip(*rows, strict=True))
    return [torch.tensor(x, dtype=torch.int64 if i in ids else torch.float64) for i, x in columns]


@pytest.mark.parametrize(("tile_logits", "small"), [(1, 0), (60, 0), (1 << 22, 0), (1 << 22, 1 << 15)])
@pytest.mark.parametrize("chunk_rows", [2, 1024])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("exclude", [(), (0, 13, 13)])
def test_matches_the_definition_whatever_the_tiles(monkeypatch, tile_logits, small, chunk_rows, temperature, exclude):
    monkeypatch.setattr(chunked, "_TILE_LOGITS", tile_logits)
    monkeypatch.setattr(chunked, "_SMALL", small)
    monkeypatch.setattr(chunked, "_CHUNK_ROWS", chunk_rows)
    hidden, weight, bias = randn(5, 3), randn(14, 3, seed=1), randn(14, seed=2)
    seeds = [3, -5, 2**40, 0, 9]
    for top_k in (0, 1, 6, 12):
        out = fused_confidence(
            hidden,
            weight,
            bias=bias,
            temperature=temperature,
            seed=torch.tensor(seeds),
            top_k=top_k,
            exclude=exclude,
            entropy=True,
        )
        expected = naive(hidden, weight, bias, temperature, seeds, top_k, exclude)
        for a, b in zip(out, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 6), st.sampled_from([1, 2, 5, 31, 64]), st.integers(0, 5), st.booleans(),
    st.sampled_from([0.0, 0.5]), st.integers(0, 2),
)  # fmt: skip
def test_matches_the_reference_with_ties(n, vocab, top_k, excluding, temperature, digits):
    # Small integers times a power of two: exact products, and many equal logits.
    hidden = (randn(n, 2) * 2**digits).round() / 2**digits
    weight = (randn(vocab, 2, seed=1) * 2**digits).round() / 2**digits
    exclude = (vocab // 2,) if excluding and vocab > 1 else ()
    top_k = min(top_k, vocab - len(exclude))
    seed = torch.arange(n) + 5
    arguments = dict(temperature=temperature, seed=seed, top_k=top_k, exclude=exclude, entropy=n % 2 == 0)
    with pytest.MonkeyPatch.context() as patch:
        for tile_logits in (8, 1 << 22):
            patch.setattr(chunked, "_TILE_LOGITS", tile_logits)
            ours, theirs = (
                fused_confidence(hidden, weight, **arguments),
                reference.confidence(hidden, weight, **arguments),
            )
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile_logits", [4, 1 << 22])
def test_entropies_of_certain_uniform_and_impossible_rows(monkeypatch, tile_logits):
    monkeypatch.setattr(chunked, "_TILE_LOGITS", tile_logits)
    weight, bias = torch.eye(8), torch.zeros(8)
    bias[:4] = -math.inf  # a tile of its own, without mass
    hidden = torch.zeros(4, 8)
    hidden[1, 5] = 200.0
    hidden[2, 6] = math.nan
    out = fused_confidence(hidden, weight, bias=bias, entropy=True)
    torch.testing.assert_close(out.entropy[[0, 3]], torch.full((2,), math.log(4)), rtol=4 * 2**-24, atol=0)
    assert out.entropy[1] == 0 and out.entropy[2].isnan()
    assert fused_confidence(hidden, weight, bias=bias).entropy.shape == (4, 0)
    assert fused_confidence(hidden[None, :0], weight, entropy=True).entropy.shape == (1, 0)


def test_ties_go_to_the_lowest_id_across_tiles(monkeypatch):
    monkeypatch.setattr(chunked, "_TILE_LOGITS", 4)
    weight = torch.tensor([0.0, 2, 1, 2, 0, 2, 1, 2, 1, 0, 2])[:, None]
    out = fused_confidence(torch.ones(1, 1), weight, top_k=7)
    assert out.argmax.item() == out.token.item() == 1
    assert out.top_indices.tolist() == [[1, 3, 5, 7, 10, 2, 6]]


def test_stable_topk_against_a_stable_sort():
    values = randn(50, 37).mul(2).round()
    values[3, 5:20] = -math.inf
    for k in (1, 2, 9, 37):
        top, columns = stable_topk(values, k)
        expected = values.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(top, expected.values[:, :k])
        assert torch.equal(columns, expected.indices[:, :k])


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_samples_follow_the_softmax(temperature):
    rows, vocab = 20_000, 6
    logits = randn(vocab, seed=3, dtype=torch.float32)
    out = fused_confidence(torch.ones(rows, 1), logits[:, None], temperature=temperature, seed=11, exclude=(4,))
    counts = out.token.bincount(minlength=vocab).double()
    assert counts[4] == 0
    logits[4] = -math.inf
    expected = (logits.double() / temperature).softmax(-1) * rows
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < 23.5  # 4 degrees of freedom: exceeded by chance once in 10,000 seeds
    # The same counts are far from the distribution of another temperature, so the bound can fail.
    other = logits.double().softmax(-1) * rows
    assert ((counts - other)[kept] ** 2 / other[kept]).sum() > 100


def test_a_sample_does_not_depend_on_the_batch(monkeypatch):
    hidden, weight = randn(40, 4), randn(50, 4, seed=1)
    seeds = torch.arange(40) * 1000
    together = fused_confidence(hidden, weight, temperature=1.0, seed=seeds).token
    assert together.unique().numel() > 5
    alone = torch.cat(
        [fused_confidence(hidden[[i]], weight, temperature=1.0, seed=seeds[[i]]).token for i in range(40)]
    )
    assert torch.equal(together, alone)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    again = fused_confidence(hidden[shuffled], weight, temperature=1.0, seed=seeds[shuffled]).token
    assert torch.equal(together[shuffled], again)
    for tile_logits, chunk_rows in ((1, 3), (300, 16)):
        monkeypatch.setattr(chunked, "_TILE_LOGITS", tile_logits)
        monkeypatch.setattr(chunked, "_CHUNK_ROWS", chunk_rows)
        assert torch.equal(together, fused_confidence(hidden, weight, temperature=1.0, seed=seeds).token)


def exact_logits(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden and weight whose logits are z (R, V), without rounding."""
    return torch.eye(z.shape[0], dtype=z.dtype), z.T.contiguous()


def sampled_with_all_noise(z: Tensor, seeds: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the tokens that all noise gives, and the noise."""
    noise = reference.gumbel_noise(seeds[:, None], torch.arange(z.shape[1]), z.dtype)
    return noise.add(z, alpha=1 / temperature).argmax(-1), noise


def rows_like(kind: str, rows: int, vocab: int, dtype: torch.dtype) -> Tensor:  # (rows, vocab)
    z = randn(rows, vocab, seed=4)
    if kind == "peaked":  # as in a vocabulary sorted by frequency, with a leader anywhere
        z = 2 * z - 3 * torch.arange(1, vocab + 1).log()
        z[torch.arange(rows), torch.arange(rows) * 7919 % vocab] = 15
    elif kind == "ties":
        z = z.round()
    elif kind == "extreme":
        z = 1e4 * z
    return z.to(dtype)


@pytest.mark.parametrize("kind", ["flat", "peaked", "ties", "extreme"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_are_those_of_all_the_noise(monkeypatch, kind, dtype):
    z = rows_like(kind, 40, 1003, dtype)
    seeds = torch.arange(40) * 2**34 - 11
    hidden, weight = exact_logits(z)
    for tile_logits, counters, many in ((1 << 20, 1 << 16, 0.15), (40 * 128, 100, 1.0), (40 * 256, 100, -1.0)):
        monkeypatch.setattr(chunked, "_TILE_LOGITS", tile_logits)
        monkeypatch.setattr(gumbel, "_COUNTERS", counters)
        monkeypatch.setattr(gumbel, "_MANY", many)  # 1: never the words of all counters; -1: always
        for temperature in (1.0, 0.7, 5.0):
            out = fused_confidence(hidden, weight, temperature=temperature, seed=seeds)
            token, _ = sampled_with_all_noise(z, seeds, temperature)
            assert torch.equal(out.token, token)
            assert torch.equal(out.logit, z.gather(1, token[:, None])[:, 0])


def test_only_noise_that_may_win_is_computed(monkeypatch):
    computed = []
    philox = gumbel.philox

    def counted(seed, counter):
        words = philox(seed, counter)
        computed.append(words.numel() // 4)
        return words

    monkeypatch.setattr(gumbel, "philox", counted)
    rows, vocab = 40, 8192
    for kind, least, most in (("peaked", 0.0, 0.2), ("flat", 1.0, 1.1)):
        computed.clear()
        fused_confidence(*exact_logits(rows_like(kind, rows, vocab, torch.float32)), temperature=1.0, seed=3)
        assert least <= sum(computed) / (rows * vocab / 4) <= most


# Of 1.2 billion pairs of a seed and a column, the one of the smallest word, 7.
RARE_SEED, RARE_COLUMN, RARE_NOISE = 133495, 2072, 20.165807


@pytest.mark.parametrize("tile_logits", [1 << 20, 1 << 10])
def test_a_column_far_below_wins_by_its_noise(monkeypatch, tile_logits):
    monkeypatch.setattr(chunked, "_TILE_LOGITS", tile_logits)
    monkeypatch.setattr(chunked, "_SMALL", 0)
    assert noise(RARE_SEED, RARE_COLUMN) == pytest.approx(RARE_NOISE, abs=1e-4) and RARE_NOISE > 17
    z = torch.full((1, 4096), -60.0)
    z[0, 5], z[0, RARE_COLUMN] = 0.0, 0.0
    seeds = torch.tensor([RARE_SEED])
    lead = sampled_with_all_noise(z, seeds, 1.0)[1][0, 5] - RARE_NOISE
    for margin, token in ((0.01, RARE_COLUMN), (-0.01, 5)):
        z[0, RARE_COLUMN] = lead + margin
        assert fused_confidence(*exact_logits(z), temperature=1.0, seed=seeds).token.item() == token


@pytest.mark.parametrize(("tile_logits", "small"), [(4, 0), (1 << 20, 0), (1 << 20, 1 << 20)])
def test_infinite_scores_and_nan(monkeypatch, tile_logits, small):
    monkeypatch.setattr(chunked, "_TILE_LOGITS", tile_logits)
    monkeypatch.setattr(chunked, "_SMALL", small)
    weight, seeds = torch.tensor([1.0, 3, 2, 3, 0, 1, 4, 4, 2, 5])[:, None], torch.arange(3)
    hidden = torch.tensor([[4.0], [-4.0], [0.0]])
    # Scores beyond fp32 are equal, and the lowest id wins.
    scores = weight.T * hidden / 1e-38 + reference.gumbel_noise(seeds[:, None], torch.arange(10), torch.float32)
    out = fused_confidence(hidden, weight, temperature=1e-38, seed=seeds)
    assert scores.isinf().sum() > 12 and torch.equal(out.token, scores.argmax(-1))
    nothing = fused_confidence(hidden, weight, bias=torch.full((10,), -math.inf), temperature=1.0, seed=seeds)
    assert not nothing.token.any() and (nothing.logit == -math.inf).all()
    for column in (0, 5, 9):
        broken = weight.clone()
        broken[column:] = math.nan
        out = fused_confidence(hidden, broken, temperature=1.0, seed=seeds)
        assert (out.token == column).all() and (out.argmax == column).all()
        assert out.logit.isnan().all() and out.max_logit.isnan().all()


def test_one_seed_gives_every_row_its_own():
    hidden, weight = torch.ones(30, 1).double(), torch.zeros(9, 1).double()
    tokens = fused_confidence(hidden, weight, temperature=1.0, seed=-4).token
    assert torch.equal(tokens, fused_confidence(hidden, weight, temperature=1.0, seed=torch.arange(30) - 4).token)
    assert tokens.unique().numel() == 9
    greedy = fused_confidence(hidden, weight, seed=-4)
    assert not greedy.token.any()


def test_leading_dimensions_and_no_gradient():
    hidden, weight = randn(2, 3, 4).requires_grad_(), randn(7, 4, seed=1).requires_grad_()
    seed = torch.arange(6).reshape(2, 3)
    out = fused_confidence(hidden, weight, temperature=1.0, seed=seed, top_k=2, entropy=True)
    flat = fused_confidence(hidden.flatten(0, 1), weight, temperature=1.0, seed=seed.flatten(), top_k=2, entropy=True)
    for name, a, b in zip(out._fields, out, flat, strict=True):
        assert a.shape == ((2, 3, 2) if name.startswith("top_") else (2, 3))
        assert torch.equal(a.reshape(b.shape), b)
        assert not a.requires_grad
    single = fused_confidence(hidden[0, 0], weight, top_k=2)
    assert single.token.shape == () and single.top_values.shape == (2,)
    empty = fused_confidence(hidden[:0], weight, temperature=1.0, seed=seed[:0], top_k=2)
    assert empty.token.shape == (0, 3) and empty.top_values.shape == (0, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_inputs_give_fp32_logits(dtype):
    hidden, weight = randn(6, 64, dtype=dtype), randn(101, 64, seed=1, dtype=dtype)
    exact = (hidden.double() @ weight.double().T).logsumexp(-1)
    for precision, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        with torch.autocast("cpu", torch.bfloat16):
            out = fused_confidence(hidden.to(precision), weight)
        assert out.logit.dtype == precision
        torch.testing.assert_close(out.logsumexp.double(), exact, rtol=tolerance, atol=0)
    plain = (hidden @ weight.T).double().logsumexp(-1)
    ours = fused_confidence(hidden, weight).logsumexp
    assert ours.dtype == torch.float32
    rounding = torch.finfo(torch.float32).eps * 8
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + rounding * exact.abs().max()


def test_a_tile_without_any_possible_id(monkeypatch):
    monkeypatch.setattr(chunked, "_TILE_LOGITS", 4)
    hidden, weight = randn(3, 2), randn(12, 2, seed=1)
    for impossible in (range(4), range(4, 8), range(8, 12)):
        bias = torch.zeros(12).double()
        bias[list(impossible)] = -math.inf
        possible = [v for v in range(12) if v not in impossible]
        for out in (
            fused_confidence(hidden, weight, exclude=impossible, top_k=2),
            fused_confidence(hidden, weight, bias=bias, top_k=2),
        ):
            z = hidden @ weight[possible].T
            torch.testing.assert_close(out.logsumexp, z.logsumexp(-1))
            assert out.token.tolist() == [possible[i] for i in z.argmax(-1)]


def test_extreme_logits():
    bias = torch.zeros(5)
    bias[0] = -math.inf
    out = fused_confidence(torch.tensor([[1e4], [-1e4]]), torch.tensor([9.0, 1, 2, 2, 0])[:, None], bias=bias)
    assert out.token.tolist() == [2, 4]
    torch.testing.assert_close(out.logsumexp, torch.tensor([2e4 + math.log(2), 0.0]))
    assert torch.equal(out.logit, out.max_logit)
