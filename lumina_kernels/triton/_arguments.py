"""Tensors as arguments of kernels: tuples of the tensor and its strides, None for None.

Triton knows of each integer in a tuple whether it is 1 and whether 16 divides it, as it does of
plain arguments, and picks the width of loads by that.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Parameters of kernels that are numbers of things. Whether 16 divides them tells nothing about the
# alignment of what they count, rows of constant width, so kernels are not compiled anew for that.
COUNTS = ("L", "B", "chunk", "chunks", "tokens", "programs", "k_programs", "windows", "grid")

# Of the largest tile that autotuning tries.
MOST_TOKENS = 256


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor without gaps."""
    return None if tensor is None else tensor.contiguous()


def empty_as(x: Tensor) -> Tensor:
    """A result without values or gaps, shaped as x; `new_empty` takes the host twice as long."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rows_of(x: Tensor | None) -> tuple | None:
    """(x, stride of b, of l) of rows without gaps, (B, L, D); (x, stride of b) of (B, D), which has
    one row per sample.

    No tuple holds None: Triton 3.6 cannot compare such a tuple with None."""
    if x is None:
        return None
    strides = x.stride()
    if strides[-1] != 1:
        x = x.contiguous()
        strides = x.stride()
    stride_b = strides[0] if x.shape[0] > 1 else 0  # that of a single sample may be any number
    return (x, stride_b) if len(strides) == 2 else (x, stride_b, strides[1])


def heads_of(x: Tensor | None) -> tuple | None:
    """(x, stride of b, of l, of h) of heads without gaps, (B, L, H, K).

    Within a tile, at most `MOST_TOKENS` tokens and all of their heads, offsets have 32 bits; a
    tensor whose strides are too long for that is copied."""
    if x is None:
        return None
    (B, L, H, _), (stride_b, stride_l, stride_h, stride_k) = x.shape, x.stride()
    if stride_k != 1 or MOST_TOKENS * stride_l + H * stride_h >= 2**31:
        x = x.contiguous()
        stride_b, stride_l, stride_h, _ = x.stride()
    # The stride of an axis of one element is never taken and may be any number.
    return x, stride_b if B > 1 else 0, stride_l if L > 1 else 0, stride_h if H > 1 else 0


def table_of(table: Tensor) -> tuple:
    """The same for entries (B or 1, L, H or 1, W), (B or 1, L, W) or (L, W), 0 for an axis that is
    shared; then the stride of the last axis if that is not 1. Tables are never copied."""
    stride_b, stride_h = 0, 0
    if table.ndim > 2 and table.shape[0] > 1:
        stride_b = table.stride(0)
    if table.ndim > 3 and table.shape[2] > 1:
        stride_h = table.stride(2)
    stride_l, stride_w = table.stride(min(1, table.ndim - 2)), table.stride(-1)
    step = () if stride_w == 1 or table.shape[-1] == 1 else (stride_w,)
    return table, stride_b, stride_l, stride_h, *step


def table_heads(table: Tensor) -> int:
    """For how many heads a table has rows."""
    return table.shape[2] if table.ndim == 4 else 1


def in_units(*heads: tuple | None) -> tuple[Sequence[tuple | None], int]:
    """The heads with their strides divided by a common divisor, at most 16, and the divisor.

    Of a stride of 72 Triton sees only that 16 does not divide it, and would load value by value.
    The divisor, 8, goes to the kernel as a constant that says how far loads can be wide. What comes
    after the stride of h stays as it is."""
    unit = 16
    for x in heads:
        if x is not None:
            unit = math.gcd(unit, x[1], x[2], x[3])
    if unit == 1:
        return heads, unit
    return [x and (x[0], x[1] // unit, x[2] // unit, x[3] // unit, *x[4:]) for x in heads], unit


def mask_of(mask: Tensor | None) -> tuple | None:
    """(mask, stride of b, of l), (B, L)."""
    return None if mask is None else (mask, *mask.stride())


def positions_of(positions: Tensor) -> tuple:
    """(positions, stride of b, of l, of the column), (B, L, 3), or (L, 3) for all samples."""
    return positions, 0 if positions.ndim == 2 else positions.stride(0), *positions.stride()[-2:]


def frequencies_of(inv_freq: Tensor) -> tuple:
    """(frequencies, stride of b) without gaps, (B, K/2), or (K/2,) for all samples."""
    inv_freq = inv_freq.contiguous()
    return inv_freq, 0 if inv_freq.ndim == 1 else inv_freq.stride(0)
