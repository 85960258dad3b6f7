"""Tiny-A2D (dLLM): small Qwen2.5 and Qwen3 models that were made to diffuse.

Some are block-causal (trained as BD3LMs, in blocks of 32), and some have full attention (trained as MDLMs). Published
files are the same for both and don't say which, so ``block_size`` has to.
"""

from __future__ import annotations

from transformers import AutoConfig

from dopsd.models.block_causal import BlockCausalModel
from dopsd.models.qwen import QwenConfig, QwenModel


class A2DQwen2Config(QwenConfig):
    """Qwen2's fields; raises ValueError as :class:`QwenConfig`."""

    model_type = "a2d-qwen2"
    qkv_bias = True

    block_size: int | None = None


class A2DQwen3Config(QwenConfig):
    """Qwen3's fields; raises ValueError as :class:`QwenConfig`."""

    model_type = "a2d-qwen3"
    qk_norm = True

    block_size: int | None = None
    head_dim: int | None = 128


class A2DQwen2LMHeadModel(BlockCausalModel, QwenModel):
    """Qwen2's layers; blocks are counted from the prompt's end, as the published sampler does."""

    config_class = A2DQwen2Config
    mask_token = "<|mask|>"


class A2DQwen3LMHeadModel(BlockCausalModel, QwenModel):
    """Qwen3's layers, and blocks likewise."""

    config_class = A2DQwen3Config
    mask_token = "<|mask|>"


AutoConfig.register("a2d-qwen2", A2DQwen2Config)
AutoConfig.register("a2d-qwen3", A2DQwen3Config)
