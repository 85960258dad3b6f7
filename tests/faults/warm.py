"""Imported once, by the process that all others are forked from: what would take each of them a second."""

import gc

import matplotlib.pyplot
import torch


import dopsd.evaluate
import dopsd.train
from dopsd.models import load_model

torch.set_num_threads(1)
load_model("tiny")
gc.freeze()
