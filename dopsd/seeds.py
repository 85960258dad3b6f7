"""Seeds of what is drawn: a draw is a function of what it is for, not of what was drawn before it or beside it.

A seed is :func:`mix_seeds` of the run's seed and of what names the draw: the update, the row's index, a stream below.
Tries at a row after the first mix the row's seed with the number of the try, counted from 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What a seed is mixed with where it is for something besides decoding a row of a batch.
EVALUATION = -1  # rows that are decoded once to be graded, not to be trained on
DRIFT = -2  # states whose drift is measured
DROPOUT = -3  # what a micro-batch's pass drops
REMASKING = 1  # which positions random remasking reveals
REVEAL = 2  # what a teacher is shown of a trajectory
OWN_FUTURE = 3  # what an evaluation reveals of the model's own answer
MASKING = 4  # what of a response is masked to be learnt
PROMPT_MASK = 6  # which tokens of a prompt are masked where a likelihood is estimated
PAIRING = 5  # which two responses to a prompt are compared


def mix_seeds(*values: Tensor | int) -> Tensor:
    """One int64 hash per element of the broadcast ``values`` (splitmix64, Steele et al. 2014)."""
    # Made where the values are: numbers then never have to be sent there.
    device = next((value.device for value in values if isinstance(value, Tensor)), None)
    state = torch.zeros((), dtype=torch.int64, device=device)
    for value in values:
        state = (state ^ value) - 7046029254386353131  # 0x9E3779B97F4A7C15, as a signed integer
        state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
        state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
        state = state ^ ((state >> 31) & 0x1FFFFFFFF)
    return state
