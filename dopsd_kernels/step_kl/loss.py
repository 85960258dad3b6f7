"""StepKLLoss: the options of fused_step_kl as a module, for trainers that configure a loss once."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..common.arguments import check_choice, check_settings
from .api import check_options, fused_step_kl
from .contracts import StepKLOutput


class StepKLLoss(nn.Module):
    """Call `fused_step_kl` with fixed options; its docstring explains them.

    It has no parameters: the LM head's weight and bias are given with every call, so that they stay where the model,
    FSDP or an adapter keeps them. Bad options are refused here, and what depends on tensors with the call.
    """

    def __init__(
        self,
        *,
        divergence: str = "reverse_kl",
        beta: float = 0.5,
        clip: float | None = None,
        clip_form: str = "plain",
        top_k: int | None = None,
        tail: str = "renormalize",
        temperature: float = 1.0,
        reduction: str = "mean",
        workspace_bytes: int | None = None,
        vocab_group: dist.ProcessGroup | None = None,
        check_finite: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_options(divergence, beta, clip, clip_form, top_k, tail, temperature, 1 << 62, vocab_group)
        check_settings(workspace_bytes, vocab_group, check_finite, backend, torch.device("cpu"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.options: dict[str, Any] = {
            "divergence": divergence,
            "beta": beta,
            "clip": clip,
            "clip_form": clip_form,
            "top_k": top_k,
            "tail": tail,
            "temperature": temperature,
            "reduction": reduction,
            "workspace_bytes": workspace_bytes,
            "vocab_group": vocab_group,
            "check_finite": check_finite,
            "backend": backend,
        }

    def forward(
        self,
        student_hidden: Tensor,  # (..., d)
        teacher_hidden: Tensor,  # (..., d_t)
        weight: Tensor,  # (V, d)
        *,
        teacher_weight: Tensor | None = None,  # (V, d_t)
        bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V,)
        row_weight: Tensor | None = None,  # (N,)
    ) -> StepKLOutput:
        """Return `fused_step_kl(...)` of these tensors."""
        return fused_step_kl(
            student_hidden,
            teacher_hidden,
            weight,
            teacher_weight=teacher_weight,
            bias=bias,
            teacher_bias=teacher_bias,
            row_weight=row_weight,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value is not None)
