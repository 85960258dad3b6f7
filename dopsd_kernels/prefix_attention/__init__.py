"""Attention of many short sequences over one shared prefix and their own keys."""

from .api import prefix_attention

__all__ = ["prefix_attention"]
