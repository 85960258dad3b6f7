"""LLaDA (Nie et al., 2025): a bidirectional Llama-style transformer that predicts masked tokens.

The module tree carries the names of the published checkpoints, so their tensors load without a key map and what
is saved loads wherever those checkpoints do.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from dopsd.models.bidirectional import (
    BidirectionalLayer,
    BidirectionalModel,
    refuse_unknown_fields,
    rotary_theta,
)
from dopsd.models.parts import Parts, RMSNorm

# What the published configuration class can ask for besides the fields below, and the one value that is implemented.
FIXED = {
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "embedding_dropout": 0.0,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "multi_query_attention": False,  # n_kv_heads says it
    "residual_dropout": 0.0,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
}
# Details of what is fixed above, of initialisation, or of speed.
IGNORED = {
    "alibi_bias_max",
    "attention_layer_norm_with_affine",
    "flash_attention",
    "init_cutoff_factor",
    "init_device",
    "init_fn",
    "precision",
}


class LLaDAConfig(PreTrainedConfig):
    """Architecture of a LLaDA checkpoint; field names are those of the published ``config.json``.

    What a file does not say of ``rope_theta``, ``weight_tying`` and ``mlp_hidden_size`` is as in the published class,
    and not as in LLaDA-8B, whose file says it.

    Raises:
        ValueError: a field asks for something that is not implemented; the sentence names it.
    """

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "initializer_range": "init_std",
    }

    vocab_size: int = 126464
    embedding_size: int | None = None
    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    mlp_hidden_size: int | None = None
    mlp_ratio: int = 4
    max_sequence_length: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    init_std: float = 0.02
    weight_tying: bool = True
    mask_token_id: int | None = 126336
    eos_token_id: int | list[int] | None = 126081
    pad_token_id: int | None = 126081

    def __post_init__(self, **kwargs: Any) -> None:
        self.rope_theta = rotary_theta(self.rope_theta, kwargs.pop("rope_parameters", None))
        refuse_unknown_fields(kwargs, {**FIXED, "tie_word_embeddings": self.weight_tying}, IGNORED)
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = self.mlp_ratio * self.d_model
        self.tie_word_embeddings = self.weight_tying
        super().__post_init__(**kwargs)


class LLaDABlock(BidirectionalLayer):
    """One layer, with the published names."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        width, hidden = config.d_model, config.intermediate_size
        kv_width = self.head_dim * config.num_key_value_heads
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, hidden, bias=False)  # the gate
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def parts(self) -> Parts:
        return Parts(
            self.attn_norm,
            self.q_proj,
            self.k_proj,
            self.v_proj,
            self.attn_out,
            self.ff_norm,
            self.ff_proj,
            self.up_proj,
            self.ff_out,
        )


class LLaDATransformer(nn.Module):
    """The named parts of a LLaDA checkpoint: ``wte``, ``blocks``, ``ln_f`` and, when untied, ``ff_out`` (the head)."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        rows = config.embedding_size or config.vocab_size
        self.wte = nn.Embedding(rows, config.d_model)
        self.blocks = nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        if not config.weight_tying:
            self.ff_out = nn.Linear(config.d_model, rows, bias=False)


class LLaDABody(nn.Module):
    """The ``model.`` level of the published names."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.transformer = LLaDATransformer(config)


class LLaDAModelLM(BidirectionalModel):
    """LLaDA with its language-model head kept apart from the body."""

    config_class = LLaDAConfig
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012 (typed by the base class)

    # "ff_out" is also the name of the head, hence the path.
    lora_modules = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    lora_path = r".*blocks\.\d+\."

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDABody(config)
        self.post_init()

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.transformer.blocks

    @property
    def final_norm(self) -> nn.Module:
        return self.model.transformer.ln_f

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        transformer = self.model.transformer
        return transformer.wte if self.config.weight_tying else transformer.ff_out


AutoConfig.register("llada", LLaDAConfig)
