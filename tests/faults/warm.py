"""Imported once, by the process that all others are forked from: what would take each of them a second."""

import gc

import torch

from dopsd.models import load_model

torch.set_num_threads(1)
load_model("tiny")
gc.freeze()
