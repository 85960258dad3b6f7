"""Tokens, confidences and the choice of the most confident positions, against full logits and loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dopsd.confidence import choose_tokens, most_confident
from dopsd_kernels.reference import gumbel_noise

VOCAB, MASK = 23, 5


def head_and_rows(dtype: torch.dtype = torch.float64, rows: int = 11) -> tuple[Tensor, Tensor]:
    """Random hidden states and a head under which the mask token is everywhere the likeliest."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    hidden[:, 0] = 1.0
    weight = torch.randn(VOCAB, 8, generator=generator, dtype=torch.float64)
    weight[MASK] = 0.0
    weight[MASK, 0] = 50.0
    return hidden.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["probability", "logit", "margin", "entropy"])
def test_tokens_and_confidences_equal_full_logits(kind: str, temperature: float) -> None:
    """Each row's token and confidence are those of its logits without the mask token, at temperature 1."""
    hidden, weight = head_and_rows()
    seeds = torch.arange(100, 100 + len(hidden))
    tokens, confidence = choose_tokens(
        hidden, weight, kind, mask_id=MASK, temperature=temperature, seeds=seeds if temperature else None
    )
    assert tokens.dtype == torch.int64 and confidence.dtype == torch.float64
    differing = 0
    for row, logits in enumerate((hidden @ weight.T).tolist()):
        assert max(logits) == logits[MASK]
        allowed = {v: z for v, z in enumerate(logits) if v != MASK}
        total = sum(math.exp(z) for z in allowed.values())
        p = {v: math.exp(z) / total for v, z in allowed.items()}
        best = max(allowed, key=allowed.__getitem__)
        token = best
        if temperature:
            noise = gumbel_noise(seeds[row], torch.arange(VOCAB), torch.float64).tolist()
            token = max(allowed, key=lambda v: allowed[v] / temperature + noise[v])
        differing += token != best
        ranked = sorted(p.values(), reverse=True)
        expected = {
            "probability": p[token],
            "logit": allowed[token],
            "margin": ranked[0] - ranked[1],
            "entropy": sum(q * math.log(q) for q in p.values()),
        }[kind]
        assert int(tokens[row]) == token
        assert float(confidence[row]) == pytest.approx(expected, rel=1e-12, abs=1e-13)
    assert (differing > 0) == (temperature > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confidences_are_fp32_for_narrower_models(dtype: torch.dtype) -> None:
    """Logits of an fp32 or bf16 model are taken in fp32."""
    hidden, weight = head_and_rows(dtype)
    for kind in ("probability", "logit", "margin", "entropy"):
        wide, _ = choose_tokens(hidden.double(), weight.double(), kind, mask_id=MASK)
        exact = choose_tokens(hidden.double(), weight.double(), kind, mask_id=MASK)[1]
        tokens, confidence = choose_tokens(hidden, weight, kind, mask_id=MASK)
        assert confidence.dtype == torch.float32
        assert torch.equal(tokens, wide)
        torch.testing.assert_close(confidence.double(), exact, rtol=1e-5, atol=1e-6)


def test_most_confident_takes_the_largest_candidates() -> None:
    """Against a loop, with random candidates, counts from none to more than there are, and many ties."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        confidence = torch.randint(0, 4, (3, 6), generator=generator).float()
        candidates = torch.rand(3, 6, generator=generator) < 0.6
        count = torch.randint(0, 8, (3,), generator=generator)
        got = most_confident(confidence, candidates, count)
        for row in range(3):
            available = [i for i in range(6) if candidates[row, i]]
            # Python's sort is stable: of equals, the lower position comes first.
            expected = sorted(available, key=lambda i: -float(confidence[row, i]))[: int(count[row])]
            assert got[row].nonzero().flatten().tolist() == sorted(expected)
