"""fused_step_kl in chunks of rows: the loop and the products around a backend's passes over both sides' logits.

For a chunk of rows: a product gives the student's and the teacher's logits, one product for both where they share
the weight; passes over blocks of them give the rows' losses and the gradient with respect to the student's logits;
a last product takes that gradient to the hidden states. Only the chunk's logits, the gradient, and a few temporaries
ever exist, and they fit in the workspace.

    chunk (256 rows for V = 126464 and 256 MiB): products need many rows, for each reads the whole weight
      block: passes in PyTorch have temporaries, which take a quarter of the space; those in Triton have none, and
        read a block three times, partly from the L2 cache

The gradient of a 16-bit product overwrites logits that are no longer needed. It starts `head_rows` rows of its own
size before them. For the Triton passes, which take any stride, both sides' rows alternate, each from a multiple of 16
bytes on; a row of the gradient is then a quarter of what a row of both sides takes, so that b rows can be written from
row r on while r * 8 + head_rows * 2 >= (r + b) * 2 bytes per column: blocks grow from head_rows fourfold to what is
wanted. The passes in PyTorch take the student's rows and the teacher's apart, where blocks grow twofold.

    bytes  | head |  row 0: student's logits, fp32 | teacher's  | row 1: student's | ...
           | gradient, 16 bits: 0 | 1 | 2 | 3 | ...
"""

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from ..common import products, topk
from ..common.head import FP16_BOOST, ChunkedGradients, Gradients, Head, gradient_dtype, new_gradients
from ..common.vocab_group import VocabGroup
from ..common.workspace import Plan, chunk_rows, divide
from . import passes
from .contracts import StepKLOptions


def plan_workspace(
    student: Head,
    teacher: Head,
    needs: tuple[bool, bool, bool],
    options: StepKLOptions,
    workspace_bytes: int,
    backend: str,
    vocab: int,
) -> Plan:
    """Divide the workspace into a chunk's logits, a block's temporaries and a converted weight tile.

    `vocab` is the size of the largest shard: the processes of a group must agree on chunks and blocks.
    """
    compute = products.compute_dtype(student.hidden)
    operand = products.operand_dtype(student.hidden, student.weight)
    width = student.weight.shape[1]
    # Per row: two rows of logits; the hidden states gathered and converted; and, later unless the student's are needed
    # again for the weight's gradient, their own gradient, before and after its rounding.
    gathered = max(operand.itemsize, student.hidden.itemsize) * (width + teacher.weight.shape[1])
    differentiated = (compute.itemsize + gradient_dtype(student.hidden).itemsize) * width if needs[0] else 0
    if needs[1]:
        gathered += operand.itemsize * width + differentiated
    paired = backend == "triton"
    stride = products.row_stride(vocab) if paired else vocab
    row_bytes = compute.itemsize * 2 * stride + max(gathered, differentiated)
    converted = student.weight.dtype != operand or teacher.weight.dtype != operand
    column_bytes = compute.itemsize * max(width, teacher.weight.shape[1])
    column_bytes *= converted
    head_row_bytes = operand.itemsize * stride * (any(needs) and operand != compute)
    if backend == "triton":
        wanted_rows = _triton().block_rows(vocab, student.hidden.device)
        # What the passes keep of a row is there for the whole chunk.
        row_bytes += _triton().row_bytes(student.hidden.device)
        block_row_bytes = 0 if options.top_k is None else topk.row_bytes(vocab, options.top_k)
    else:
        wanted_rows = student.hidden.shape[0]
        block_row_bytes = passes.row_bytes(vocab, options, compute)
    plan = divide(workspace_bytes, vocab, row_bytes, column_bytes, wanted_rows, block_row_bytes, head_row_bytes)
    return replace(plan, paired=paired)


def new_outputs(student: Head, needs: tuple[bool, bool, bool]) -> tuple[Tensor, Gradients]:
    """Return the row outputs (3, N) and the gradients, all 0."""
    dtype = products.compute_dtype(student.hidden)
    return student.hidden.new_zeros((3, student.hidden.shape[0]), dtype=dtype), new_gradients(student, needs)


def _triton() -> ModuleType:
    # Imported where it is used: the package needs Triton only for this backend.
    from . import kernels

    return kernels


def step_kl(
    student: Head,
    teacher: Head,
    rows: Tensor | None,  # (A,) int64: the rows to compute; None for all
    row_scale: Tensor | None,  # (A,) upstream gradient of each computed row's loss; None for ones
    needs: tuple[bool, bool, bool],  # whether hidden, weight and bias need a gradient
    options: StepKLOptions,
    workspace_bytes: int,
    group: VocabGroup,
    backend: str,
) -> tuple[Tensor, Gradients]:
    """Return (row_loss, row_kl, row_clip_fraction) stacked as (3, N), and the gradients."""
    plan = plan_workspace(student, teacher, needs, options, workspace_bytes, backend, group.widest)
    go_over = _triton().rows if backend == "triton" else passes.rows
    dtype = products.compute_dtype(student.hidden)
    stats, grads = new_outputs(student, needs)
    active = stats.shape[1] if rows is None else rows.numel()
    if active == 0:
        return stats, grads
    if row_scale is None:
        row_scale = student.hidden.new_ones(active, dtype=dtype)
    bias_s, bias_t = (None if head.bias is None else head.bias.to(dtype) for head in (student, teacher))
    memory = _Memory(student, plan, min(active, chunk_rows(active, plan, student.hidden)))
    boost = FP16_BOOST if memory.operand == torch.float16 else 1
    # dz is the gradient of each row's own loss.
    sums = ChunkedGradients(grads, student, row_scale / (options.temperature * boost), plan.tile_columns, group)

    for chunk in products.tiles(active, memory.chunk_rows):
        places = chunk if rows is None else rows[chunk]
        size = chunk.stop - chunk.start
        z = memory.logits(size)
        dz = memory.gradient(size) if any(needs) else None
        hidden = _logits(student, teacher, places, plan.tile_columns, z, keep=needs[1])
        boosts = None if boost == 1 else row_scale.new_full((size,), boost)
        stats[:, places] = go_over(z[0], z[1], bias_s, bias_t, options, group, _blocks(size, plan), dz, boosts)
        if dz is not None:
            sums.add(chunk, places, dz, hidden)
    return stats, sums.finish()


def step_kl_from_logits(
    student: Tensor,  # (N, V)
    teacher: Tensor,  # (N, V)
    rows: Tensor | None,  # (A,) int64: the rows to compute; None for all
    row_scale: Tensor | None,  # (A,) upstream gradient of each computed row's loss; None for ones
    want_grad: bool,
    options: StepKLOptions,
    workspace_bytes: int,
    group: VocabGroup,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return (row_loss, row_kl, row_clip_fraction) stacked as (3, N), and the gradient of `student`."""
    dtype = products.compute_dtype(student)
    count = student.shape[0]
    stats = student.new_zeros((3, count), dtype=dtype)
    # Rows that are not computed have the gradient 0.
    gradients = (student.new_empty if rows is None else student.new_zeros)(student.shape if want_grad else (0,))
    if row_scale is not None:
        row_scale = row_scale / options.temperature
    elif options.temperature != 1:
        row_scale = student.new_full((count,), 1 / options.temperature, dtype=dtype)

    if backend == "triton":
        # Rows that are selected, or whose columns are not contiguous, are copied; others are read in place.
        row_bytes = 3 * 4 * group.widest + _triton().row_bytes(student.device)
        if options.top_k is not None:
            row_bytes += topk.row_bytes(group.widest, options.top_k)
        wanted_rows = _triton().block_rows(group.widest, student.device)
    else:
        row_bytes = 2 * dtype.itemsize * group.widest + passes.row_bytes(group.widest, options, dtype)
        wanted_rows = count
    limit = divide(workspace_bytes, group.widest, row_bytes, 0).chunk_rows
    active = count if rows is None else rows.numel()
    go_over = _triton().rows if backend == "triton" else passes.rows
    for block in products.tiles(active, max(1, min(wanted_rows, limit))):
        places = block if rows is None else rows[block]
        if backend == "triton":
            z_s, z_t = (x if x.stride(1) == 1 else x.contiguous() for x in (student[places], teacher[places]))
            gradient = None
            if want_grad:
                gradient = gradients[block] if rows is None else torch.empty_like(z_s)
        else:
            z_s, z_t = (x[places].to(dtype, copy=True) for x in (student, teacher))
            gradient = z_s if want_grad else None
        scale = None if row_scale is None else row_scale[block]
        stats[:, places] = go_over(z_s, z_t, None, None, options, group, [slice(0, len(z_s))], gradient, scale)
        if gradient is not None and not (rows is None and backend == "triton"):
            gradients[places] = gradient.to(gradients.dtype)
    return stats, gradients


class _Memory:
    """The logits of a chunk and the gradient that takes their place."""

    def __init__(self, student: Head, plan: Plan, chunk_rows: int) -> None:
        self.chunk_rows = chunk_rows
        self.paired = plan.paired
        self.vocab = student.weight.shape[0]
        self.stride = products.row_stride(self.vocab) if plan.paired else self.vocab
        self.dtype = products.compute_dtype(student.hidden)
        self.operand = products.operand_dtype(student.hidden, student.weight)
        # The logits begin at a multiple of 256 bytes, as an allocation of their own would.
        self.head = -(-plan.head_rows * self.stride * self.operand.itemsize // 256) * 256 // self.dtype.itemsize
        self.memory = student.hidden.new_empty(self.head + 2 * chunk_rows * self.stride, dtype=self.dtype)

    def logits(self, rows: int) -> Tensor:
        """Return (2, R, V): the student's and the teacher's."""
        memory = self.memory[self.head :][: 2 * rows * self.stride]
        if self.paired:
            return memory.view(rows, 2, self.stride)[:, :, : self.vocab].transpose(0, 1)
        return memory.view(2, rows, self.vocab)

    def gradient(self, rows: int) -> Tensor:
        """Return (R, V) in the operands' dtype: the student's logits themselves, if that is theirs."""
        if self.operand == self.dtype:
            return self.logits(rows)[0]
        return self.memory.view(self.operand)[: rows * self.stride].view(rows, self.stride)[:, : self.vocab]


def _blocks(count: int, plan: Plan) -> list[slice]:
    """Return the blocks of a chunk, in order; the module's docstring tells why the first may be small."""
    blocks: list[slice] = []
    begin = 0
    while begin < count:
        free = plan.head_rows + (3 if plan.paired else 1) * begin
        size = min(plan.block_rows, free) if plan.head_rows else plan.block_rows
        blocks.append(slice(begin, min(begin + size, count)))
        begin += size
    return blocks


def _logits(
    student: Head,
    teacher: Head,
    places: slice | Tensor,
    tile_columns: int,
    z: Tensor,  # (2, R, V)
    keep: bool,
) -> Tensor | None:
    """Write a chunk's logits, without bias and temperature; return the student's hidden states as multiplied."""
    if teacher.weight is student.weight and teacher.hidden.dtype == student.hidden.dtype:
        operand = products.operand_dtype(student.hidden, student.weight)
        sides = int(z.stride(0) < z.stride(1))  # the dimension of the sides, in the order in which rows lie
        hidden = torch.stack([side.hidden[places].to(operand) for side in (student, teacher)], sides)
        out = z.transpose(0, sides).flatten(0, 1)
        products.logits(hidden.flatten(0, 1), student.weight, tile_columns, out=out)
        return hidden.select(sides, 0) if keep else None
    hidden = head_logits(student, places, tile_columns, out=z[0])
    head_logits(teacher, places, tile_columns, out=z[1])
    return hidden if keep else None


def head_logits(head: Head, places: slice | Tensor, tile_columns: int, out: Tensor) -> Tensor:  # (R, V)
    """Write one side's logits of some rows, in the dtype of `out`, and return its hidden states as multiplied."""
    operand = products.operand_dtype(head.hidden, head.weight)
    if operand.itemsize > 2 or out.dtype == torch.float64:  # the student's dtype decides in which the logits are
        operand = out.dtype
    hidden = head.hidden[places].to(operand)
    products.logits(hidden, head.weight, tile_columns, out=out)
    return hidden
