"""Matrix products of LM heads, accumulated in fp32 (fp64 for fp64 hidden states).

On a GPU, operands of one 16-bit dtype stay as they are, which the tensor cores want, and the result is not rounded
to it. Everything else is converted to the dtype of the result, the weight in tiles of its rows (vocabulary columns).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# Settings of how fp32 is multiplied: one that is "none" is that of its backend, and that in turn the general one.
_PRODUCTS = (("cuda", "matmul"), ("mkldnn", "matmul"))
_SETTINGS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), *_PRODUCTS)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Multiply fp32 as fp32, whatever a user has allowed (TF32 on a GPU, bf16 on a CPU), and leave that as it was."""
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    changed = []
    if any(get(*setting) not in ("ieee", "none") for setting in _PRODUCTS):
        for setting in _SETTINGS:
            # Where all above it is "ieee", what reads otherwise is a setting's own, and can be put back.
            value = get(*setting)
            if value != "ieee":
                changed.append((setting, value))
                put(*setting, "ieee")
    try:
        yield
    finally:
        for setting, value in reversed(changed):
            put(*setting, value)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of logits and sums: fp64 for fp64 hidden states, else fp32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which hidden states and weight enter their products."""
    if hidden.is_cuda and hidden.dtype == weight.dtype:
        return weight.dtype
    return compute_dtype(hidden)


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a @ b of equal dtypes, of two matrices or two batches of them; in fp32 if they are 16-bit."""
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    if a.dtype.itemsize == 2:
        return multiply(a, b, out_dtype=torch.float32, out=out)
    return multiply(a, b, out=out)


def tiles(count: int, size: int) -> list[slice]:
    """Return consecutive slices of at most `size` that cover `count`."""
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]


def logits(hidden: Tensor, weight: Tensor, tile_columns: int, out: Tensor) -> None:
    """Write hidden @ weight.T (R, V) to `out`; `hidden` (R, d) has the operands' dtype."""
    if weight.dtype == hidden.dtype:
        matmul(hidden, weight.T, out=out)
    else:
        for columns in tiles(weight.shape[0], tile_columns):
            torch.mm(hidden, weight[columns].to(hidden.dtype).T, out=out[:, columns])


def hidden_gradient(dz: Tensor, weight: Tensor, tile_columns: int) -> Tensor:
    """Return dz @ weight (R, d); `dz` (R, V) has the operands' dtype."""
    if weight.dtype == dz.dtype:
        return matmul(dz, weight)
    dh = dz.new_zeros((dz.shape[0], weight.shape[1]))
    for columns in tiles(weight.shape[0], tile_columns):
        dh.addmm_(dz[:, columns], weight[columns].to(dz.dtype))
    return dh


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b of equal dtypes to `total`, in one pass over it; it is in fp32 if they are 16-bit."""
    if a.dtype.itemsize == 2:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a, b)


def add_bias_gradient(gradient: Tensor, dz: Tensor, scale: Tensor) -> None:
    """Add dz.T @ scale to `gradient` (V,), in its dtype; `scale` is (R, 1)."""
    for columns in tiles(dz.shape[1], dz.shape[1] if dz.dtype == gradient.dtype else 4096):
        gradient[columns].addmv_(dz[:, columns].to(gradient.dtype).T, scale[:, 0])


def row_stride(columns: int) -> int:
    """Return how far apart rows lie that all begin at a multiple of 16 bytes, in 16-bit or wider numbers."""
    return -(-columns // 8) * 8


def add_rows(gradient: Tensor, columns: Tensor, rows: Tensor) -> None:
    """Add `rows` (R, k, ...) to the rows of `gradient` (V, ...) that `columns` (R, k) names, always in one order."""
    if gradient.is_cuda:  # where index_add_ would add in any order
        gradient.index_put_((columns,), rows, accumulate=True)
    else:
        gradient.index_add_(0, columns.flatten(), rows.flatten(0, 1))
