"""Halves of a transformer layer over frozen weights with LoRA adapters, whose backward keeps little."""

from .api import lora_linears, lora_swiglu, rotary
from .contracts import LoraLinear

__all__ = ["LoraLinear", "lora_linears", "lora_swiglu", "rotary"]
