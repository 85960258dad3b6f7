"""Full fine-tuning as a PEFT adapter: copies of the modules with weights, which are trained beside the old ones.

PEFT calls it LN tuning, after the norms it was made for; it copies any module. So what holds for adapters holds here:
with adapters off the model is what it was, which is the fixed teacher, and an averaged one is another set of copies.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from peft import LNTuningConfig, PeftModel, get_peft_model
from peft.tuners.ln_tuning.layer import LNTuningLayer
from torch import nn

from dopsd.errors import require
from dopsd.models.bidirectional import DiffusionModel

# Of a copy's parameters in a state dict.
PREFIX = "ln_tuning_layers"
HALF = (torch.float16, torch.bfloat16)


def add_copies(model: DiffusionModel) -> PeftModel:
    """``model`` with fp32 copies to train of every module with weights but the embedding and the LM head.

    Teacher and student keep these two in common: one head is what both sides are compared through.

    Raises:
        UsageError: a weight is in no module of its own, so that it can't be copied with that.
    """
    apart = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if module not in apart and module._parameters]
    for name in names:
        single = not list(model.get_submodule(name).children())
        require(single, "full_finetune", True, f"{name} of this model has weights and modules, and can't be copied")
    alike = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".0", name) for name in names)
    pattern = "|".join(re.escape(name).replace(r"\.0", r"\.\d+") for name in alike)
    return attach(model, LNTuningConfig(target_modules=f"({pattern})"))


def attach(model: DiffusionModel, config: LNTuningConfig) -> PeftModel:
    """``model`` with the copies that ``config`` names; those that are to be trained in fp32."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # PEFT does not know the width of our norms
        student = get_peft_model(model, config)
    if not config.inference_mode:
        widen(student)
    return student


def widen(student: PeftModel) -> None:
    """Put copies of 16-bit weights in fp32, where small steps are not lost."""
    for layer in layers(student):
        for parameter in layer.ln_tuning_layers.parameters():
            if parameter.dtype in HALF:
                parameter.data = parameter.data.float()


def narrow(student: nn.Module) -> bool:
    """Whether weights that have copies are of 16 bits."""
    return any(parameter.dtype in HALF for layer in layers(student) for parameter in layer.base_layer.parameters())


def layers(model: nn.Module) -> list[Any]:
    """The modules with copies."""
    return [module for module in model.modules() if isinstance(module, LNTuningLayer)]


def uncopied(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are no copies."""
    return {name: value for name, value in model.named_parameters() if f".{PREFIX}." not in name}


def has_copies(model: nn.Module) -> bool:
    """Whether ``model`` is fine-tuned in full, and not by LoRA."""
    return bool(layers(model))
