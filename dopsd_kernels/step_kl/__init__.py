"""A student's clipped divergence from its teacher, from hidden states or from logits."""

from .api import fused_step_kl, step_kl_from_logits, step_mean_weights
from .contracts import Divergence, StepKLOutput
from .loss import StepKLLoss

__all__ = ["Divergence", "StepKLLoss", "StepKLOutput", "fused_step_kl", "step_kl_from_logits", "step_mean_weights"]
