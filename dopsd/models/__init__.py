"""Loading models, tokenizers and adapters, with errors that name what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer

import dopsd.assets
from dopsd.errors import RunError, UsageError, require
from dopsd.models.llada import LLaDAModelLM

# model_type in a checkpoint's config.json -> the class that reads it.
MODELS: dict[str, type[LLaDAModelLM]] = {"llada": LLaDAModelLM}

# The name of the adapter that is trained: PEFT's default, so that what is saved loads anywhere.
STUDENT = "default"

# Models that ship with the package, by the name ``--model`` takes.
SHIPPED = {"tiny": Path(dopsd.assets.__file__).parent / "tiny"}


def load_model(model: str, dtype: str = "auto") -> tuple[LLaDAModelLM, Any]:
    """A model in evaluation mode, and its tokenizer.

    Args:
        model: ``tiny``, a folder in the Hugging Face layout, or a hub id.
        dtype: of the weights: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        UsageError: no such model, or of a kind that is not known.
        RunError: its files are incomplete, or it has no mask token.
    """
    path = str(SHIPPED.get(model, model))
    config = read_config(model, path)
    kind = config.get("model_type")
    known = f"its config.json says model_type={kind!r}; known are {', '.join(MODELS)}"
    require(kind in MODELS, "model", model, known)
    network: LLaDAModelLM
    info: dict[str, Any]
    try:
        network, info = MODELS[str(kind)].from_pretrained(path, dtype=dtype, output_loading_info=True)  # type: ignore[misc]
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(f"model={model!r} can't be loaded: {first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            names = ", ".join(str(name) for name in sorted(info[problem])[:3])
            raise RunError(
                f"model={model!r}: its weights have {len(info[problem])} {problem.replace('_', ' ')}: {names}"
            )
    mask_id = network.config.mask_token_id
    if "mask_token_id" not in config and tokenizer.mask_token_id is not None:
        mask_id = None  # what was found is the class's default, the published model's
    if mask_id is None:
        mask_id = network.config.mask_token_id = tokenizer.mask_token_id
    if mask_id is None or not 0 <= mask_id < len(network.lm_head_weight):
        raise RunError(
            f"model={model!r}: no mask token: its config.json needs a mask_token_id below the vocabulary size "
            f"{len(network.lm_head_weight)}, or its tokenizer a mask_token; found {mask_id}"
        )
    if tokenizer.eos_token_id is None:
        raise RunError(f"model={model!r}: its tokenizer has no eos_token, which marks the end of a response")
    return network.eval(), tokenizer


def read_config(model: str, path: str) -> dict[str, Any]:
    """``config.json`` of a local folder or a hub model."""
    local = Path(path) / "config.json"
    if Path(path).exists() or path.startswith((".", "/", "~")):
        require(local.is_file(), "model", model, f"a model folder holds a config.json, and {Path(path)} does not")
    else:
        from transformers.utils import cached_file

        try:
            local = Path(str(cached_file(path, "config.json")))
        except OSError as error:
            raise UsageError(
                f"model={model!r} can't be used: it is neither {', '.join(SHIPPED)}, nor a folder, nor a hub model "
                f"that can be read ({first_line(error)})"
            ) from error
    try:
        return json.loads(local.read_text())
    except json.JSONDecodeError as error:
        raise RunError(f"{local}: not valid JSON: {error}") from error


def add_lora(model: LLaDAModelLM, targets: Sequence[str] | None, r: int, alpha: int, dropout: float) -> PeftModel:
    """``model`` with a fresh LoRA adapter on ``targets``, names of its linear layers (None: all of them).

    Raises:
        UsageError: a target that the model does not have.
    """
    names = list(model.lora_modules if targets is None else targets)
    for name in names:
        require(name in model.lora_modules, "lora_targets", name, f"this model has {', '.join(model.lora_modules)}")
    pattern = f"{model.lora_path}({'|'.join(names)})"
    return get_peft_model(
        model, LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern, bias="none")
    )


def load_adapter(model: LLaDAModelLM, adapter: str, trainable: bool) -> PeftModel:
    """``model`` with the PEFT adapter in the folder ``adapter``.

    Raises:
        UsageError: no adapter there, or one whose tensors do not fit the model; the sentence names the tensor.
    """
    folder = Path(adapter)
    weights = folder / "adapter_model.safetensors"
    present = weights.is_file() and (folder / "adapter_config.json").is_file()
    require(present, "adapter", adapter, "it is a folder with adapter_config.json and adapter_model.safetensors")
    try:
        with safe_open(weights, framework="pt") as tensors:
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise RunError(f"adapter={adapter!r}: {weights.name} can't be read: {first_line(error)}") from error
    modules = dict(model.named_modules())
    for key, shape in shapes.items():
        found = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.weight", key)
        require(found is not None, "adapter", adapter, f"its tensors are lora_A and lora_B weights, and {key} is not")
        name, side = found.groups()  # type: ignore[union-attr]
        layer = modules.get(name)
        require(layer is not None, "adapter", adapter, f"it adapts {name}, which this model does not have")
        width = layer.in_features if side == "A" else layer.out_features  # type: ignore[union-attr]
        fits = shape[1 if side == "A" else 0] == width
        require(fits, "adapter", adapter, f"its {key} is {shape}, and this model's {name} takes {width}")
    return PeftModel.from_pretrained(model, folder, adapter_name=STUDENT, is_trainable=trainable)


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def device_of(model: Any) -> torch.device:
    """Where the model's LM head lies."""
    return model.lm_head_weight.device
