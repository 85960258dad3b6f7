"""Block-causal models: against transformers' Qwen2 and Qwen3 under a mask, what does not depend on what, and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dream import close, left_padded
from torch import Tensor
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dopsd.assets.pretrain import character_tokenizer
from dopsd.errors import RunError, UsageError
from dopsd.models import MODELS, check_model, load_model
from dopsd.models.block_causal import BlockCausalModel

VOCAB, WIDTH, MASK, EOS = 37, 24, 36, 0
FAMILIES = ("sdar", "a2d-qwen2", "a2d-qwen3", "Fast_dLLM_Qwen")
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 41,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "initializer_range": 0.3,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}


def small_model(family: str, block_size: int = 4, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model in evaluation mode, with heads wider than the width over their number where there are norms."""
    torch.manual_seed(0)
    kind: Any = MODELS[family]
    fields = {**SIZES, "head_dim": 10 if kind.config_class.qk_norm else None, "mask_token_id": MASK, **changes}
    config = kind.config_class(**fields)
    config.block_size = block_size
    model = kind(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-1, 1)
    return model


def oracle(model: BlockCausalModel) -> Any:
    """transformers' network of the same weights."""
    config = model.config
    names = [*SIZES, "tie_word_embeddings", "rms_norm_eps"]
    sizes = {name: getattr(config, name) for name in names}
    if config.qk_norm:
        plain: Any = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=config.head_dim, attn_implementation="eager"))
    else:
        plain = Qwen2ForCausalLM(Qwen2Config(**sizes, attn_implementation="eager"))
    plain.load_state_dict(model.state_dict())
    return plain.to(model.dtype).eval()


def blocks_of(model: BlockCausalModel, length: int) -> list[int]:
    """The block of each of a sequence's tokens, counted by hand."""
    size = model.block_size or length
    if model.block_origin == "token_0":
        return [position // size for position in range(length)]
    return [-((length - 1 - position) // size) for position in range(length)]


def oracle_states(model: BlockCausalModel, ids: Tensor) -> Tensor:
    """The states (T, d) of one sequence, not shifted."""
    blocks = torch.tensor(blocks_of(model, len(ids)))
    hidden = torch.zeros(1, 1, len(ids), len(ids), dtype=torch.float64).masked_fill(blocks > blocks[:, None], -1e300)
    with torch.no_grad():
        return oracle(model).model(input_ids=ids[None], attention_mask=hidden, use_cache=False).last_hidden_state[0]


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCAB - 1, shape, generator=torch.Generator().manual_seed(seed))


# ---- the network ----


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("block_size", [1, 3, 4, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_qwen_under_a_mask(family: str, block_size: int, implementation: str) -> None:
    """Padded and not, read everywhere and in places, with a head that is tied or not."""
    model = small_model(family, block_size, tie_word_embeddings=block_size == 3)
    model.set_attn_implementation(implementation)
    rows = [random_ids(length, seed=length) for length in (12, 9, 2)]
    expected = [oracle_states(model, row) for row in rows]
    ids, mask = left_padded(rows)
    read = torch.tensor([[11, 0, 5, 5], [3, 4, 11, 7], [11, 10, 10, 11]])
    with torch.no_grad():
        alone = model.states(rows[0][None], None, None)[0]
        padded = model.states(ids, mask, None)
        some = model.hidden_states(ids, mask, read)
        logits = model(ids, mask).logits
        wanted = oracle(model).lm_head(expected[0])
    assert torch.isfinite(padded).all()
    close(alone, expected[0])
    close(logits[0], wanted)
    for index, states in enumerate(expected):
        start = 12 - len(states)
        close(padded[index, start:], states)
        close(some[index], states[(read[index] - start - model.shift).clamp_min(0)])


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_one_are_causal_and_no_blocks_are_full_attention(family: str) -> None:
    """The causal model is transformers' own, without a mask; the one with a single block equals the one with none."""
    ids = random_ids(2, 9)
    causal, full, none = (small_model(family, size) for size in (1, 9, 0))
    with torch.no_grad():
        close(causal.states(ids, None, None), oracle(causal).model(input_ids=ids, use_cache=False).last_hidden_state)
        close(full.states(ids, None, None), none.states(ids, None, None), 1e-12)
        assert not torch.allclose(full.states(ids, None, None), causal.states(ids, None, None))
    assert none.block_size is None and none.lead(5) == 0


@pytest.mark.parametrize("family", ["sdar", "a2d-qwen3"])
def test_what_a_block_computes_depends_on_nothing_behind_it(family: str) -> None:
    """Bit for bit; but a prompt's tail, in the block of the response's first tokens, does depend on these."""
    model, ids = small_model(family), random_ids(1, 14)
    changed = ids.clone()
    changed[0, 10] = ids[0, 10] % 30 + 1
    begin = 8 if family == "sdar" else 10  # blocks of 4 from the first token on, or up to the last
    with torch.no_grad():
        (_, before), (_, after) = (model._states(one, None, None, 14) for one in (ids, changed))
    for layer, (ours, theirs) in enumerate(zip(before, after, strict=True)):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one[:, :, :begin], other[:, :, :begin])
            if layer:
                assert not torch.isclose(one[:, :, begin:], other[:, :, begin:]).all(-1).any()


def test_the_prompt_reaches_into_a_block() -> None:
    """Where blocks are counted from the first token."""
    assert [small_model("sdar").lead(length) for length in range(6)] == [0, 1, 2, 3, 0, 1]
    assert [small_model("a2d-qwen2").lead(length) for length in range(6)] == [0] * 6


# ---- files ----

PUBLISHED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": 41,
    "max_position_embeddings": 32768,
    "max_window_layers": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 25,
}
QWEN3 = {"attention_bias": False, "head_dim": 10, "rope_scaling": None, "sliding_window": None}
FILES: dict[str, dict[str, Any]] = {
    "sdar": {
        "architectures": ["SDARForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
        **QWEN3,
        **{"block_size": 4, "mask_token_id": 1, "debug": False, "ep_size": 1, "fuse_cross_entropy": True},
        **{"micro_forward": False, "skip_checkpoint": False, "use_deepep": False},
    },
    "a2d-qwen2": {"architectures": ["A2DQwen2LMHeadModel"], "tie_word_embeddings": True},
    "a2d-qwen3": {"architectures": ["A2DQwen3LMHeadModel"], **QWEN3, "layer_types": ["full_attention"] * 2},
    "Fast_dLLM_Qwen": {"architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": 32, "tie_word_embeddings": True},
}


def published(folder: Path, family: str, **changes: Any) -> dict[str, Tensor]:
    """A checkpoint with the published fields and names, and transformers' own tensors; returns these."""
    fields = {**PUBLISHED, **FILES[family], "model_type": family, **changes}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: fields[name] for name in (*names, "num_key_value_heads", "tie_word_embeddings")}
    torch.manual_seed(1)
    qwen3 = "head_dim" in fields
    plain: Any = (
        Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=10)) if qwen3 else Qwen2ForCausalLM(Qwen2Config(**sizes))
    )
    plain.bfloat16().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    character_tokenizer().save_pretrained(folder)
    return plain.state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_published_layouts_load(tmp_path: Path, family: str) -> None:
    """Tensors bit for bit, blocks and shift; what is saved says its block size and loads again."""
    tensors = published(tmp_path / "model", family)
    said = {} if not family.startswith("a2d") else {"block_size": 8}
    model, tokenizer = load_model(str(tmp_path / "model"), **said)
    assert type(model) is MODELS[family]
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in tensors.items())
    assert (model.block_size, model.shift) == (
        {"sdar": 4, "Fast_dLLM_Qwen": 32}.get(family, 8),
        family == "Fast_dLLM_Qwen",
    )
    assert model.config.mask_token_id == tokenizer.mask_token_id == 1
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, _ = load_model(str(tmp_path / "again"))
    assert again.block_size == model.block_size and torch.equal(again.lm_head_weight, model.lm_head_weight)


def test_a_tied_checkpoint_may_hold_its_head_too(tmp_path: Path) -> None:
    """As the file of the small A2D coder does."""
    from safetensors.torch import load_file, save_file

    published(tmp_path, "a2d-qwen2")
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_model(str(tmp_path), block_size=8)
    assert model.lm_head_weight is model.get_input_embeddings().weight


def test_the_block_size_is_said_or_asked_for(tmp_path: Path) -> None:
    """A2D files don't say whether attention is block-causal: 0 is the model with full attention."""
    published(tmp_path, "a2d-qwen3")
    with pytest.raises(RunError, match=r"does not say block_size.* or 0 for a model with full attention"):
        load_model(str(tmp_path))
    model, _ = load_model(str(tmp_path), block_size=0)
    assert model.block_size is None
    with pytest.raises(RunError, match=r"block_size=-1 must be at least 0"):
        load_model(str(tmp_path), block_size=-1)
    with pytest.raises(UsageError, match=r"block_size=8 can't be used: llada models have no blocks"):
        load_model("tiny", block_size=8)


@pytest.mark.parametrize(("family", "text"), [("sdar", "<|MASK|>"), ("Fast_dLLM_Qwen", "|<MASK>|")])
def test_a_mask_token_is_found_by_its_published_text(tmp_path: Path, family: str, text: str) -> None:
    """Where neither config.json nor the tokenizer says which token it is."""
    published(tmp_path, family, mask_token_id=None, vocab_size=26)
    tokenizer = character_tokenizer()
    tokenizer.mask_token = None
    tokenizer.add_special_tokens({"additional_special_tokens": [text]})
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    assert tokenizer.mask_token_id is None
    assert model.config.mask_token_id == tokenizer.convert_tokens_to_ids(text) == len(tokenizer) - 1


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("sdar", "attention_bias", True),
        ("sdar", "ep_size", 8),
        ("sdar", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("a2d-qwen2", "use_sliding_window", True),
        ("a2d-qwen3", "layer_types", ["full_attention", "sliding_attention"]),
        ("Fast_dLLM_Qwen", "num_experts", 8),
    ],
)
def test_what_is_not_implemented_is_refused(family: str, field: str, value: Any) -> None:
    """By the name of its field."""
    with pytest.raises(ValueError, match=field):
        MODELS[family].config_class(**{**PUBLISHED, **FILES[family], field: value})


@pytest.mark.parametrize("kind", ["llada2_moe", "llada21_moe", "sdar_moe", "nemotron_labs_diffusion"])
def test_kinds_that_lack_something_say_what(tmp_path: Path, kind: str) -> None:
    """In one sentence, before anything is loaded."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["Whatever"]}))
    with pytest.raises(UsageError, match=rf"{kind} models need what is not there yet: (layers with|YaRN)"):
        check_model(str(tmp_path))


def test_head_widths_that_can_not_be() -> None:
    """Rotary pairs need an even width, and heads share keys evenly."""
    for changes, sentence in (({"head_dim": 7}, "head_dim=7"), ({"num_key_value_heads": 3}, "num_key_value_heads=3")):
        with pytest.raises(ValueError, match=sentence):
            small_model("sdar", **changes)


def test_configs_are_known_to_transformers(tmp_path: Path) -> None:
    """So that adapters and plans find them by their model_type."""
    for family in FAMILIES:
        (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **FILES[family], "model_type": family}))
        assert type(AutoConfig.from_pretrained(tmp_path)) is MODELS[family].config_class
