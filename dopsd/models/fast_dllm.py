"""Fast-dLLM v2 (Wu et al., 2025): Qwen2.5 with block-causal attention; logits predict the next position's token."""

from __future__ import annotations

from typing import ClassVar

from transformers import AutoConfig

from dopsd.models.block_causal import BlockCausalModel
from dopsd.models.qwen import QwenConfig, QwenModel


class FastDLLMConfig(QwenConfig):
    """Architecture of a Fast-dLLM v2 checkpoint; field names are those of the published ``config.json``.

    Raises:
        ValueError: a field asks for something that is not implemented; the sentence names it.
    """

    model_type = "Fast_dLLM_Qwen"
    qkv_bias = True
    attribute_map: ClassVar[dict[str, str]] = {"block_size": "bd_size"}

    bd_size: int | None = 32


class Fast_dLLM_QwenForCausalLM(BlockCausalModel, QwenModel):
    """Fast-dLLM v2; blocks are counted from a sequence's first token.

    The state that predicts a position is that of the one before. For a block's first position that is a state of the
    finished block before, as in the published decoding.
    """

    config_class = FastDLLMConfig
    block_origin = "token_0"
    shift = 1
    mask_token = "|<MASK>|"


AutoConfig.register("Fast_dLLM_Qwen", FastDLLMConfig)
