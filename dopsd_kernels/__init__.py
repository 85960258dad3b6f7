"""Fused ops for on-policy self-distillation of masked diffusion language models."""

from dopsd_kernels.confidence import fused_confidence
from dopsd_kernels.contracts import ConfidenceOutput, StepKLOutput
from dopsd_kernels.loss import StepKLLoss
from dopsd_kernels.prefix_attention import prefix_attention
from dopsd_kernels.step_kl import fused_step_kl, step_kl_from_logits, step_mean_weights

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
