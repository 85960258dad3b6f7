"""The LLaDA model against a plain forward pass, its reading of single positions, and its files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_published_configs import LLADA
from torch import Tensor
from transformers import AttentionInterface

from dopsd.assets.pretrain import character_tokenizer
from dopsd.errors import RunError, UsageError
from dopsd.models import load_model
from dopsd.models.bidirectional import rotary_tables
from dopsd.models.llada import LLaDAConfig, LLaDAModelLM
from dopsd.models.parts import RMSNorm

SHAPES = [
    {},
    {"n_kv_heads": 2},
    {"n_kv_heads": 1, "weight_tying": True},
    {"weight_tying": True},
]


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight."""
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_forward(model: LLaDAModelLM, ids: Tensor) -> Tensor:
    """Hidden states (T, d) of one unpadded sequence from the model's tensors alone, one head at a time."""
    config, tensors = model.config, {name: value.detach() for name, value in model.state_dict().items()}
    heads, kv_heads = config.n_heads, config.n_kv_heads
    width = config.d_model // heads
    cos, sin = (table.to(torch.float64) for table in rotary_tables(torch.arange(len(ids)), width, config.rope_theta))

    def rope(x: Tensor) -> Tensor:
        """Pairs (i, i + width / 2) turned by the position's angle."""
        out = torch.empty_like(x)
        for i in range(width // 2):
            a, b = x[:, i], x[:, i + width // 2]
            out[:, i] = a * cos[:, i] - b * sin[:, i]
            out[:, i + width // 2] = b * cos[:, i] + a * sin[:, i]
        return out

    x = tensors["model.transformer.wte.weight"][ids]
    for layer in range(config.n_layers):

        def weight(name: str, layer: int = layer) -> Tensor:
            return tensors[f"model.transformer.blocks.{layer}.{name}.weight"]

        normed = plain_norm(x, weight("attn_norm"), config.rms_norm_eps)
        q, k, v = (torch.einsum("td,od->to", normed, weight(name)) for name in ("q_proj", "k_proj", "v_proj"))
        mixed = []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            own, kv = slice(head * width, (head + 1) * width), slice(shared * width, (shared + 1) * width)
            scores = torch.einsum("id,jd->ij", rope(q[:, own]), rope(k[:, kv])) / math.sqrt(width)
            mixed.append(torch.einsum("ij,jd->id", scores.softmax(-1), v[:, kv]))
        x = x + torch.einsum("td,od->to", torch.cat(mixed, -1), weight("attn_out"))
        normed = plain_norm(x, weight("ff_norm"), config.rms_norm_eps)
        gate = torch.einsum("td,od->to", normed, weight("ff_proj"))
        gated = gate * torch.sigmoid(gate) * torch.einsum("td,od->to", normed, weight("up_proj"))
        x = x + torch.einsum("td,od->to", gated, weight("ff_out"))
    return plain_norm(x, tensors["model.transformer.ln_f.weight"], config.rms_norm_eps)


def random_norms(model: LLaDAModelLM) -> LLaDAModelLM:
    """Norm weights other than one, so that leaving them out would show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_f" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def close(got: Tensor, expected: Tensor) -> None:
    """Equal up to fp64 rounding."""
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= 1e-12 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_hidden_states_equal_a_plain_forward_pass(
    small_llada: Callable[..., LLaDAModelLM], changes: dict[str, Any], grad: bool, implementation: str
) -> None:
    """Hidden states and logits are those of LLaDA written out head by head; every attention path."""
    model = random_norms(small_llada(**changes))
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    ids = torch.randint(0, 37, (2, 13), generator=torch.Generator().manual_seed(1))
    expected = torch.stack([plain_forward(model, row) for row in ids])
    with torch.set_grad_enabled(grad):
        close(model.hidden_states(ids).detach(), expected)
        head = "wte" if changes.get("weight_tying") else "ff_out"
        weight = model.state_dict()[f"model.transformer.{head}.weight"]
        close(model(ids).logits.detach(), torch.einsum("btd,vd->btv", expected, weight))


def test_rotary_angles_are_fp32_accurate() -> None:
    """cos and sin of position * theta^(-2 i / D), the same pair of angles in both halves, up to fp32 rounding."""
    theta, width, positions = 500000.0, 16, [0, 1, 2, 77, 4095]
    cos, sin = rotary_tables(torch.tensor([positions]), width, theta)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (1, 5, width)
    for row, position in enumerate(positions):
        for i in range(width):
            angle = position * theta ** (-2 * (i % (width // 2)) / width)
            # The power and the product each round to fp32; the exponent's rounding is scaled by log(theta).
            slack = (2 + math.log(theta)) * 2**-23 * angle + 2**-23
            assert abs(float(cos[0, row, i]) - math.cos(angle)) <= slack
            assert abs(float(sin[0, row, i]) - math.sin(angle)) <= slack


def test_norm_is_taken_in_fp32() -> None:
    """A bf16 norm is computed in fp32 and cast back before the weight, as in the published model."""
    norm = RMSNorm(64, 1e-5).to(torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(5, 64).to(torch.bfloat16)
    wide = x.double()
    unit = (wide / ((wide**2).mean(-1, keepdim=True) + 1e-5).sqrt()).float().to(torch.bfloat16)
    got, expected = norm(x), norm.weight * unit
    assert got.dtype == torch.bfloat16
    # fp32 against fp64 may tip a bf16 rounding here and there, by one place.
    assert float((got != expected).double().mean()) <= 0.01
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_reading_positions_changes_nothing(
    small_llada: Callable[..., LLaDAModelLM], changes: dict[str, Any], padded: bool
) -> None:
    """States and all gradients at the positions that are read are those of the whole sequence; repeats are allowed."""
    model = random_norms(small_llada(**changes))
    ids = torch.randint(0, 37, (3, 14), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(14) >= torch.tensor([0, 3, 5])[:, None] if padded else None
    read = torch.tensor([[13, 6, 6, 9], [7, 8, 13, 5], [12, 5, 11, 13]])
    with torch.no_grad():
        whole = model.hidden_states(ids, mask).gather(1, read[..., None].expand(-1, -1, 32))
        close(model.hidden_states(ids, mask, read), whole)

    pull = torch.randn(3, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gradients = []
    for only in (False, True):
        model.zero_grad()
        if only:
            states = model.hidden_states(ids, mask, read)
        else:
            states = model.hidden_states(ids, mask).gather(1, read[..., None].expand(-1, -1, 32))
        close(states.detach(), whole)
        (states * pull).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * 9 + 2  # two layers, the embedding and the last norm
    for name, gradient in gradients[0].items():
        assert float(gradient.abs().max()) > 0
        close(gradients[1][name], gradient)


@pytest.mark.parametrize("changes", SHAPES[:2], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_left_padding_changes_nothing(
    small_llada: Callable[..., LLaDAModelLM], changes: dict[str, Any], grad: bool
) -> None:
    """Real positions have the states they have without padding, whatever ids lie in it."""
    model = small_llada(**changes)
    model.set_attn_implementation("eager" if grad else "sdpa")
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(0, 37, (length,), generator=generator) for length in (12, 9, 1)]
    mask = torch.arange(12) >= torch.tensor([12 - len(row) for row in rows])[:, None]
    with torch.set_grad_enabled(grad):
        alone = [model.hidden_states(row[None])[0].detach() for row in rows]
        for fill in (0, 36, None):
            ids = torch.randint(0, 37, (3, 12), generator=generator) if fill is None else torch.full((3, 12), fill)
            for index, row in enumerate(rows):
                ids[index, 12 - len(row) :] = row
            states = model.hidden_states(ids, mask).detach()
            for index, row in enumerate(rows):
                close(states[index, 12 - len(row) :], alone[index])


def test_attention_is_bidirectional(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """Changing the last token changes the first position's state."""
    model = small_llada()
    ids = torch.arange(10)[None]
    changed = ids.clone()
    changed[0, -1] = 20
    with torch.no_grad():
        difference = (model.hidden_states(ids) - model.hidden_states(changed)).abs().amax(-1)[0]
    assert float(difference.min()) > 1e-6


def test_gradient_checkpointing_recomputes_and_changes_nothing(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """With checkpointing every layer runs twice and the gradients are the same."""
    ids = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(9) >= torch.tensor([[0], [2]])
    read = torch.tensor([[3, 4], [8, 5]])
    results = []
    for checkpointing in (False, True):
        model = small_llada().train()
        calls: list[int] = []
        for block in model.model.transformer.blocks:
            block.attn_norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.hidden_states(ids, mask, read).pow(3).sum().backward()
        results.append(({n: p.grad for n, p in model.named_parameters()}, len(calls)))
    (plain, few), (recomputed, many) = results
    assert (few, many) == (2, 4)
    for name, gradient in plain.items():
        if gradient is None:
            assert recomputed[name] is None and name == "model.transformer.ff_out.weight"
        else:
            close(recomputed[name], gradient)


def test_eager_attention_in_bf16(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """In bf16 it is at most twice as far from fp64 as the fused kernel is, up to one rounding."""
    exact = small_llada()
    half = {name: small_llada(dtype=torch.bfloat16) for name in ("sdpa", "eager")}
    exact.load_state_dict(half["sdpa"].state_dict())
    ids = torch.arange(30)[None]
    errors = {}
    with torch.no_grad():
        for name, model in half.items():
            model.set_attn_implementation(name)
            errors[name] = float((model.hidden_states(ids).double() - exact.hidden_states(ids)).norm())
        size = float(exact.hidden_states(ids).norm())
    assert errors["eager"] <= 2 * errors["sdpa"] + 2**-8 * size


@pytest.mark.parametrize("padded", [False, True])
def test_other_attention_goes_through_transformers(
    small_llada: Callable[..., LLaDAModelLM], monkeypatch: pytest.MonkeyPatch, padded: bool
) -> None:
    """Flash attention is called as transformers calls it: not causal, key heads not repeated, a (B, T) padding mask.

    With padding, the last layer of a read, whose queries are no suffix of the keys, does not call it.
    """
    calls: list[tuple[int, int]] = []

    def stand_in(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, is_causal: bool
    ) -> tuple[Tensor, None]:
        assert not is_causal and (query.shape[1], key.shape[1]) == (4, 2) and query.shape[-1] == 8
        assert (None if mask is None else tuple(mask.shape)) == ((2, 10) if padded else None)
        calls.append((query.shape[2], key.shape[2]))
        hidden = None if mask is None else mask[:, None, None]
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=hidden, scale=scaling, enable_gqa=True
        )
        return mixed.transpose(1, 2), None

    model = small_llada(n_kv_heads=2)
    ids = torch.randint(0, 37, (2, 10), generator=torch.Generator().manual_seed(7))
    mask = torch.arange(10) >= torch.tensor([[0], [4]]) if padded else None
    read = torch.tensor([[9, 4, 5], [7, 4, 8]])
    with torch.no_grad():
        expected = model.hidden_states(ids, mask, read)
        monkeypatch.setitem(AttentionInterface._global_mapping, "stand_in", stand_in)
        model.config._attn_implementation = "stand_in"
        close(model.hidden_states(ids, mask, read), expected)
    assert calls == ([(10, 10)] if padded else [(10, 10), (3, 10)])


# ---- names and files ----

LAYER = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")


def published_names(layers: int, tied: bool) -> set[str]:
    """Tensor names of a LLaDA checkpoint."""
    top = {"model.transformer.wte.weight", "model.transformer.ln_f.weight"}
    if not tied:
        top.add("model.transformer.ff_out.weight")
    return top | {f"model.transformer.blocks.{n}.{name}.weight" for n in range(layers) for name in LAYER}


def save(model: LLaDAModelLM, folder: Path, **options: Any) -> None:
    """The model with the character tokenizer, whose 25 tokens it must have."""
    model.save_pretrained(folder, **options)
    character_tokenizer().save_pretrained(folder)


SMALL = {"vocab_size": 25, "mask_token_id": 1}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_saved_tensors_have_the_published_names(
    small_llada: Callable[..., LLaDAModelLM], tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    """The state dict and the file have exactly LLaDA's names, and what is loaded has the same bits."""
    model = small_llada(**SMALL, weight_tying=tied, dtype=dtype)
    assert set(model.state_dict()) == published_names(2, tied)
    save(model, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == published_names(2, tied)
    loaded, tokenizer = load_model(str(tmp_path))
    assert not loaded.training and len(tokenizer) == 25
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], value), name
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_sharded_files_load(small_llada: Callable[..., LLaDAModelLM], tmp_path: Path) -> None:
    """A checkpoint in several files with an index loads to the same bits, in the dtype that is asked for."""
    model = small_llada(**SMALL, dtype=torch.float32)
    save(model, tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == published_names(2, False) and len(set(index["weight_map"].values())) > 2
    loaded, _ = load_model(str(tmp_path))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    half, _ = load_model(str(tmp_path), dtype="bfloat16")
    for name, value in half.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].to(torch.bfloat16))


# The published config.json of LLaDA-8B-Instruct, but for its sizes.
PUBLISHED = {
    **LLADA,
    **{"d_model": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "mlp_hidden_size": 48, "max_sequence_length": 64},
    **{"vocab_size": 25, "embedding_size": 28, "eos_token_id": 0, "pad_token_id": 0, "mask_token_id": 1},
}


def published_folder(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Write a checkpoint as its authors would, without this project's model; returns its tensors."""
    generator = torch.Generator().manual_seed(6)
    d, hidden = config["d_model"], config["mlp_hidden_size"]
    kv = d // config["n_heads"] * (config["n_kv_heads"] or config["n_heads"])
    rows = config["embedding_size"] or config["vocab_size"]
    shapes = {
        "attn_norm": (d,),
        "q_proj": (d, d),
        "k_proj": (kv, d),
        "v_proj": (kv, d),
        "attn_out": (d, d),
        "ff_norm": (d,),
        "ff_proj": (hidden, d),
        "up_proj": (hidden, d),
        "ff_out": (d, hidden),
    }
    named = {f"model.transformer.blocks.{n}.{name}.weight": shape for n in range(2) for name, shape in shapes.items()}
    named |= {"model.transformer.wte.weight": (rows, d), "model.transformer.ln_f.weight": (d,)}
    if not config["weight_tying"]:
        named["model.transformer.ff_out.weight"] = (rows, d)
    tensors = {name: (torch.randn(shape, generator=generator) * 0.3).to(dtype) for name, shape in named.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    character_tokenizer().save_pretrained(folder)
    return tensors


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 2}, {"n_kv_heads": None}, {"weight_tying": True}, {"embedding_size": None}], ids=str
)
def test_published_layout_loads(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A folder as published, keys of no interest here included, loads without remote code and computes LLaDA."""
    config = {**PUBLISHED, **changes}
    tensors = published_folder(tmp_path, config)
    model, tokenizer = load_model(str(tmp_path))
    assert type(model) is LLaDAModelLM and tokenizer.mask_token_id == 1
    assert model.state_dict().keys() == tensors.keys()
    for name, value in tensors.items():
        assert model.state_dict()[name].dtype == torch.bfloat16 and torch.equal(model.state_dict()[name], value), name
    assert len(model.lm_head_weight) == (config["embedding_size"] or 25)
    assert (model.config.mask_token_id, model.config.eos_token_id) == (1, 0)
    assert (model.config.rope_theta, model.config.n_kv_heads) == (500000.0, config["n_kv_heads"] or 4)
    ids = torch.arange(9)
    with torch.no_grad():
        close(model.double().hidden_states(ids[None])[0], plain_forward(model, ids))


@pytest.mark.parametrize(
    ("problem", "error", "sentence"),
    [
        ("missing", RunError, r"1 missing keys: model\.transformer\.blocks\.1\.v_proj\.weight"),
        ("extra", RunError, r"1 unexpected keys: model\.transformer\.blocks\.1\.odd\.weight"),
        ("shape", RunError, "model="),
        ("kind", UsageError, "model_type='llama'"),
        ("mask", RunError, "no mask token"),
        ("config", UsageError, "config.json"),
        ("json", RunError, "not valid JSON"),
    ],
)
def test_broken_folders_are_named(tmp_path: Path, problem: str, error: type[Exception], sentence: str) -> None:
    """A checkpoint that does not fit is an error that says what is wrong, not random weights."""
    tensors = published_folder(tmp_path, PUBLISHED)
    key = "model.transformer.blocks.1.v_proj.weight"
    config = dict(PUBLISHED)
    if problem == "missing":
        del tensors[key]
    elif problem == "extra":
        tensors["model.transformer.blocks.1.odd.weight"] = torch.zeros(3)
    elif problem == "shape":
        tensors[key] = torch.zeros(7, 32)
    elif problem == "kind":
        config["model_type"] = "llama"
    elif problem == "mask":
        config["mask_token_id"] = 28
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{" if problem == "json" else json.dumps(config))
    if problem == "config":
        (tmp_path / "config.json").unlink()
    with pytest.raises(error, match=sentence):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"alibi": True},
        {"activation_type": "swiglu"},
        {"attention_dropout": 0.1},
        {"attention_layer_norm": True},
        {"bias_for_layer_norm": True},
        {"block_group_size": 2},
        {"block_type": "sequential"},
        {"clip_qkv": 8.0},
        {"embedding_dropout": 0.1},
        {"include_bias": True},
        {"include_qkv_bias": True},
        {"input_emb_norm": True},
        {"layer_norm_type": "default"},
        {"layer_norm_with_affine": False},
        {"multi_query_attention": True},
        {"residual_dropout": 0.1},
        {"rope": False},
        {"rope_full_precision": False},
        {"rope_scaling": {"factor": 2.0}},
        {"scale_logits": True},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope_parameters": ["default"]},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"pruned_heads": {"0": [1]}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A field of config.json that asks for another network is an error that names it, in one sentence."""
    published_folder(tmp_path, PUBLISHED)
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **changes}))
    with pytest.raises(RunError, match=f"^[^\n]*{next(iter(changes))}=[^\n]*$"):
        load_model(str(tmp_path))


def test_what_a_file_leaves_out_is_as_in_the_published_class(tmp_path: Path) -> None:
    """Without rope_theta, weight_tying and mlp_hidden_size: base 10,000, the embedding as head, 4 times the width."""
    missing = ("rope_theta", "weight_tying", "mlp_hidden_size", "mlp_ratio", "tie_word_embeddings")
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in PUBLISHED.items() if k not in missing}))
    config = LLaDAConfig.from_pretrained(tmp_path)
    assert (config.rope_theta, config.weight_tying, config.mlp_hidden_size) == (10000.0, True, 4 * PUBLISHED["d_model"])
    network = LLaDAModelLM(config)
    assert network.lm_head_weight is network.get_input_embeddings().weight


# What LLaDA-8B-Base, LLaDA-1.5 and checkpoints that were saved again by newer or other libraries say besides.
SAVED_AGAIN: dict[str, Any] = {
    "_attn_implementation": "sdpa",
    "_attn_implementation_autoset": True,
    "flash_attn_varlen": True,
    "keys_to_ignore_at_inference": ["past_key_values"],
    "layer_types": ["full_attention", "full_attention"],
    "pruned_heads": {},
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unsloth_version": "2026.1.1",
}


def test_files_that_were_saved_again_are_the_same_network(tmp_path: Path) -> None:
    """What says nothing of the network is read over, and rope_parameters of the default kind have its theta."""
    tensors = published_folder(tmp_path, PUBLISHED)
    again = {k: v for k, v in PUBLISHED.items() if k != "rope_theta"}
    again |= {**SAVED_AGAIN, "rope_parameters": {"rope_type": "default", "rope_theta": PUBLISHED["rope_theta"]}}
    (tmp_path / "config.json").write_text(json.dumps(again))
    model, _ = load_model(str(tmp_path))
    assert model.config.rope_theta == PUBLISHED["rope_theta"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in tensors.items())


def test_the_mlp_width_follows_from_its_ratio(small_llada: Callable[..., LLaDAModelLM]) -> None:
    """Where mlp_hidden_size is null, it is mlp_ratio times the width, as published."""
    model = small_llada(mlp_hidden_size=None, mlp_ratio=3)
    assert model.state_dict()["model.transformer.blocks.0.up_proj.weight"].shape == (96, 32)


def test_heads_must_divide_the_width() -> None:
    """A config whose heads do not divide its width, or whose key heads do not divide its heads, is refused."""
    sizes = {"vocab_size": 8, "d_model": 32, "n_layers": 1, "n_heads": 4, "mlp_hidden_size": 8}
    for changes in ({"n_heads": 3}, {"n_kv_heads": 3}):
        with pytest.raises(ValueError, match="config: d_model=32 must be an even multiple"):
            LLaDAModelLM(LLaDAConfig(**{**sizes, **changes}))
