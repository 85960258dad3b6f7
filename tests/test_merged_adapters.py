"""Adapters merged into a copy of the weights while decoding: equal to rounding, and the weights untouched."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dopsd.models import STUDENT, add_lora, merged_adapters
from dopsd.models.llada import LLaDAModelLM
from dopsd.rollout import Decoder
from dopsd.sampler import Decoding, decode

IDS = torch.arange(2 * 11).reshape(2, 11) % 36


def adapted(model: LLaDAModelLM, scale: float, seed: int = 1) -> PeftModel:
    """With an adapter whose B is ``scale`` times the scale of its A."""
    torch.manual_seed(seed)
    student = add_lora(model, None, r=4, alpha=8, dropout=0.5).eval()
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale * model.config.d_model**-0.5)
    return student


@torch.no_grad()
def states(model: LLaDAModelLM, merge: bool, bf16: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), merged_adapters(model) if merge else nullcontext():
        return model.hidden_states(IDS).double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merged_is_unmerged_to_rounding(small_llada: Callable[..., LLaDAModelLM], dtype: torch.dtype) -> None:
    """Sums of at most 48 products through two layers: some tens of roundings each way."""
    model = small_llada(dtype=dtype)
    base = states(model, merge=False)
    adapted(model, 1.0)
    plain, merged = states(model, merge=False), states(model, merge=True)
    bound = 64 * torch.finfo(dtype).eps * float(plain.abs().max())
    assert 0 < float((merged - plain).abs().max()) < bound < 1e-3 * float((plain - base).abs().max())


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1.0])
def test_under_autocast_it_is_no_less_exact(small_llada: Callable[..., LLaDAModelLM], scale: float) -> None:
    """Against fp64, an adapter of any size: at most twice the error of three products, over many weights."""
    errors = []
    for seed in range(8):
        model = small_llada(seed, dtype=torch.float32)
        adapted(model, scale, seed)
        exact = states(model.double(), merge=False)
        model.float()
        errors.append([float((states(model, merge, bf16=True) - exact).square().mean()) for merge in (False, True)])
    plain, merged = torch.tensor(errors).mean(0).sqrt()
    assert 0 < merged < 2 * plain


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_are_put_back(small_llada: Callable[..., LLaDAModelLM], bf16: bool) -> None:
    """Every tensor and its place, also when something is raised inside; a gradient works afterwards."""
    model = small_llada(dtype=torch.float32)
    student = adapted(model, 1.0)
    before = {name: (parameter, parameter.clone()) for name, parameter in student.named_parameters()}
    with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16, enabled=bf16), merged_adapters(model):
        inside = dict(student.named_parameters())
        changed = {name for name in before if inside[name] is not before[name][0]}
        assert changed == {name for name in before if name.endswith("base_layer.weight")}
        assert {inside[name].dtype for name in changed} == {torch.bfloat16 if bf16 else torch.float32}
        raise KeyError
    for name, parameter in student.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    model.hidden_states(IDS).sum().backward()
    assert all(p.grad is not None for name, p in student.named_parameters() if "lora_B" in name)


def test_whose_adapter_is_merged(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """The active one's; and none where adapters are off, or weights have 16 bits, on whose grid a sum may not move."""
    model = small_llada()
    student = adapted(model, 1.0)
    student.add_adapter("teacher", student.peft_config[STUDENT])
    student.set_adapter("teacher")
    teacher = states(model, merge=False)
    torch.testing.assert_close(states(model, merge=True), teacher, rtol=1e-10, atol=1e-10)
    with student.disable_adapter():
        assert torch.equal(states(model, merge=True), states(model, merge=False))
    student.set_adapter(STUDENT)
    assert (states(model, merge=True) - teacher).abs().max() > 1e-3
    model.bfloat16()
    with merged_adapters(model):
        assert not any(layer.merged for layer in model.modules() if hasattr(layer, "merged"))


def test_a_small_adapter_would_be_lost_in_16_bits(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """Why weights of 16 bits are not merged with it, and those of 32 are though products have 16 bits."""
    model = small_llada(dtype=torch.bfloat16)
    scale = 2e-4
    student = adapted(model, scale)
    layers = [layer for layer in student.modules() if hasattr(layer, "get_delta_weight")]
    deltas = [layer.get_delta_weight(STUDENT).detach().float() for layer in layers]
    weights = [layer.get_base_layer().weight.detach().float() for layer in layers]

    def kept(base: list[Tensor]) -> float:
        """The share of the adapters that is in the difference of rounded sums and rounded weights."""
        moved = [(w + d).bfloat16().float() - w.bfloat16().float() for w, d in zip(base, deltas, strict=True)]
        along = sum(float((m * d).sum()) for m, d in zip(moved, deltas, strict=True))
        return along / sum(float(d.square().sum()) for d in deltas)

    generator = torch.Generator().manual_seed(0)
    between = [w * (1 + torch.rand(w.shape, generator=generator) / 128) for w in weights]  # any 32 bits, not the grid's
    assert kept(weights) < 0.5
    assert kept(between) == pytest.approx(1, abs=0.2)


def test_decoding_merges(shipped: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass of decoding runs on merged weights, and training's passes after it do not."""
    student = adapted(shipped.model, 0.1)
    model, merged = shipped.model, []
    layers = [layer for layer in student.modules() if hasattr(layer, "merged")]

    monkeypatch.setattr(model, "on_pass", lambda tokens: merged.append(all(layer.merged for layer in layers)))
    prompt = torch.tensor([3, 4, 5])
    decode(model, [prompt], Decoding(8, 8), mask_id=1, eos_id=0, seeds=torch.zeros(1, dtype=torch.int64))
    assert len(merged) == 4 and all(merged)
    assert not any(layer.merged for layer in layers)
