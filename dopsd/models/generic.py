"""Any language model of transformers whose logits are its last hidden states times one matrix, with full attention.

transformers makes a decoder bidirectional when its config says ``is_causal=False``; encoders are so already. Layers
with local attention stay local. That this works for a checkpoint's class is checked when it is loaded, on a few tokens.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from dopsd.models.bidirectional import DiffusionModel, positions_of


class FullAttention(DiffusionModel):
    """What is added in front of a transformers class to make it a :class:`DiffusionModel`."""

    def states(self, input_ids: Tensor, attention_mask: Tensor | None, read: Tensor | None) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if attention_mask is not None:
            inputs |= {"attention_mask": attention_mask, "position_ids": positions_of(attention_mask)}
        x = self.base_model(**inputs).last_hidden_state
        return x if read is None else x.gather(1, read[..., None].expand(-1, -1, x.shape[-1]))

    def adopt(self, shift: int) -> None:
        """Set what a checkpoint does not say, and check that the network does what it is used for.

        Args:
            shift: 1 if it predicts the token of the next position, 0 if that of the same one.

        Raises:
            ValueError: it does not; the sentence says what.
        """
        self.shift = shift
        linear = (name for name, module in self.base_model.named_modules() if isinstance(module, nn.Linear))
        self.lora_modules = tuple(dict.fromkeys(name.rpartition(".")[2] for name in linear))
        # The LM head lies outside the base model.
        self.lora_path = re.escape(self.base_model_prefix) + r"\.(.*\.)?"
        name = type(self).__name__
        head = self.get_output_embeddings()
        if self.base_model is self or head is None or not self.lora_modules:
            raise ValueError(f"{name} has no LM head apart from a body with linear layers")
        if getattr(head, "bias", None) is not None:
            raise ValueError(f"{name} has an LM head with a bias, and one that is a matrix alone is needed")
        self.probe(name)

    @torch.no_grad()
    def probe(self, name: str) -> None:
        """Compare forward passes over six tokens."""
        ids = torch.arange(6, device=self.device)[None] % len(self.lm_head_weight)
        plain = self.states(ids, None, None)
        logits = self(input_ids=ids, use_cache=False).logits
        if not close(F.linear(plain, self.lm_head_weight), logits, 4 * torch.finfo(plain.dtype).eps):
            raise ValueError(
                f"{name} does more than one matrix product between its last hidden states and its logits (a transform, "
                "a scale or a cap), and the matrix alone is used here"
            )
        changed = ids.clone()
        changed[0, -1] = 0
        if torch.equal(self.states(changed, None, None)[:, 0], plain[:, 0]):
            raise ValueError(f"{name} can't be given full attention: a later token does not change an earlier state")
        padded = torch.cat((ids[:, :2], ids), dim=1)
        mask = torch.arange(8, device=self.device)[None] >= 2
        if not close(self.states(padded, mask, None)[:, 2:], plain, 0.1):
            raise ValueError(f"{name} can't be batched: padding on the left changes its states")


def close(a: Tensor, b: Tensor, share: float) -> bool:
    """Whether two tensors of one shape differ by at most this share of the second's largest entry."""
    return float((a - b).abs().max()) <= share * float(b.abs().max())


def full_attention(architecture: str) -> type[FullAttention] | None:
    """A subclass of transformers' class of that name, with its tensor names; None if there is no such model."""
    model = getattr(transformers, architecture, None)
    if not (isinstance(model, type) and issubclass(model, PreTrainedModel)):
        return None
    return type(architecture, (FullAttention, model), {"__module__": model.__module__})
