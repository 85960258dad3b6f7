"""SDAR (Cheng et al., 2025), and TraDo, which is trained from it: Qwen3's layers with block-causal attention."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig

from dopsd.models.block_causal import BlockCausalModel
from dopsd.models.qwen import QwenConfig, QwenModel


class SDARConfig(QwenConfig):
    """Architecture of an SDAR checkpoint; field names are those of the published ``config.json``.

    Raises:
        ValueError: a field asks for something that is not implemented; the sentence names it.
    """

    model_type = "sdar"
    qk_norm = True
    fixed: ClassVar[dict[str, Any]] = {"ep_size": 1}
    # How the training code computes.
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"debug", "fuse_cross_entropy", "micro_forward", "skip_checkpoint", "use_deepep"}
    )

    block_size: int | None = 4
    head_dim: int | None = 128


class SDARForCausalLM(BlockCausalModel, QwenModel):
    """SDAR; blocks are counted from a sequence's first token, so the first one generated can hold a prompt's end."""

    config_class = SDARConfig
    block_origin = "token_0"
    mask_token = "<|MASK|>"


AutoConfig.register("sdar", SDARConfig)
