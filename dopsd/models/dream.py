"""Dream (Ye et al., 2025): Qwen2's layers with full attention; a position's token is predicted one position earlier.

The module tree carries the names of the published checkpoints (Dream 7B, Dream-Coder, DiffuCoder).
"""

from __future__ import annotations

from transformers import AutoConfig

from dopsd.models.qwen import QwenConfig, QwenModel


class DreamConfig(QwenConfig):
    """Architecture of a Dream checkpoint; field names are those of the published ``config.json``.

    Raises:
        ValueError: a field asks for something that is not implemented; the sentence names it.
    """

    model_type = "Dream"
    qkv_bias = True

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


class DreamModel(QwenModel):
    """Dream with its language-model head kept apart from the body.

    The state that predicts position i is that of position i - 1, as in the published generation code.
    """

    config_class = DreamConfig
    shift = 1


AutoConfig.register("Dream", DreamConfig)
