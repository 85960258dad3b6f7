"""LM head, softmax statistics, top-k and sampling in one op."""

from .api import fused_confidence
from .contracts import ConfidenceOutput

__all__ = ["ConfidenceOutput", "fused_confidence"]
