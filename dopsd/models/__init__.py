"""Loading models, tokenizers and adapters, with errors that name what is wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, BitsAndBytesConfig

from dopsd.errors import RunError, UsageError, require
from dopsd.files import first_line, read_json
from dopsd.models.a2d import A2DQwen2LMHeadModel, A2DQwen3LMHeadModel
from dopsd.models.adapter import (
    STUDENT,
    adapter_files,
    adapter_parameters,
    adapter_tensors,
    add_lora,
    check_saved,
    load_adapter,
    merged_adapters,
    of_adapters,
    restore_adapters,
    save_adapter,
)
from dopsd.models.bidirectional import BidirectionalModel, DiffusionModel
from dopsd.models.block_causal import BlockCausalModel
from dopsd.models.checkpoint import check_layers, check_loaded, load_tokenizer, read_config, tensors_of
from dopsd.models.copies import add_copies, has_copies, narrow, uncopied, widen
from dopsd.models.dream import DreamModel
from dopsd.models.fast_dllm import Fast_dLLM_QwenForCausalLM
from dopsd.models.generic import FullAttention, full_attention
from dopsd.models.llada import LLaDAModelLM
from dopsd.models.sdar import SDARForCausalLM

__all__ = [
    "MODELS",
    "SHIPPED",
    "STUDENT",
    "adapter_files",
    "adapter_parameters",
    "adapter_tensors",
    "add_copies",
    "add_lora",
    "check_model",
    "check_saved",
    "checkpoint_activations",
    "class_of",
    "compile_layers",
    "device_of",
    "has_copies",
    "is_block_causal",
    "load_adapter",
    "load_model",
    "merged_adapters",
    "narrow",
    "of_adapters",
    "quantization",
    "require_layers",
    "restore_adapters",
    "save_adapter",
    "uncopied",
    "widen",
]

# model_type in a checkpoint's config.json -> the class that reads it. All others are transformers' own.
MODELS: dict[str, type[DiffusionModel]] = {
    "llada": LLaDAModelLM,
    "Dream": DreamModel,
    "sdar": SDARForCausalLM,
    "a2d-qwen2": A2DQwen2LMHeadModel,
    "a2d-qwen3": A2DQwen3LMHeadModel,
    "Fast_dLLM_Qwen": Fast_dLLM_QwenForCausalLM,
}

# Known kinds that can't be read yet, and what is missing for it.
MISSING = {
    "llada2_moe": "layers with a mixture of experts and half-rotary heads",
    "llada21_moe": "layers with a mixture of experts, and trajectories in which a decoded token is edited later",
    "sdar_moe": "layers with a mixture of experts",
    "nemotron_labs_diffusion": "YaRN, scaled queries, and finished blocks that are read causally token by token",
}

# Models that ship with the package, by the name ``--model`` takes; recipes of the same names train them.
SHIPPED = {name: Path(__file__).parents[1] / "assets" / name for name in ("tiny", "tiny-causal")}


def check_model(model: str) -> tuple[dict[str, Any], type[DiffusionModel]]:
    """What a model's ``config.json`` says and the class that reads it, before anything else of it is fetched.

    Raises:
        UsageError: no such model, or of a kind that is not known.
        RunError: its config.json can't be read.
    """
    fields = read_config(model, str(SHIPPED.get(model, model)), SHIPPED)
    return fields, class_of(model, fields)


def load_model(
    model: str,
    dtype: str = "auto",
    *,
    quantize: str = "none",
    attn_implementation: str = "sdpa",
    mask_token_id: int | None = None,
    shift_logits: bool = False,
    block_size: int | None = None,
) -> tuple[DiffusionModel, Any]:
    """A model in evaluation mode, and its tokenizer. No code or pickle that comes with a checkpoint is run.

    Args:
        model: one of ``SHIPPED``, a folder in the Hugging Face layout, or a hub id.
        dtype: of the weights: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        quantize: of the linear layers but the LM head: ``none``, ``nf4`` or ``int8``.
        attn_implementation: ``sdpa``, ``eager`` or ``flash_attention_2``.
        mask_token_id: the mask token where the checkpoint does not name it, or another one than it names.
        shift_logits: whether a transformers model's logits predict the next position's token.
        block_size: of a block-causal model, where its config.json does not say it, or another one than it says; 0 for
            full attention.

    Raises:
        UsageError: no such model, of a kind that is not known, or an option that can't be had here.
        RunError: its files are incomplete, ask for what is not implemented, or it has no mask token.
    """
    path = str(SHIPPED.get(model, model))
    fields, network_class = check_model(model)
    generic = issubclass(network_class, FullAttention)
    require(
        generic or not shift_logits, "shift_logits", shift_logits, f"{fields['model_type']} models say it themselves"
    )
    blocks = issubclass(network_class, BlockCausalModel)
    require(blocks or block_size is None, "block_size", block_size, f"{fields['model_type']} models have no blocks")
    if attn_implementation == "flash_attention_2":
        installed = importlib.util.find_spec("flash_attn") is not None
        hint = "it needs a GPU and flash-attn: pip install 'dopsd[flash]'"
        require(installed and torch.cuda.is_available(), "attn_implementation", attn_implementation, hint)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    if block_size is not None:
        options["block_size"] = block_size
    if quantize != "none":
        installed = importlib.util.find_spec("bitsandbytes") is not None
        hint = "it needs a CUDA GPU and bitsandbytes: pip install 'dopsd[quant]'"
        require(installed and torch.cuda.is_available(), "quantize", quantize, hint)
        options["quantization_config"] = quantization(quantize)
    network: Any
    try:
        tensors = tensors_of(model, path)
        check_layers(model, fields, tensors)
        if generic:
            options["config"] = AutoConfig.from_pretrained(path, trust_remote_code=False)
            options["config"].is_causal = False
        loaded: Any = network_class.from_pretrained(
            path, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True, **options
        )
        network, info = loaded
        check_loaded(model, info, tensors)
        tokenizer = load_tokenizer(path)
        if generic:
            network.adopt(int(shift_logits))
    except RunError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise RunError(f"model={model!r} can't be loaded: {first_line(error)}") from error
    rows = len(network.lm_head_weight)
    if len(tokenizer) > rows:
        raise RunError(f"model={model!r}: its tokenizer has {len(tokenizer)} tokens, and its embedding {rows} rows")
    named = (
        *(mask_token_id, fields.get("mask_token_id"), tokenizer.mask_token_id),
        tokenizer.get_added_vocab().get(network_class.mask_token),
    )
    mask_id = next((value for value in named if value is not None), None)
    if mask_id is None or not 0 <= mask_id < rows:
        raise RunError(
            f"model={model!r}: no mask token: its config.json needs a mask_token_id below the vocabulary size {rows}, "
            f"or its tokenizer a mask_token, or --mask_token_id is given; found {mask_id}"
        )
    network.config.mask_token_id = mask_id
    if tokenizer.eos_token_id is None:
        raise RunError(f"model={model!r}: its tokenizer has no eos_token, which marks the end of a response")
    return network.eval(), tokenizer


def class_of(model: str, fields: dict[str, Any]) -> type[DiffusionModel]:
    """The class that reads a checkpoint with these ``config.json`` fields; UsageError if there is none."""
    kind, architectures = fields.get("model_type"), fields.get("architectures") or []
    missing = MISSING.get(str(kind))
    require(missing is None, "model", model, f"{kind} models need what is not there yet: {missing}")
    found = MODELS.get(str(kind))
    if found is not None:
        fits = not architectures or architectures == [found.__name__]
        hint = f"{kind} models of architecture {found.__name__} are read, and it says {architectures}"
        require(fits, "model", model, hint)
        return found
    generic = full_attention(str(architectures[0])) if kind is not None and architectures else None
    known = f"known are {', '.join(MODELS)} and the language models of transformers"
    if generic is None:
        raise UsageError(
            f"model={model!r} can't be used: its config.json says model_type={kind!r} and "
            f"architectures={architectures!r}; {known}"
        )
    return generic


def quantization(kind: str) -> BitsAndBytesConfig:
    """How ``kind`` (``nf4`` or ``int8``) stores the linear layers.

    transformers leaves out the LM head, which it finds by identity and not by name, and embeddings are no linear
    layers. Training needs no further preparation: PEFT freezes the base and holds adapters in fp32, norms compute in
    fp32, and checkpointing is not re-entrant.
    """
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def is_block_causal(path: str) -> bool:
    """Whether a ``config.json``, or that of a folder, is of a family with block-causal attention; False without one.

    What else is wrong with it is said when it is read for what it says.
    """
    try:
        file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        found = MODELS.get(str(read_json(file).get("model_type"))) if file.is_file() else None
    except (RunError, OSError, ValueError):
        return False
    return found is not None and issubclass(found, BlockCausalModel)


def require_layers(model: Any, argument: str, given: str, exact: str) -> None:
    """Raise UsageError unless the keys and values of ``model`` can be reused, or ``given`` is ``exact``."""
    accepted = (
        f"only {exact} with {type(model).__name__}, which is one of transformers; those of this project have it all"
    )
    require(given == exact or isinstance(model, BidirectionalModel), argument, given, accepted)


# In which a layer may be called; beyond, something is compiled for anew again and again.
WAYS = 64


def compile_layers(model: BidirectionalModel, backend: str | None, mode: str | None) -> None:
    """Compile each layer for itself: they share their graphs, one for each way in which they are called.

    Sizes are symbols in the graphs, so that no micro-batch is compiled for anew.

    Args:
        model: whose layers.
        backend, mode: torch.compile's.
    """
    # Ways are many: with a gradient or not, by one of several adapters or none, all positions or some, padded or not.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, WAYS)
    for layer in model.layers:
        layer.compile(fullgraph=True, dynamic=True, backend=backend or "inductor", mode=mode)


def checkpoint_activations(model: Any, on: bool) -> None:
    """Whether activations inside a layer are dropped, and computed again in the backward pass."""
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # Which makes embeddings require a gradient, as re-entrant checkpointing needs it: a useless backward pass here.
        model.disable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()


def device_of(model: Any) -> torch.device:
    """Where the model's LM head lies."""
    return model.lm_head_weight.device
