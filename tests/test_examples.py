"""The scripts under ``examples`` run, in small, and do what they say."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples"


def main_of(name: str) -> Callable[..., Any]:
    """A script's ``main``, without having run it."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_every_example_is_tested_here() -> None:
    text = Path(__file__).read_text()
    assert all(f'main_of("{path.stem}")' in text for path in EXAMPLES.glob("*.py"))


def test_step_kl_loop() -> None:
    """The student comes closer."""
    history = main_of("step_kl_loop")(steps=15)
    assert 0 < history[-1] < 0.8 * history[0]


def test_dllm_sft() -> None:
    """Masked tokens become likelier."""
    history = main_of("dllm_sft")(steps=6, batch=8)
    assert 0 < history[-1] < 0.8 * history[0]
