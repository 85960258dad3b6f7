"""Dream (Ye et al., 2025): Qwen2's layers with full attention; a position's token is predicted one position earlier.

The module tree carries the names of the published checkpoints (Dream 7B, Dream-Coder, DiffuCoder).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from dopsd.models.bidirectional import (
    BidirectionalLayer,
    BidirectionalModel,
    refuse_unknown_fields,
    rotary_theta,
)
from dopsd.models.parts import Parts, RMSNorm

# Published fields besides those below, and the one value that is implemented.
FIXED = {
    "attention_bias": True,  # on queries, keys and values
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "rope_scaling": None,
    "use_mrope": False,
    "use_sliding_window": False,
}
# Details of sliding windows, which are off.
IGNORED = {"max_window_layers", "sliding_window"}


class DreamConfig(PreTrainedConfig):
    """Architecture of a Dream checkpoint; field names are those of the published ``config.json``.

    Raises:
        ValueError: a field asks for something that is not implemented; the sentence names it.
    """

    model_type = "Dream"

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 131072
    rope_theta: float = 1000000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    mask_token_id: int | None = 151666
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = 151643

    def __post_init__(self, **kwargs: Any) -> None:
        self.rope_theta = rotary_theta(self.rope_theta, kwargs.pop("rope_parameters", None))
        refuse_unknown_fields(kwargs, FIXED, IGNORED)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)


class DreamProjections(nn.Module):
    """The projections of a layer's attention."""

    def __init__(self, width: int, kv_width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, kv_width)
        self.v_proj = nn.Linear(width, kv_width)
        self.o_proj = nn.Linear(width, width, bias=False)


class DreamMLP(nn.Module):
    """The projections of a layer's SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)


class DreamLayer(BidirectionalLayer):
    """One layer, with the published names."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.self_attn = DreamProjections(width, self.head_dim * (config.num_key_value_heads or 1))
        self.mlp = DreamMLP(width, config.intermediate_size)
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)

    def parts(self) -> Parts:
        attention, mlp = self.self_attn, self.mlp
        return Parts(
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


class DreamBody(nn.Module):
    """The ``model.`` level of the published names."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DreamLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DreamModel(BidirectionalModel):
    """Dream with its language-model head kept apart from the body.

    The state that predicts position i is that of position i - 1, as in the published generation code.
    """

    config_class = DreamConfig
    shift = 1
    _no_split_modules = ["DreamLayer"]  # noqa: RUF012 (typed by the base class)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    lora_modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    lora_path = r".*layers\.\d+\.(self_attn|mlp)\."

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        self.model = DreamBody(config)
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


AutoConfig.register("Dream", DreamConfig)
