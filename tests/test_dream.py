"""The Dream model against a plain forward pass and Qwen2's layers, its shifted reading, and its files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_published_configs import DREAM
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from dopsd.errors import RunError, UsageError
from dopsd.models import load_model
from dopsd.models.dream import DreamConfig, DreamModel

VOCAB, WIDTH = 37, 24
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "tie_word_embeddings": True},
    {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 7, "num_hidden_layers": 1},
]


def small_dream(dtype: torch.dtype = torch.float64, **changes: Any) -> DreamModel:
    """A random Dream, in evaluation mode; no norm weight is one and no bias is zero."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 41,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "initializer_range": 0.3,
        "mask_token_id": 36,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    model = DreamModel(DreamConfig(**{**sizes, **changes})).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-1, 1)
    return model


def plain_forward(model: DreamModel, ids: Tensor) -> Tensor:
    """States (T, d) of one sequence after the final norm, one head and one pair of dimensions at a time, in fp64."""
    config, tensors = model.config, {name: value.detach().double() for name, value in model.state_dict().items()}
    heads, kv_heads, length = config.num_attention_heads, config.num_key_value_heads, len(ids)
    width = config.hidden_size // heads

    def norm(x: Tensor, name: str) -> Tensor:
        return (
            torch.stack([row / math.sqrt(float(row @ row) / len(row) + config.rms_norm_eps) for row in x])
            * (tensors[f"{name}.weight"])
        )

    def rope(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for position in range(length):
            for i in range(width // 2):
                angle = position * config.rope_theta ** (-2 * i / width)
                a, b = float(x[position, i]), float(x[position, i + width // 2])
                out[position, i] = a * math.cos(angle) - b * math.sin(angle)
                out[position, i + width // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = tensors["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"

        def linear(x: Tensor, name: str, prefix: str = prefix) -> Tensor:
            out = torch.einsum("td,od->to", x, tensors[f"{prefix}.{name}.weight"])
            return out + tensors[f"{prefix}.{name}.bias"] if name[-6:] in ("q_proj", "k_proj", "v_proj") else out

        normed = norm(x, f"{prefix}.input_layernorm")
        q, k, v = (linear(normed, f"self_attn.{name}_proj") for name in "qkv")
        mixed = []
        for head in range(heads):
            shared = head * kv_heads // heads
            own, kv = slice(head * width, (head + 1) * width), slice(shared * width, (shared + 1) * width)
            scores = torch.einsum("id,jd->ij", rope(q[:, own]), rope(k[:, kv])) / math.sqrt(width)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            mixed.append(torch.einsum("ij,jd->id", weights, v[:, kv]))
        x = x + linear(torch.cat(mixed, -1), "self_attn.o_proj")
        normed = norm(x, f"{prefix}.post_attention_layernorm")
        gate = linear(normed, "mlp.gate_proj")
        x = x + linear(gate / (1 + (-gate).exp()) * linear(normed, "mlp.up_proj"), "mlp.down_proj")
    return norm(x, "model.norm")


def shifted(states: Tensor) -> Tensor:
    """What the published generation code does to logits, to the states: position i gets those of i - 1."""
    return torch.cat([states[:1], states[:-1]])


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to the fp32 rounding of the rotary angles, unless told otherwise."""
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The rows as one batch with random ids in the padding, and its mask."""
    width = max(map(len, rows))
    ids = random_ids(len(rows), width, seed=9)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
    return ids, torch.arange(width) >= width - torch.tensor([len(row) for row in rows])[:, None]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_states_equal_a_plain_forward_pass(changes: dict[str, Any], grad: bool, implementation: str) -> None:
    """States are those of one position earlier; logits, as the published model returns them, are not shifted."""
    model = small_dream(**changes)
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    ids = random_ids(2, 11)
    expected = [plain_forward(model, row) for row in ids]
    head = "model.embed_tokens" if changes.get("tie_word_embeddings") else "lm_head"
    with torch.set_grad_enabled(grad):
        close(model.hidden_states(ids).detach(), torch.stack([shifted(states) for states in expected]))
        logits = torch.einsum("btd,vd->btv", torch.stack(expected), model.state_dict()[f"{head}.weight"])
        close(model(ids).logits.detach(), logits)
    assert torch.equal(model.lm_head_weight, model.state_dict()[f"{head}.weight"])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_padding_and_reading(changes: dict[str, Any], implementation: str) -> None:
    """What is read from a padded batch is what each row has alone; its first token's state is never that of padding."""
    model = small_dream(**changes)
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    rows = [random_ids(length, seed=length) for length in (12, 9, 2)]
    ids, mask = left_padded(rows)
    expected = [shifted(plain_forward(model, row)) for row in rows]
    read = torch.tensor([[11, 0, 5, 5], [3, 4, 11, 7], [11, 10, 10, 11]])
    with torch.no_grad():
        whole = model.hidden_states(ids, mask)
        some = model.hidden_states(ids, mask, read)
    for index, states in enumerate(expected):
        start = 12 - len(states)
        close(whole[index, start:], states)
        close(some[index], states[read[index] - start])


def test_reading_has_the_gradients_of_the_whole() -> None:
    """The last layer computes less, and every gradient is the same."""
    model = small_dream()
    ids, mask = left_padded([random_ids(length, seed=length) for length in (10, 6)])
    read = torch.tensor([[9, 2, 0], [4, 9, 5]])
    pull = torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gradients = []
    for only in (False, True):
        model.zero_grad()
        states = model.hidden_states(ids, mask, read if only else None)
        states = states if only else states.gather(1, read[..., None].expand(-1, -1, WIDTH))
        (states * pull).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * 12 + 2
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, 1e-12)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_layers_are_those_of_qwen2_with_full_attention(changes: dict[str, Any], padded: bool) -> None:
    """Qwen2ForCausalLM takes the tensors by their names and, with a mask that hides padding only, computes the same."""
    model = small_dream(**changes)
    sizes = {name: getattr(model.config, name) for name in DreamConfig.__annotations__ if name != "mask_token_id"}
    qwen = Qwen2ForCausalLM(Qwen2Config(**sizes, attn_implementation="eager")).double().eval()
    qwen.load_state_dict(model.state_dict())
    ids, mask = left_padded([random_ids(length, seed=length) for length in ((10, 7, 3) if padded else (10, 10, 10))])
    hidden = torch.zeros(3, 1, 10, 10, dtype=torch.float64).masked_fill(~mask[:, None, None], -1e300)
    with torch.no_grad():
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        states = qwen.model(input_ids=ids, attention_mask=hidden, position_ids=positions).last_hidden_state
        got = model.states(ids, mask if padded else None, None)
        logits = model(ids, mask if padded else None).logits
        close(got[mask], states[mask])
        close(logits[mask], qwen.lm_head(states)[mask])


def test_gradient_checkpointing_changes_nothing() -> None:
    """Activations that are recomputed give the same gradients."""
    ids, mask = left_padded([random_ids(length, seed=length) for length in (9, 6)])
    results = []
    for checkpointing in (False, True):
        model = small_dream().train()
        calls: list[int] = []
        for layer in model.model.layers:
            layer.input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.hidden_states(ids, mask, torch.tensor([[3, 4], [8, 5]])).pow(3).sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert len(calls) == (4 if checkpointing else 2)
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        close(results[1][name], gradient, 1e-12)


# ---- files ----

# The published config.json of Dream-v0-Instruct-7B, but for its sizes.
PUBLISHED: dict[str, Any] = {
    **DREAM,
    **{"hidden_size": WIDTH, "intermediate_size": 41, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"num_hidden_layers": 2, "vocab_size": 10, "bos_token_id": 3, "eos_token_id": 3, "pad_token_id": 3},
    "mask_token_id": 6,
}


def published_folder(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """A checkpoint as its authors publish it, its code and tokenizer files included; returns its tensors."""
    d, hidden, kv = config["hidden_size"], config["intermediate_size"], 12
    layer = {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (hidden, d),
        "mlp.up_proj.weight": (hidden, d),
        "mlp.down_proj.weight": (d, hidden),
        "self_attn.o_proj.weight": (d, d),
    }
    for name, rows in (("q", d), ("k", kv), ("v", kv)):
        layer |= {f"self_attn.{name}_proj.weight": (rows, d), f"self_attn.{name}_proj.bias": (rows,)}
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in layer.items()
    }
    shapes |= {"model.norm.weight": (d,), "model.embed_tokens.weight": (10, d), "lm_head.weight": (10, d)}
    generator = torch.Generator().manual_seed(2)
    tensors = {name: (torch.randn(shape, generator=generator) * 0.3).bfloat16() for name, shape in shapes.items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = {
        "added_tokens_decoder": {
            str(3 + index): {"content": token, "special": True} for index, token in enumerate(special)
        },
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "DreamTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in ("configuration_dream", "modeling_dream", "tokenization_dream"):
        (folder / f"{name}.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    return tensors


def test_published_layout_loads(tmp_path: Path) -> None:
    """A folder as published loads without its code: tensors bit for bit, special ids, tokenizer and chat template."""
    tensors = published_folder(tmp_path, PUBLISHED)
    model, tokenizer = load_model(str(tmp_path))
    assert type(model) is DreamModel
    assert model.state_dict().keys() == tensors.keys()
    for name, value in tensors.items():
        assert model.state_dict()[name].dtype == torch.bfloat16 and torch.equal(model.state_dict()[name], value), name
    assert (model.config.mask_token_id, tokenizer.mask_token_id, tokenizer.eos_token_id) == (6, 6, 3)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "aba"}], tokenize=False)
    assert tokenizer(text)["input_ids"] == [4, 2, 0, 5]
    ids = torch.tensor([4, 2, 0, 5, 6, 6])
    with torch.no_grad():
        close(model.double().hidden_states(ids[None])[0], shifted(plain_forward(model, ids)))
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    for name in ("model_type", "architectures", "hidden_size", "num_key_value_heads", "rope_theta", "mask_token_id"):
        assert written[name] == PUBLISHED[name], name


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"use_sliding_window": True},
        {"use_mrope": True},
        {"hidden_act": "gelu"},
        {"attention_dropout": 0.1},
        {"attention_bias": False},
        {"block_size": 32},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A field that asks for other layers is an error that names it, in one sentence."""
    published_folder(tmp_path, {**PUBLISHED, **changes})
    with pytest.raises(RunError, match=f"^[^\n]*{next(iter(changes))}[^\n]*$"):
        load_model(str(tmp_path))


def test_another_architecture_of_that_type_is_refused(tmp_path: Path) -> None:
    """Block-causal relatives share the model type; they do not shift and are not this model."""
    published_folder(tmp_path, {**PUBLISHED, "architectures": ["DreamForCausalLM"]})
    with pytest.raises(UsageError, match="DreamForCausalLM"):
        load_model(str(tmp_path))
