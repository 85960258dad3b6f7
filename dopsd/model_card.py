"""The model card of a run's adapter, and its publication on the hub."""

from __future__ import annotations
