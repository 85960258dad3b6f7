"""What the models of this project share: one pre-norm layer with full attention, and a network of such layers.

A model file then says what its checkpoints say: the names of the parts and the fields of ``config.json``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from dopsd.models.fused import fused
from dopsd.models.packed import KVCache, Packed
from dopsd.models.parts import Parts, RMSNorm
from dopsd_kernels import prefix_attention

T = TypeVar("T")

# Fields of a config.json that say nothing about what a model computes in evaluation mode.
BOOKKEEPING = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "experts_implementation",
    "flash_attn_varlen",
    "keys_to_ignore_at_inference",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "pad_token_id",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "unsloth_version",
    "use_cache",
}


def refuse_unknown_fields(fields: Mapping[str, Any], fixed: Mapping[str, Any], ignored: Collection[str]) -> None:
    """Raise ValueError for what a ``config.json`` asks for and this project does not compute.

    Args:
        fields: those that the config class does not have itself.
        fixed: fields that exist in this family, with the one value that is implemented; None is their default.
        ignored: further fields without influence on the network.
    """
    for name, value in fields.items():
        # What files that were saved again say of networks like these; anything else there is another network.
        if name == "pruned_heads" and value == {}:
            continue
        if name == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
            continue
        if name in fixed:
            if value is not None and value != fixed[name]:
                raise ValueError(f"config.json: {name}={value!r} is not implemented; only {fixed[name]!r} is")
        elif name not in ignored and name not in BOOKKEEPING and value is not None and value is not False:
            raise ValueError(f"config.json: {name}={value!r} is unknown here, so what it asks for is not implemented")


def rotary_theta(theta: float, parameters: Any) -> float:
    """The base of the rotary embedding, which newer files keep in ``rope_parameters``.

    Raises:
        ValueError: these ask for another embedding.
    """
    given = {} if parameters is None else parameters
    known = isinstance(given, dict) and given.keys() <= {"rope_type", "rope_theta"}
    if not known or given.get("rope_type", "default") != "default":
        raise ValueError(f"config.json: rope_parameters={parameters!r} is not implemented; only rope_type 'default' is")
    return float(given.get("rope_theta", theta))


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (..., T, head_dim) of the rotary embedding at integer ``positions`` (..., T), in fp32."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angle = positions[..., None].float() * theta**-exponent
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def sdpa(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """Bidirectional attention (B, H, R, D) of ``query`` over ``key`` and ``value`` (B, H_kv, T, D)."""
    # On CPUs the backward of the fused kernel takes half of a training step at short lengths; plain products take a
    # third of that. Without a gradient the fused kernel is the faster one there too.
    plain = query.device.type == "cpu" and torch.is_grad_enabled()
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=key_mask, enable_gqa=key.shape[1] != query.shape[1]
        )


def eager(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """What :func:`sdpa` computes, as two products with a softmax between them."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask, -torch.inf)
    return scores.softmax(-1) @ value


def head_width(config: Any) -> int:
    """Entries of an attention head: what a config's ``head_dim`` says, or else the width over the heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rows_of(mask: Tensor | None, read: Tensor | None) -> Tensor | None:
    """An attention mask (B or 1, 1, T or 1, T) for the queries at ``read`` (B, R) alone; None reads all."""
    if mask is None or read is None or mask.shape[2] == 1:
        return mask
    return mask.expand(len(read), -1, -1, -1).gather(2, read[:, None, :, None].expand(-1, -1, -1, mask.shape[3]))


class BidirectionalLayer(GradientCheckpointingLayer):
    """One pre-norm transformer layer: bidirectional attention, then SwiGLU."""

    is_causal = False  # read by transformers' attention functions

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_width(config)
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads

    @abstractmethod
    def parts(self) -> Parts:
        """The layer's modules as they are now: an adapter may have taken the place of some."""

    def forward(
        self,
        x: Tensor,  # (B, T, d)
        rotary: tuple[Tensor, Tensor],  # cos, sin (B or 1, 1, T, D)
        key_mask: Tensor | None,  # (B or 1, 1, 1 or R or T, T) bool, True where a query may attend to a key
        read: Tensor | None,  # (B, R) int64
        prefix_key: Tensor | None = None,  # (G, H_kv, W, D): what packed sequences attend to besides themselves
        prefix_value: Tensor | None = None,  # (G, H_kv, W, D)
        packed: Packed | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # (B, R or T, d), and the keys and values (B, H_kv, T, D)
        parts = fused(self.parts(), x)
        x, *projected = parts.project(x, read)
        query, key, value = (self._heads(part) for part in projected)
        cos, sin = rotary
        key = parts.place_key(key, cos, sin)
        if read is not None:
            # From here on every position is on its own, so only those that are read need be computed: exact.
            columns = read[:, None, :, None].expand(-1, -1, -1, self.head_dim)
            cos, sin = (table.expand(len(x), -1, -1, -1).gather(2, columns) for table in rotary)
        query = parts.place_query(query, cos, sin)
        if packed is None:
            mixed = self._attend(query, key, value, key_mask)
        else:
            mixed = self._attend_to_prefix(query, key, value, prefix_key, prefix_value, packed)
        x = parts.add_attention(x, mixed.transpose(1, 2).flatten(2))
        return parts.add_mlp(x), key, value

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        name = self.config._attn_implementation
        if name == "eager":
            return eager(query, key, value, key_mask)
        # transformers' flash attention takes the queries' padding to be the last columns of the keys', which it is not
        # where single positions are read; that is one layer with few queries.
        if name == "sdpa" or (key_mask is not None and query.shape[2] != key.shape[2]):
            return sdpa(query, key, value, key_mask)
        padding = None if key_mask is None else key_mask[:, 0, 0]
        mixed, _ = AttentionInterface()[name](
            self, query, key, value, padding, scaling=self.head_dim**-0.5, is_causal=False
        )
        return mixed.transpose(1, 2)

    def _attend_to_prefix(
        self,
        query: Tensor,  # (N, H, R, D), R <= T
        key: Tensor,  # (N, H_kv, T, D)
        value: Tensor,  # (N, H_kv, T, D)
        prefix_key: Any,  # (G, H_kv, W, D)
        prefix_value: Any,  # (G, H_kv, W, D)
        packed: Packed,
    ) -> Tensor:  # (N, H, R, D)
        read, groups, own_mask = query.shape[2], len(prefix_key), packed.own_mask
        # The op takes as many queries as own keys, and as many sequences for each anchor.
        query = F.pad(query, (0, 0, 0, key.shape[2] - read))

        def placed(x: Tensor) -> Tensor:
            empty = x.new_zeros(groups * packed.slots, *x.shape[1:])
            return empty.index_copy(0, packed.slot, x).unflatten(0, (groups, -1))

        mixed = prefix_attention(
            placed(query),
            placed(key),
            placed(value),
            prefix_key,
            prefix_value,
            prefix_mask=packed.prefix_mask,
            own_mask=None if own_mask is None else placed(own_mask),
            prefix_length=placed(packed.start) if packed.causal else None,
        )
        return mixed.flatten(0, 1).index_select(0, packed.slot)[:, :, :read]


class DiffusionModel(PreTrainedModel):
    """What the sampler and the objective need of a network: states before the LM head, and the head's weight.

    Logits are then made only where they are needed.
    """

    # How many positions earlier a token's state lies: 1 where a checkpoint predicts the next position's token.
    shift: int = 0
    # Tokens of a block where attention is full inside a block and causal over blocks; None: it is full everywhere.
    block_size: int | None = None
    # Blocks are counted from a sequence's first real token, or from its prompt's end in both directions.
    block_origin: Literal["token_0", "prompt_end"] = "prompt_end"
    # The mask token's text in tokenizers that have it and do not say what it is for.
    mask_token: str | None = None
    # Linear layers that LoRA may adapt, and a regular expression for what precedes their names.
    lora_modules: tuple[str, ...] = ()
    lora_path: str = ""
    # Told of the tokens that each pass computes, padding included.
    on_pass: Callable[[int], object] | None = None

    @abstractmethod
    def states(self, input_ids: Tensor, attention_mask: Tensor | None, read: Tensor | None) -> Tensor:
        """As :meth:`hidden_states`, of the positions themselves: no shift."""

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, read: Tensor | None = None
    ) -> Tensor:
        """States after the final norm, ready for the LM head.

        Args:
            input_ids: (B, T) int64 token ids.
            attention_mask: (B, T) bool, False at padding (on the left, so that positions count from the first real
                token); None when nothing is padded.
            read: (B, R) int64 positions to return, those whose tokens are predicted. The last layer computes keys and
                values everywhere and everything else at these positions only, which changes nothing but the cost.

        Returns:
            (B, R, d), or (B, T, d) without ``read``, in the model's dtype. With a shift, the state of position i is
            taken at i - 1, that of a sequence's first token at itself.
        """
        self.begin_pass(input_ids)
        if self.shift:
            batch, length = input_ids.shape
            if read is None:
                read = torch.arange(length, device=input_ids.device).expand(batch, -1)
            read = self.shifted(read, attention_mask)
        return self.states(input_ids, attention_mask, read)

    def compute(self, what: Callable[[], T]) -> T:
        """``what`` makes of this network's passes and its LM head: a loss, where processes share the weights (FSDP2).

        What is outside of it then finds parts of weights alone.
        """
        return what()

    def begin_pass(self, input_ids: Tensor) -> None:
        """These tokens are about to be computed."""
        if self.on_pass is not None:
            self.on_pass(input_ids.numel())

    def shifted(self, read: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, R) int64, where the states that predict the tokens at ``read`` (B, R) lie."""
        read = (read - self.shift).clamp_min(0)
        if attention_mask is not None:
            read = read.maximum(attention_mask.shape[1] - attention_mask.sum(-1, keepdim=True))
        return read

    def lead(self, prompt_length: int) -> int:
        """How many of a prompt's last tokens lie in the block of the response's first."""
        return prompt_length % self.block_size if self.block_size and self.block_origin == "token_0" else 0

    @property
    def lm_head_weight(self) -> Tensor:
        """The LM head (V, d); it has no bias."""
        weight = self.get_output_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight


def positions_of(attention_mask: Tensor) -> Tensor:
    """(B, T) int64 positions, counted from each row's first real token; 0 in the padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


class BidirectionalModel(DiffusionModel):
    """A network of :class:`BidirectionalLayer`."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    config: Any

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        width, heads, shared = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        own = getattr(config, "head_dim", None)
        if own is not None and (own % 2 or heads % shared):
            raise ValueError(
                f"config: head_dim={own} must be even, and num_attention_heads={heads} a multiple of "
                f"num_key_value_heads={shared}"
            )
        if own is None and (width % heads or heads % shared or width // heads % 2):
            names = {name: config.attribute_map.get(name, name) for name in ("hidden_size", "num_attention_heads")}
            key_heads = config.attribute_map.get("num_key_value_heads", "num_key_value_heads")
            raise ValueError(
                f"config: {names['hidden_size']}={width} must be an even multiple of "
                f"{names['num_attention_heads']}={heads}, and that a multiple of {key_heads}={shared}"
            )

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The layers, first to last."""

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The norm between the last layer and the LM head."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    def states(self, input_ids: Tensor, attention_mask: Tensor | None, read: Tensor | None) -> Tensor:
        return self._states(input_ids, attention_mask, read)[0]

    def _states(
        self, input_ids: Tensor, attention_mask: Tensor | None, read: Tensor | None, width: int | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """As :meth:`states`, and each layer's keys and values of the first ``width`` columns; None keeps none."""
        positions, key_mask = self._positions(input_ids, attention_mask)
        rotary = self._rotary(positions)
        x = self.get_input_embeddings()(input_ids)
        layers: list[tuple[Tensor, Tensor]] = []
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            own = read if index == last else None
            x, key, value = layer(x, rotary, rows_of(key_mask, own), own)
            if width is not None:
                layers.append((key[:, :, :width], value[:, :, :width]))
        return self.final_norm(x), layers

    def anchor_hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None, read: Tensor, start: Tensor, width: int
    ) -> tuple[Tensor, KVCache]:
        """As :meth:`hidden_states` for G anchors, with what other sequences reuse of them.

        Args:
            input_ids: (G, T') int64.
            attention_mask: (G, T') bool, as in :meth:`hidden_states`.
            read: (G, R) int64, the columns to return.
            start: (G,) int64, the columns where the tokens of the others will begin.
            width: of how many columns, from the first, keys and values are kept.

        Returns:
            (G, R, d), and what :meth:`packed_hidden_states` takes. Gradients flow through both.
        """
        self.begin_pass(input_ids)
        if not self.shift:
            states, layers = self._states(input_ids, attention_mask, read, width)
            return states, KVCache(layers, attention_mask, None)
        read = self.shifted(torch.cat((read, start[:, None]), dim=1), attention_mask)
        states, layers = self._states(input_ids, attention_mask, read, width)
        return states[:, :-1], KVCache(layers, attention_mask, states[:, -1:])

    def packed_hidden_states(self, cache: KVCache, packed: Packed, read: Tensor) -> Tensor:
        """As :meth:`hidden_states` for N sequences that reuse their anchors' keys and values.

        In each layer a packed sequence's tokens attend to each other and to what its anchor computed in that layer for
        the columns of ``packed.prefix_mask``.

        Args:
            cache: from :meth:`anchor_hidden_states`, with ``packed.start`` and the width of ``packed.prefix_mask``.
            packed: the sequences.
            read: (N, R) int64, the columns of their anchors to return, among those that they compute.

        Returns:
            (N, R, d). With a shift, the state before the first token that a packed sequence computes is its anchor's.
        """
        self.begin_pass(packed.input_ids)
        anchor, mask = packed.anchor, cache.attention_mask
        if self.shift:
            read = self.shifted(read, None if mask is None else mask[anchor])
        x, _ = self.packed_states(cache, packed, read)
        if cache.before is not None:
            early = read < packed.start[:, None]
            x = torch.where(early[..., None], cache.before.index_select(0, packed.slot if packed.causal else anchor), x)
        return x

    def packed_states(self, cache: KVCache, packed: Packed, read: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """As :meth:`packed_hidden_states`, of the columns ``read`` themselves: no shift; and each layer's own keys and
        values, (N, H_kv, T, D)."""
        mask, columns = cache.attention_mask, packed.columns()
        positions = columns if mask is None else columns - (~mask).sum(-1)[packed.anchor][:, None]
        rotary = self._rotary(positions)
        offset = (read - packed.start[:, None]).clamp_min(0)
        x = self.get_input_embeddings()(packed.input_ids)
        layers: list[tuple[Tensor, Tensor]] = []
        last = len(self.layers) - 1
        for index, (layer, prefix) in enumerate(zip(self.layers, cache.layers, strict=True)):
            x, key, value = layer(x, rotary, None, offset if index == last else None, *prefix, packed)
            layers.append((key, value))
        return self.final_norm(x), layers

    def _positions(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Positions (B or 1, T), and a mask of the keys as layers take it, or None where all may be attended to."""
        if attention_mask is None:
            return torch.arange(input_ids.shape[1], device=input_ids.device)[None], None
        return positions_of(attention_mask), attention_mask.bool()[:, None, None, :]

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, T, D) of positions (B, T)."""
        cos, sin = rotary_tables(positions, head_width(self.config), self.config.rope_theta)
        return cos[:, None], sin[:, None]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> MaskedLMOutput:
        """Logits (B, T, V) at every position as the published model returns them: a shift is left to the caller."""
        return MaskedLMOutput(logits=F.linear(self.states(input_ids, attention_mask, None), self.lm_head_weight))
