"""The memory that an op may use beside its inputs, outputs and gradients, and what for."""

from dataclasses import dataclass

from torch import Tensor

# On a CPU, products of about 190 rows of both sides at V = 32768, enough for their full rate. On a GPU, of 256 rows at
# V = 126464: with fewer they are limited by reading the weight.
CPU_BYTES = 64 << 20
GPU_BYTES = 256 << 20
# Chunks of several on a GPU are a multiple of so many rows, which products take together.
_ROW_TILE = 16


@dataclass(frozen=True)
class Plan:
    """How the workspace is divided."""

    chunk_rows: int  # rows per product
    block_rows: int  # rows per pass over logits
    head_rows: int  # rows of gradient that fit before the logits; 0 if it lies where the logits were
    tile_columns: int  # weight rows (vocabulary columns) converted at once
    paired: bool = False  # whether both sides' rows of logits alternate


def divide(
    workspace_bytes: int,
    vocab: int,
    row_bytes: int,  # of each row of a chunk
    column_bytes: int,  # of each column of a tile
    wanted_rows: int = 1,  # in a block, if they fit
    block_row_bytes: int = 0,  # of each row of a block
    head_row_bytes: int = 0,  # of each row of gradient before the logits
) -> Plan:
    """Give each part of a plan what it needs, and then its share of the rest; chunks get what is left."""
    floor = row_bytes + block_row_bytes + column_bytes + head_row_bytes
    if workspace_bytes < floor:
        raise ValueError(f"workspace_bytes is {workspace_bytes}, but one row of {vocab} logits needs at least {floor}.")
    spare = workspace_bytes - floor
    block_rows = max(1, wanted_rows)
    if block_row_bytes:
        block_rows = min(block_rows, 1 + spare // 4 // block_row_bytes)
        spare -= (block_rows - 1) * block_row_bytes
    head_rows = 0
    if head_row_bytes:
        # Few, for they are rows less of the chunk, and blocks soon grow.
        head_rows = 1 + min(block_rows // 16, 8, spare // 16 // head_row_bytes)
        spare -= (head_rows - 1) * head_row_bytes
    tile_columns = vocab
    if column_bytes:
        tile_columns = min(vocab, 1 + spare // 4 // column_bytes)
        spare -= (tile_columns - 1) * column_bytes
    return Plan(1 + spare // row_bytes, block_rows, head_rows, tile_columns)


def chunk_rows(active: int, plan: Plan, hidden: Tensor) -> int:
    """Return the rows of a chunk: all chunks about equal, for every one reads the whole weight."""
    limit = plan.chunk_rows
    if not hidden.is_cuda:
        return -(-active // -(-active // limit))
    if limit >= _ROW_TILE:
        limit = limit // _ROW_TILE * _ROW_TILE
    return min(limit, -(-active // -(-active // limit) // 8) * 8)
