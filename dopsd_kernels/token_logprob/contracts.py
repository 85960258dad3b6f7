"""The types that fused_token_logprob and its implementations share."""

from typing import NamedTuple

from torch import Tensor


class TokenLogprob(NamedTuple):
    """What `fused_token_logprob` returns; both fields are differentiable."""

    logprob: Tensor  # of the tokens, in their shape
    entropy: Tensor  # of each row's distribution, in nats, the leading dimensions


class TokenLogprobOptions(NamedTuple):
    """The settings of `fused_token_logprob` that define its result; its docstring explains each."""

    exclude: list[int]
    temperature: float
