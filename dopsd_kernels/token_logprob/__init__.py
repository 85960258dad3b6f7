"""Log-probabilities of given tokens and the entropy of an LM head, with gradients, without its logits."""

from .api import fused_token_logprob
from .contracts import TokenLogprob

__all__ = ["TokenLogprob", "fused_token_logprob"]
