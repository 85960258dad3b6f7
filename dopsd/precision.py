"""Which precisions the machine computes in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def has_bf16(cpu: bool) -> bool:
    """Whether bf16 products run in hardware; emulated, they are 5 to 10 times slower than fp32."""
    if cpu:
        capabilities: Mapping[str, Any] = getattr(
            torch.cpu, "get_capabilities", dict
        )()  # not in the oldest torch that is supported
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
