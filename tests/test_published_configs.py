"""The config.json files of published checkpoints, at their own sizes: each builds a network of as many parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from dopsd.errors import RunError
from dopsd.models import check_model

LLADA: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.2",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
DREAM: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
# Qwen's own fields and sizes, which these families have, and what each adds to them.
QWEN: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def sizes(hidden: int, layers: int, heads: int, key_heads: int, intermediate: int, **more: Any) -> dict[str, Any]:
    """Qwen's fields with these sizes, and more."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return {**QWEN, **dict(zip(names, (hidden, layers, heads, key_heads, intermediate), strict=True)), **more}


QWEN3 = {"attention_bias": False, "head_dim": 128, "rope_scaling": None, "sliding_window": None}
SDAR: dict[str, Any] = {
    **QWEN3,
    "architectures": ["SDARForCausalLM"],
    "block_size": 4,
    "debug": False,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "mask_token_id": 151669,
    "micro_forward": False,
    "model_type": "sdar",
    "skip_checkpoint": False,
    "tie_word_embeddings": False,
    "use_deepep": False,
}
A2D = {"architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3", "block_size": 32, "mask_token_id": 151669}
CODER = {"architectures": ["A2DQwen2LMHeadModel"], "model_type": "a2d-qwen2", "block_size": 32, "mask_token_id": 151665}
FAST = {"architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen", "bd_size": 32}
TIED = {"tie_word_embeddings": True}
SAVED_AGAIN = {"_attn_implementation_autoset": True, "transformers_version": "4.49.0"}
# LLaDA-1.5 is LLaDA-8B-Instruct, trained and saved again; Dream-Coder and DiffuCoder have Dream's network over the
# weights and the vocabulary of Qwen2.5-Coder-7B, which has Qwen2.5-7B's sizes.
CONFIGS = {
    "LLaDA-8B-Base": (LLADA, 8_015_581_184),
    "LLaDA-8B-Instruct": (LLADA, 8_015_581_184),
    "LLaDA-1.5": ({**LLADA, **SAVED_AGAIN, "_name_or_path": "GSAI-ML/LLaDA-8B-Instruct"}, 8_015_581_184),
    "Dream-v0-Instruct-7B": (DREAM, 7_615_616_512),
    "Dream-Coder-v0-Instruct-7B": ({**DREAM, **SAVED_AGAIN, "max_position_embeddings": 32768}, 7_615_616_512),
    "DiffuCoder-7B-cpGRPO": ({**DREAM, **SAVED_AGAIN, "_name_or_path": "apple/DiffuCoder-7B-Instruct"}, 7_615_616_512),
    # Qwen3's and Qwen2.5's own counts; SDAR's head is not tied to the embedding, as that of Qwen3-4B is.
    "SDAR-4B-Chat": (sizes(2560, 36, 32, 8, 9728, **SDAR), 4_022_468_096 + 151936 * 2560),
    "SDAR-8B-Chat": (sizes(4096, 36, 32, 8, 12288, **SDAR), 8_190_735_360),
    "Qwen3-0.6B-A2D": (sizes(1024, 28, 16, 8, 3072, **QWEN3, **A2D, **TIED), 596_049_920),
    "Qwen2.5-Coder-0.5B-A2D": (sizes(896, 24, 14, 2, 4864, **CODER, **TIED), 494_032_768),
    "Fast_dLLM_v2_1.5B": (sizes(1536, 28, 12, 2, 8960, **FAST, **TIED, mask_token_id=151665), 1_543_714_304),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_builds_its_network(tmp_path: Path, name: str) -> None:
    """As many parameters as the checkpoint has, its context, head and mask token, without a byte of weights."""
    fields, parameters = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found, kind = check_model(str(tmp_path))
    assert found["model_type"] == fields["model_type"]
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        network = kind(config)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network.lm_head_weight.shape == (fields["vocab_size"], fields.get("d_model") or fields["hidden_size"])
    context = fields.get("max_sequence_length") or fields["max_position_embeddings"]
    assert network.config.max_position_embeddings == context
    assert network.config.mask_token_id == fields["mask_token_id"] < fields["vocab_size"]
    assert network.config.rope_theta == fields["rope_theta"]
    assert network.shift == (fields["model_type"] in ("Dream", "Fast_dLLM_Qwen"))
    assert network.block_size == (fields.get("block_size") or fields.get("bd_size"))


@pytest.mark.parametrize("name", ["LLaDA-1.5", "DiffuCoder-7B-cpGRPO"])
def test_another_rotary_embedding_is_refused(tmp_path: Path, name: str) -> None:
    """A context that was stretched is another network, and the sentence says which field asks for it."""
    fields = {**CONFIGS[name][0], "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises((RunError, ValueError), match="rope_scaling"):
        AutoConfig.from_pretrained(tmp_path)
