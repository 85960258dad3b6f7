"""The k largest entries of each row with a defined order."""

from torch import Tensor


def stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:  # (R, V) -> (R, k), (R, k) int64
    """Return the k largest values of each row and their columns, largest first, ties to the lowest column.

    `torch.topk` leaves ties open. Its values are right in any case; its columns are wrong only where equal
    values straddle the k-th place, and such rows are sorted in full.
    """
    top, columns = values.topk(k, dim=-1)
    columns, by_column = columns.sort(dim=-1)
    top, by_value = top.gather(-1, by_column).sort(dim=-1, descending=True, stable=True)
    columns = columns.gather(-1, by_value)

    last = top[:, -1:]
    straddled = ((values == last).sum(-1) > (top == last).sum(-1)).nonzero()[:, 0]
    if straddled.numel():
        order = values[straddled].sort(dim=-1, descending=True, stable=True).indices
        columns[straddled] = order[:, :k]
    return top, columns
