"""The methods of training, by name."""

from __future__ import annotations

from typing import Any

from dopsd.baselines.vrpo import VRPO
from dopsd.distillation import Distillation
from dopsd.method import Method

METHODS: dict[str, type[Method[Any, Any]]] = {
    "d_opsd": Distillation,
    "vrpo": VRPO,
}
