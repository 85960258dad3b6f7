"""Fused ops for on-policy self-distillation of masked diffusion language models."""

from .confidence import ConfidenceOutput, fused_confidence
from .prefix_attention import prefix_attention
from .step_kl import StepKLLoss, StepKLOutput, fused_step_kl, step_kl_from_logits, step_mean_weights

__all__ = [
    "ConfidenceOutput",
    "StepKLLoss",
    "StepKLOutput",
    "fused_confidence",
    "fused_step_kl",
    "prefix_attention",
    "step_kl_from_logits",
    "step_mean_weights",
]
