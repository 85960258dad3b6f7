"""A layer computed by `dopsd_kernels.lora_layer`, where its modules are what that computes and no more."""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dopsd.models.parts import Parts, RMSNorm, rows
from dopsd_kernels.lora_layer import LoraLinear, lora_linears, lora_swiglu, rotary

log = logging.getLogger(__name__)

Norm = tuple[Tensor, float] | None

NORMS = ("attention_norm", "mlp_norm", "query_norm", "key_norm")
LINEARS = ("query", "key", "value", "attention_out", "gate", "up", "down")
# PEFT's classes over linear layers, and those of bitsandbytes, which need not be there.
ADAPTED = {"peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit", "peft.tuners.lora.bnb.Linear8bitLt"}
QUANTIZED = {"bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt"}


class NotFusedError(Exception):
    """Modules compute something else; says what."""


class FusedParts(NamedTuple):
    """What :class:`~dopsd.models.parts.Parts` computes, in the dtype ``dtype`` of products.

    It keeps less for the backward pass: a layer's inputs, what attention and the nonlinearity need, and the adapters'
    narrow products.
    """

    linears: dict[str, LoraLinear]
    attention_norm: Norm  # weight and eps; None: there is no norm
    mlp_norm: Norm
    query_norm: Norm
    key_norm: Norm
    dtype: torch.dtype

    def project(self, x: Tensor, read: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :meth:`Parts.project`."""
        query, key, value = (self.linears[name] for name in ("query", "key", "value"))
        project = partial(lora_linears, norm=self.attention_norm, dtype=self.dtype)
        if read is None:
            queries, keys, values = project(x, [query, key, value])
        else:
            keys, values = project(x, [key, value])
            x = rows(x, read)
            (queries,) = project(x, [query])
        return x, queries, keys, values

    def place_query(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See :meth:`Parts.place_query`."""
        return rotary(x, cos, sin, norm=self.query_norm)

    def place_key(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See :meth:`Parts.place_key`."""
        return rotary(x, cos, sin, norm=self.key_norm)

    def add_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """See :meth:`Parts.add_attention`."""
        (x,) = lora_linears(mixed, [self.linears["attention_out"]], residual=x, dtype=self.dtype)
        return x

    def add_mlp(self, x: Tensor) -> Tensor:
        """See :meth:`Parts.add_mlp`."""
        linears = (self.linears[name] for name in ("gate", "up", "down"))
        return lora_swiglu(x, *linears, norm=self.mlp_norm, dtype=self.dtype)


def fused(
    parts: Parts,
    x: Tensor,  # a layer's input
) -> Parts | FusedParts:
    """The parts fused, or as they are where these are not understood; the log says so once, and why."""
    if torch.compiler.is_compiling():
        return parts  # the compiler fuses modules by itself, and chooses what to keep
    try:
        linears = {name: lora_linear(getattr(parts, name)) for name in LINEARS}
        attention, mlp, query, key = (norm(getattr(parts, name)) for name in NORMS)
    except NotFusedError as reason:
        say_once(str(reason))
        return parts
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return FusedParts(linears, attention, mlp, query, key, dtype)


@cache
def say_once(reason: str) -> None:
    """Tell the log which path layers take."""
    log.info(f"layers are computed by their modules, and keep more for the backward pass: {reason}")


def draw_seed() -> int:
    """From the generator whose state checkpoints keep, and which a pass that is computed again sees again."""
    drawn = torch.randint(2**62, ())
    return 0 if isinstance(drawn, FakeTensor) else int(drawn)  # tensors without memory have no numbers


def norm(module: nn.Module) -> Norm:
    """Weight and eps of a norm, None where there is none; NotFusedError if it is another one, or trained."""
    module = in_use(module)
    if type(module) is nn.Identity:
        return None
    if type(module) is not RMSNorm:
        raise NotFusedError(f"a norm is a {type(module).__name__}")
    return frozen(module.weight, "a norm"), module.eps


def frozen(tensor: Any, what: str) -> Any:
    """A tensor of which no gradient is wanted; NotFusedError for others."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise NotFusedError(f"{what} is trained")
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor


def lora_linear(module: nn.Module) -> LoraLinear:
    """A linear layer with the adapter that is active; NotFusedError for what is more than that."""
    module = in_use(module)
    base: Any = module
    adapter: dict[str, Any] = {}
    if isinstance(module, LoraLayer) and name_of(module) in ADAPTED:
        base = module.get_base_layer()
        names = [] if module.disable_adapters or module.merged else module.active_adapters
        names = [name for name in names if name in module.lora_A]
        if len(names) > 1:
            raise NotFusedError(f"several adapters are active: {', '.join(names)}")
        if getattr(module, "lora_variant", None) or getattr(module, "fan_in_fan_out", False):
            raise NotFusedError("an adapter is no plain LoRA")
        for name in names:
            if module.lora_B[name].bias is not None:
                raise NotFusedError("an adapter has a bias")
            dropout = module.lora_dropout[name]
            rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
            adapter = {
                "lora_a": module.lora_A[name].weight,
                "lora_b": module.lora_B[name].weight,
                "scale": float(module.scaling[name]),
                "dropout": rate,
                "seed": draw_seed() if rate else 0,
            }
    quantised = name_of(base) in QUANTIZED
    if not quantised and type(base) is not nn.Linear:
        raise NotFusedError(f"a linear layer is a {type(base).__name__}")
    if module._forward_hooks or module._forward_pre_hooks or base._forward_hooks or base._forward_pre_hooks:
        raise NotFusedError("a linear layer has hooks")
    if base.weight.device.type == "meta":
        raise NotFusedError("a weight is fetched when its module is called")
    weight = partial(unpacked, base) if quantised else frozen(base.weight, "a base weight")
    return LoraLinear(weight, frozen(base.bias, "a base bias"), **adapter)


def unpacked(base: Any) -> Tensor:
    """The weight that a quantised layer stands for."""
    if getattr(base, "quant_state", None) is not None:
        # Where processes share weights, those that have been gathered have lost it.
        from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

        fix_4bit_weight_quant_state_from_module(base)
    return dequantize_module_weight(base)


def name_of(module: nn.Module) -> str:
    """The whole name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def in_use(module: nn.Module) -> nn.Module:
    """What computes in place of ``module``: its copy, where it has one and that is on."""
    if not isinstance(module, LNTuningLayer):
        return module
    names = [] if module.disable_adapters or module.merged else module.active_adapters
    return module.ln_tuning_layers[names[0]] if names else module.base_layer
