"""What the models with Qwen2's or Qwen3's layers share: the names of the parts, and the fields of ``config.json``."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedConfig

from dopsd.models.bidirectional import (
    BidirectionalLayer,
    BidirectionalModel,
    head_width,
    refuse_unknown_fields,
    rotary_theta,
)
from dopsd.models.parts import Parts, RMSNorm

# Published fields besides those of a config class, and the one value that is implemented.
FIXED = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "rope_scaling": None,
    "use_mrope": False,
    "use_sliding_window": False,
}
# Details of sliding windows, which are off.
IGNORED = {"max_window_layers", "sliding_window"}


class QwenConfig(PreTrainedConfig):
    """What such configurations have in common; field names are those of the published ``config.json``.

    ``head_dim`` is the width of a head where it is not that of the model over the heads. A class says what its family
    has: biases on queries, keys and values (Qwen2), or norms on the heads of queries and keys (Qwen3).

    Raises:
        ValueError: a field asks for something that is not implemented; the sentence names it.
    """

    qkv_bias = False
    qk_norm = False
    # Fields that the family has besides, with the one value that is implemented, and those without influence.
    fixed: ClassVar[dict[str, Any]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    vocab_size: int = 151936
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rope_theta: float = 1000000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    mask_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.rope_theta = rotary_theta(self.rope_theta, kwargs.pop("rope_parameters", None))
        refuse_unknown_fields(kwargs, {**FIXED, "attention_bias": self.qkv_bias, **self.fixed}, IGNORED | self.ignored)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)


class QwenAttention(nn.Module):
    """The projections of a layer's attention, and its norms."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, head = config.hidden_size, head_width(config)
        own, shared = head * config.num_attention_heads, head * config.num_key_value_heads
        self.q_proj = nn.Linear(width, own, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, shared, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, shared, bias=config.qkv_bias)
        self.o_proj = nn.Linear(own, width, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(head, config.rms_norm_eps)
            self.k_norm = RMSNorm(head, config.rms_norm_eps)


class QwenMLP(nn.Module):
    """The projections of a layer's SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)


class QwenLayer(BidirectionalLayer):
    """One layer, with the published names."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.self_attn = QwenAttention(config)
        self.mlp = QwenMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def parts(self) -> Parts:
        attention, mlp = self.self_attn, self.mlp
        parts = Parts(
            self.input_layernorm,
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
            self.post_attention_layernorm,
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
        )
        if self.config.qk_norm:
            parts = parts._replace(query_norm=attention.q_norm, key_norm=attention.k_norm)
        return parts


class QwenBody(nn.Module):
    """The ``model.`` level of the published names."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(QwenLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class QwenModel(BidirectionalModel):
    """Such layers, with the language-model head kept apart from the body."""

    _no_split_modules = ["QwenLayer"]  # noqa: RUF012 (typed by the base class)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    lora_modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    lora_path = r".*layers\.\d+\.(self_attn|mlp)\."

    def __init__(self, config: QwenConfig) -> None:
        super().__init__(config)
        self.model = QwenBody(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.model.norm

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head
