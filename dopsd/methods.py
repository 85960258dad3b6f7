"""The methods of training, by name."""

from __future__ import annotations

from typing import Any

from dopsd.baselines.diffu_grpo import DiffuGRPO
from dopsd.baselines.off_policy import OffPolicy
from dopsd.baselines.rejection import Rejection
from dopsd.baselines.sft import SFT
from dopsd.baselines.vrpo import VRPO
from dopsd.distillation import Distillation
from dopsd.method import Method

METHODS: dict[str, type[Method[Any, Any]]] = {
    "d_opsd": Distillation,
    "sft": SFT,
    "rejection": Rejection,
    "off_policy": OffPolicy,
    "diffu_grpo": DiffuGRPO,
    "vrpo": VRPO,
}
