"""Fused ops for on-policy self-distillation of masked diffusion language models."""

from .confidence import ConfidenceOutput, fused_confidence
from .lora_layer import LoraLinear, lora_linears, lora_swiglu
from .prefix_attention import prefix_attention
from .step_kl import StepKLLoss, StepKLOutput, fused_step_kl, step_kl_from_logits, step_mean_weights
from .token_logprob import TokenLogprob, fused_token_logprob

__all__ = [
    "ConfidenceOutput",
    "LoraLinear",
    "StepKLLoss",
    "StepKLOutput",
    "TokenLogprob",
    "fused_confidence",
    "fused_step_kl",
    "fused_token_logprob",
    "lora_linears",
    "lora_swiglu",
    "prefix_attention",
    "step_kl_from_logits",
    "step_mean_weights",
]
