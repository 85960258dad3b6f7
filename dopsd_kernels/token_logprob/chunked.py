"""fused_token_logprob in chunks of rows: the loop and the products around a backend's passes over a chunk's logits.

With x a row's logits over the temperature, peak = max x and total = sum exp(x - peak), the forward keeps

    log p(token) = (x_token - peak) - log total
    entropy      = log total - sum exp(x - peak) (x - peak) / total

of one pass over the logits: neither difference cancels, also where logits are 1e4. With upstream gradients g of each
token's log-probability and e of the entropy, the gradient of x is

    sum_tokens g [v = token] - p_v (sum g + e (log p_v + entropy))
        = sum_tokens g [v = token] + exp(x_v - peak) (factor + slope (x_v - peak))

with two numbers of the row, so that the backward takes one pass over recomputed logits too.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import products
from ..common.head import FP16_BOOST, ChunkedGradients, Gradients, Head, gradient_dtype, new_gradients
from ..common.vocab_group import VocabGroup
from ..common.workspace import Plan, chunk_rows, divide
from . import passes
from .contracts import TokenLogprobOptions


class Rows(NamedTuple):
    """What the backward is given of the rows."""

    tokens: Tensor  # (N, m)
    entropy: Tensor  # (N,)
    normalizers: Tensor  # (2, N): peak and log total
    of_logprob: Tensor | None  # (N, m) upstream gradients; None: 0
    of_entropy: Tensor | None  # (N,)


def token_logprob(
    head: Head,
    tokens: Tensor,  # (N, m)
    options: TokenLogprobOptions,
    workspace_bytes: int,
    group: VocabGroup,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens' log-probabilities (N, m), the entropies (N,), and peak and log total (2, N)."""
    logits = _Logits(head, len(tokens), (False, False, False), options, workspace_bytes, group, backend)
    columns, here = _columns(tokens, group, head)
    chosen = logits.new(tokens.shape)
    parts = logits.new((3, len(tokens)))
    for chunk in logits.chunks:
        z, _ = logits.compute(chunk)
        chosen[chunk] = z.gather(1, columns[chunk])
        for block in products.tiles(len(z), logits.plan.block_rows):
            found = logits.passes.statistics(z[block], logits.bias, 1 / options.temperature)
            parts[:, chunk][:, block] = found
    if logits.bias is not None:
        chosen += logits.bias[columns]
    chosen = group.sum(torch.where(here, chosen * (1 / options.temperature), 0))
    peak, total, weighted = _merged(group.gather(parts[None]))
    log_total = total.log()
    logprob = (chosen - peak[:, None]) - log_total[:, None]
    logprob = logprob.masked_fill((tokens < 0) | (tokens >= group.vocab), torch.nan)
    return logprob, log_total - weighted / total, torch.stack([peak, log_total])


def gradients(
    head: Head,
    rows: Rows,
    needs: tuple[bool, bool, bool],  # whether hidden, weight and bias need a gradient
    options: TokenLogprobOptions,
    workspace_bytes: int,
    group: VocabGroup,
    backend: str,
) -> Gradients:
    """Return the gradients of the outputs' sum, each entry weighted with its upstream gradient."""
    dtype = products.compute_dtype(head.hidden)
    zeros = torch.zeros_like(rows.entropy)
    g = rows.tokens.new_zeros(rows.tokens.shape, dtype=dtype) if rows.of_logprob is None else rows.of_logprob
    size = g.abs().sum(1) + (zeros if rows.of_entropy is None else rows.of_entropy.abs())
    grads, active = new_gradients(head, needs), size.nonzero()[:, 0]
    count = active.numel()
    if count == 0:
        return grads
    columns, here = _columns(rows.tokens, group, head)
    peak, log_total = rows.normalizers
    entropy, e = rows.entropy, rows.of_entropy
    selected = None if count == len(size) else active
    if selected is not None:
        size, g, columns, here, peak, log_total, entropy = (
            x[selected] for x in (size, g, columns, here, peak, log_total, entropy)
        )
        e = None if e is None else e[selected]
    logits = _Logits(head, count, needs, options, workspace_bytes, group, backend)
    # Upstream gradients enter here relative to their sum, of which no entry of dz is more than log V, and the sum on
    # the narrow side of the products.
    boost = FP16_BOOST if logits.operand == torch.float16 else 1
    size = size / boost
    g = g / size[:, None]
    # A column's share: exp(y) (factor + slope y).
    scale = (-log_total).exp()
    factor, slope = -g.sum(1) * scale, None
    if e is not None:
        slope = -(e / size) * scale
        factor += slope * (entropy - log_total)
    g = torch.where(here, g, 0)
    sums = ChunkedGradients(grads, head, size / options.temperature, logits.plan.tile_columns, group)
    for chunk in logits.chunks:
        places = chunk if selected is None else selected[chunk]
        z, hidden = logits.compute(places)
        dz = logits.gradient(z)
        for block in products.tiles(len(z), logits.plan.block_rows):
            of_rows = [None if x is None else x[chunk][block] for x in (peak, factor, slope, columns, g)]
            logits.passes.logit_gradient(z[block], logits.bias, 1 / options.temperature, *of_rows, dz[block])
        sums.add(chunk, places, dz, hidden)
    return sums.finish()


class _Logits:
    """Logits of one chunk of rows after the other, and the memory of their gradient, which takes their place.

    A row of logits begins at a multiple of 16 bytes, and its gradient where it does, 16 bits wide too.
    """

    def __init__(
        self,
        head: Head,
        count: int,  # rows that are computed
        needs: tuple[bool, bool, bool],
        options: TokenLogprobOptions,
        workspace_bytes: int,
        group: VocabGroup,
        backend: str,
    ) -> None:
        self.head = head
        self.dtype = products.compute_dtype(head.hidden)
        self.operand = products.operand_dtype(head.hidden, head.weight)
        self.passes: ModuleType = _triton() if backend == "triton" else passes
        self.plan = self._plan(needs, workspace_bytes, group.widest)
        size = chunk_rows(count, self.plan, head.hidden) if count else 0
        self.chunks = products.tiles(count, size) if count else []
        self.bias = None if head.bias is None else head.bias.to(self.dtype)
        vocab = head.weight.shape[0]
        self.memory = self.new((size, products.row_stride(vocab)))[:, :vocab]
        columns = [token - group.first_column for token in options.exclude]
        columns = [column for column in columns if 0 <= column < vocab]
        # From the host without waiting for a GPU.
        self.excluded = torch.tensor(columns).to(head.hidden.device, non_blocking=True) if columns else None

    def _plan(self, needs: tuple[bool, bool, bool], workspace_bytes: int, vocab: int) -> Plan:
        """Divide the workspace; `vocab` is the size of the largest shard, for a group must agree on chunks."""
        hidden, weight = self.head.hidden, self.head.weight
        width, item, operand = weight.shape[1], self.dtype.itemsize, self.operand.itemsize
        # Per row: logits; hidden states gathered and converted; later, unless these are needed again for the weight's
        # gradient, their own gradient, before and after its rounding.
        gathered = max(operand, hidden.dtype.itemsize) * width
        differentiated = (item + gradient_dtype(hidden).itemsize) * width if needs[0] else 0
        if needs[1]:
            gathered += operand * width + differentiated
        row_bytes = item * products.row_stride(vocab) + max(gathered, differentiated)
        column_bytes = item * width * (weight.dtype != self.operand)
        wanted_rows = self.passes.block_rows(vocab, self.dtype, hidden.device)
        block_row_bytes = self.passes.row_bytes(vocab, self.dtype)
        return divide(workspace_bytes, vocab, row_bytes, column_bytes, wanted_rows, block_row_bytes)

    def new(self, shape: tuple[int, ...]) -> Tensor:
        """Return uninitialised memory in the compute dtype."""
        return self.head.hidden.new_empty(shape, dtype=self.dtype)

    def compute(self, places: slice | Tensor) -> tuple[Tensor, Tensor]:  # -> (R, V), (R, d)
        """Return some rows' logits, without bias and temperature, and their hidden states as multiplied."""
        hidden = self.head.hidden[places].to(self.operand)
        z = self.memory[: len(hidden)]
        products.logits(hidden, self.head.weight, self.plan.tile_columns, out=z)
        if self.excluded is not None:
            z.index_fill_(1, self.excluded, -torch.inf)
        return z, hidden

    def gradient(self, z: Tensor) -> Tensor:  # (R, V)
        """Return memory for the gradient of `z`, in the operands' dtype."""
        return z if self.operand == self.dtype else z.view(self.operand)[:, : z.shape[1]]


def _triton() -> ModuleType:
    # Imported where it is used: the package needs Triton only for this backend.
    from . import kernels

    return kernels


def _columns(tokens: Tensor, group: VocabGroup, head: Head) -> tuple[Tensor, Tensor]:  # (N, m) -> (N, m), (N, m)
    """Return the tokens' columns on this process, some column where it has none, and whether it has one."""
    columns = tokens - group.first_column
    last = head.weight.shape[0] - 1
    return columns.clamp(0, last), (columns >= 0) & (columns <= last)


def _merged(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (P, 3, N) -> (N,), (N,), (N,)
    """Return peak, sum of exp(x - peak) and sum of exp(x - peak) (x - peak) of rows that are in several parts."""
    peaks, totals, weighted = parts.unbind(1)
    peak = peaks.amax(0)
    peak = peak.masked_fill(peak == -torch.inf, 0)  # no finite logit: the sum is 0
    shift = (peaks - peak).clamp(min=passes.LOWEST)
    scale = shift.exp()
    return peak, (scale * totals).sum(0), (scale * (weighted + shift * totals)).sum(0)
