"""Models of transformers as diffusion models: full attention, the shift, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    EuroBertConfig,
    EuroBertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dopsd import run
from dopsd.assets.pretrain import character_tokenizer
from dopsd.errors import RunError, UsageError
from dopsd.evaluation import command as evaluate
from dopsd.models import add_lora, generic, load_adapter, load_model

SIZES: dict[str, Any] = {
    "vocab_size": 25,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": 0,
}
ENCODER = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied llama": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": True})),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "eurobert": lambda: EuroBertForMaskedLM(EuroBertConfig(**SIZES, mask_token_id=1)),
}
Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Saves a random model with the character tokenizer; returns its folder."""

    def build(make: Callable[[], PreTrainedModel], mask_token: bool = True) -> str:
        torch.manual_seed(0)
        make().save_pretrained(tmp_path / "model")
        tokenizer = character_tokenizer()
        if not mask_token:
            tokenizer.mask_token = None
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return build


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 25, shape, generator=torch.Generator().manual_seed(seed))


def full_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The last hidden states (T, d) of one sequence by transformers' eager attention with a mask that hides nothing."""
    model.set_attn_implementation("eager")
    nothing = torch.zeros(1, 1, len(ids), len(ids), dtype=model.dtype)
    with torch.no_grad():
        return model.model(input_ids=ids[None], attention_mask=nothing, use_cache=False).last_hidden_state[0]


def close(got: Tensor, expected: Tensor) -> None:
    """Equal up to fp32 rounding of a few layers."""
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= 2e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_states_are_those_with_full_attention(save: Save, name: str, implementation: str, shift: bool) -> None:
    """States equal the plain model's under an all-zero 4-D mask, padded and unpadded, wherever they are read."""
    folder = save(MODELS[name])
    torch.manual_seed(0)
    plain = MODELS[name]().eval()
    model, tokenizer = load_model(folder, attn_implementation=implementation, shift_logits=shift)
    assert isinstance(model, type(plain)) and type(model).__name__ == type(plain).__name__
    assert model.config.mask_token_id == tokenizer.mask_token_id == 1
    rows = [random_ids(length, seed=length) for length in (12, 7, 3)]
    ids = random_ids(3, 12, seed=9)
    for index, row in enumerate(rows):
        ids[index, 12 - len(row) :] = row
    mask = torch.arange(12) >= 12 - torch.tensor([len(row) for row in rows])[:, None]
    read = torch.tensor([[11, 0, 5], [6, 5, 11], [9, 11, 10]])
    with torch.no_grad():
        whole, some = model.hidden_states(ids, mask), model.hidden_states(ids, mask, read)
        alone = model.hidden_states(ids[:1])[0]
    for index, row in enumerate(rows):
        expected = full_states(plain, row)
        if shift:
            expected = torch.cat([expected[:1], expected[:-1]])
        close(whole[index, 12 - len(row) :], expected)
        close(some[index], expected[read[index] - 12 + len(row)])
        if index == 0:
            close(alone, expected)
    assert torch.equal(model.lm_head_weight, plain.get_output_embeddings().weight)


@pytest.mark.parametrize("name", MODELS)
def test_a_later_token_changes_an_earlier_state(save: Save, name: str) -> None:
    """Every state depends on the last token; that of the plain decoder does not."""
    model, _ = load_model(save(MODELS[name]))
    ids = random_ids(2, 9)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 25
    with torch.no_grad():
        assert float((model.hidden_states(ids) - model.hidden_states(changed)).abs().amax(-1).min()) > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_fits_the_plain_model(save: Save, tmp_path: Path, name: str) -> None:
    """All linear layers of the body, or the preset's, are adapted; the file has the plain model's names."""
    folder = save(MODELS[name])
    model, _ = load_model(folder)
    seven = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert sorted(model.lora_modules) == sorted(seven)
    student = add_lora(model, None, 2, 4, 0.0)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    adapted = [n for n, p in student.named_parameters() if p.requires_grad]
    assert len(adapted) == 2 * 2 * 7 and not any("lm_head" in n for n in adapted)
    student.save_pretrained(str(tmp_path / "adapter"))
    ids = random_ids(1, 8)
    with torch.no_grad():
        expected = model.hidden_states(ids)
        again, _ = load_model(folder)
        assert not torch.allclose(again.hidden_states(ids), expected)
        load_adapter(again, str(tmp_path / "adapter"), trainable=False)
        assert torch.equal(again.eval().hidden_states(ids), expected)
    preset, _ = load_model(folder)
    chosen = add_lora(preset, ["reference"], 2, 4, 0.0)
    assert sum(p.requires_grad for p in chosen.parameters()) == 2 * 2 * 4
    with pytest.raises(UsageError, match=r"lora_targets='attn_out'.*q_proj.*reference"):
        add_lora(load_model(folder)[0], ["attn_out"], 2, 4, 0.0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: BertForMaskedLM(BertConfig(**ENCODER)), "BertForMaskedLM has an LM head with a bias"),
        (
            lambda: ModernBertForMaskedLM(
                ModernBertConfig(**ENCODER, decoder_bias=False, cls_token_id=0, sep_token_id=0)
            ),
            "ModernBertForMaskedLM does more than one matrix product",
        ),
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0)),
            "Gemma2ForCausalLM does more than one matrix product",
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=25, n_embd=32, n_layer=2, n_head=2, eos_token_id=0)),
            "GPT2LMHeadModel has no LM head apart from a body with linear layers",
        ),
    ],
    ids=["bias", "transform", "cap", "no linear layers"],
)
def test_a_head_that_is_more_than_a_matrix_is_refused(
    save: Save, make: Callable[[], PreTrainedModel], sentence: str
) -> None:
    """What can't be a product of states and one weight is refused in one sentence, not computed wrongly."""
    folder = save(make)
    with pytest.raises(RunError, match=rf"^model='[^\n]*{sentence}[^\n]*$"):
        load_model(folder, attn_implementation="eager")


def test_a_model_without_attention_is_refused(save: Save) -> None:
    """A state-space model can't look ahead, which shows when it is loaded."""
    config = MambaConfig(vocab_size=25, hidden_size=16, state_size=4, num_hidden_layers=1, eos_token_id=0)
    with pytest.raises(RunError, match="a later token does not change an earlier state"):
        load_model(save(lambda: MambaForCausalLM(config)), attn_implementation="eager")


def test_a_model_that_heeds_padding_is_refused(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that do not count from the first real token stand for it here."""
    monkeypatch.setattr(generic, "positions_of", lambda mask: torch.zeros_like(mask, dtype=torch.int64))
    with pytest.raises(RunError, match="padding on the left changes its states"):
        load_model(save(MODELS["llama"]))


def test_the_mask_token_is_named_somewhere(save: Save) -> None:
    """By the option, the checkpoint or its tokenizer; nowhere is an error that names the option."""
    folder = save(MODELS["qwen2"], mask_token=False)
    with pytest.raises(RunError, match=r"no mask token.*--mask_token_id"):
        load_model(folder)
    with pytest.raises(RunError, match="found 25"):
        load_model(folder, mask_token_id=25)
    model, tokenizer = load_model(folder, mask_token_id=7)
    assert tokenizer.mask_token_id is None and model.config.mask_token_id == 7


def test_reuse_is_refused(save: Save, tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    """Their layers give no keys and values to reuse: a sentence that names the option, and no folder."""
    options = [
        "--model",
        save(MODELS["llama"]),
        "--recipe",
        "tiny",
        "--lora_r",
        "4",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    for name, kind in (("reuse", "block"), ("cache", "block")):
        status, _, said = command(run.main, *options, "--train_problems", "4", f"--{name}", kind)
        assert status == 2 and f"{name}='{kind}'" in said and "LlamaForCausalLM" in said
    assert not (tmp_path / "run").exists()
    status, _, said = command(evaluate.main, "--model", options[1], "--eval_problems", "4", "--cache", "block")
    assert status == 2 and "cache='block'" in said


def test_only_transformers_models_take_the_shift(random_model: Path) -> None:
    """LLaDA's and Dream's is their own."""
    with pytest.raises(UsageError, match="shift_logits=True"):
        load_model(str(random_model), shift_logits=True)
