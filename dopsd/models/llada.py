"""LLaDA (Nie et al., 2025): a bidirectional Llama-style transformer that predicts masked tokens.

The module tree carries the names of the published checkpoints, so their tensors load without a key map and what
is saved loads wherever those checkpoints do.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput


class LLaDAConfig(PreTrainedConfig):
    """Architecture of a LLaDA checkpoint; field names are those of the published ``config.json``."""

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 126464
    embedding_size: int | None = None
    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    mlp_hidden_size: int = 12288
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    init_std: float = 0.02
    weight_tying: bool = False
    mask_token_id: int | None = 126336
    eos_token_id: int | list[int] | None = 126081
    pad_token_id: int | None = 126081

    def __post_init__(self, **kwargs: Any) -> None:
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        self.tie_word_embeddings = self.weight_tying
        super().__post_init__(**kwargs)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 and cast back before the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (..., T, head_dim) of the rotary embedding at integer ``positions`` (..., T), in fp32."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angle = positions[..., None].float() * theta**-exponent
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to ``x`` (B, H, T, D) in at least fp32."""
    wide = x if x.dtype == torch.float64 else x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """Bidirectional attention of ``query`` (B, H, R, D) over ``key`` and ``value`` (B, H_kv, T, D)."""
    # On CPUs the backward of the fused kernel takes half of a training step at short lengths; plain products take a
    # third of that. Without a gradient the fused kernel is the faster one there too.
    plain = query.device.type == "cpu" and torch.is_grad_enabled()
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=key_mask, enable_gqa=key.shape[1] != query.shape[1]
        )


class LLaDABlock(GradientCheckpointingLayer):
    """One pre-norm transformer layer: bidirectional attention, then SwiGLU."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        width, hidden = config.d_model, config.mlp_hidden_size
        self.n_heads = config.n_heads
        self.head_dim = width // config.n_heads
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

    def forward(
        self,
        x: Tensor,  # (B, T, d)
        rotary: tuple[Tensor, Tensor],  # cos, sin (B or 1, 1, T, D)
        key_mask: Tensor | None,  # (B, 1, 1, T) bool, True where a key may be attended to
        read: Tensor | None,  # (B, R) int64
    ) -> Tensor:  # (B, R or T, d)
        normed = self.attn_norm(x)
        cos, sin = rotary
        key = rotate(self._heads(self.k_proj(normed)), cos, sin)
        value = self._heads(self.v_proj(normed))
        if read is not None:
            # From here on every position is on its own, so only those that are read need be computed: exact.
            rows = read[..., None].expand(-1, -1, x.shape[-1])
            x, normed = x.gather(1, rows), normed.gather(1, rows)
            columns = read[:, None, :, None].expand(-1, -1, -1, self.head_dim)
            cos, sin = (table.expand(len(x), -1, -1, -1).gather(2, columns) for table in rotary)
        query = rotate(self._heads(self.q_proj(normed)), cos, sin)
        mixed = attend(query, key, value, key_mask)
        x = x + self.attn_out(mixed.transpose(1, 2).flatten(2))
        normed = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


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


class LLaDAModelLM(PreTrainedModel):
    """LLaDA with its language-model head kept apart from the body.

    ``hidden_states`` and ``lm_head_weight`` are what this project's sampler and objective use, so that logits are
    made only where they are needed. ``forward`` makes all of them, for use outside it.
    """

    config_class = LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012 (typed by the base class)

    # Linear layers that LoRA may adapt. "ff_out" is also the name of the head, hence the path.
    lora_modules: ClassVar[tuple[str, ...]] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "attn_out",
        "ff_proj",
        "up_proj",
        "ff_out",
    )
    lora_path: ClassVar[str] = r".*blocks\.\d+\."

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        if config.d_model % config.n_heads or config.n_heads % config.num_key_value_heads:
            raise ValueError(
                f"config: d_model={config.d_model} must be a multiple of n_heads={config.n_heads}, and that a multiple "
                f"of n_kv_heads={config.num_key_value_heads}"
            )
        self.model = LLaDABody(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.init_std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        transformer = self.model.transformer
        return transformer.wte if self.config.weight_tying else transformer.ff_out

    @property
    def lm_head_weight(self) -> Tensor:
        """The LM head (V, d); it has no bias."""
        weight = self.get_output_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, read: Tensor | None = None
    ) -> Tensor:
        """States after the final norm, ready for the LM head.

        Args:
            input_ids: (B, T) int64 token ids.
            attention_mask: (B, T) bool, False at padding (on the left, so that positions count from the first real
                token); None when nothing is padded.
            read: (B, R) int64 positions to return. The last layer computes keys and values everywhere and everything
                else at these positions only, which changes nothing but the cost.

        Returns:
            (B, R, d), or (B, T, d) without ``read``, in the model's dtype.
        """
        key_mask = None
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
            key_mask = attention_mask.bool()[:, None, None, :]
        head_dim = self.config.d_model // self.config.n_heads
        cos, sin = rotary_tables(positions, head_dim, self.config.rope_theta)
        rotary = cos[:, None], sin[:, None]
        transformer = self.model.transformer
        x = transformer.wte(input_ids)
        last = len(transformer.blocks) - 1
        for index, block in enumerate(transformer.blocks):
            x = block(x, rotary, key_mask, read if index == last else None)
        return transformer.ln_f(x)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> MaskedLMOutput:
        """Logits (B, T, V) at every position, for callers that want what transformers models usually return."""
        return MaskedLMOutput(logits=F.linear(self.hidden_states(input_ids, attention_mask), self.lm_head_weight))


AutoConfig.register("llada", LLaDAConfig)
