"""Which versions a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("dopsd", "torch", "transformers", "peft", "accelerate", "triton", "numpy")


def versions(*others: str) -> dict[str, str | None]:
    """Versions of Python, of the packages that decide a result and of ``others``; None for one that is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*PACKAGES, *others):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
