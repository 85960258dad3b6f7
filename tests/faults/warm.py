"""Imported once, by the process that all others are forked from: what would take each of them seconds."""

import gc
from importlib import import_module

import torch

from dopsd.models import load_model

for name in (
    "dopsd.run",
    "dopsd.evaluation.command",
    "dopsd.memory.command",
    "matplotlib.backends.backend_agg",
    "rich.table",
):
    import_module(name)
torch.set_num_threads(1)
load_model("tiny")
gc.freeze()
