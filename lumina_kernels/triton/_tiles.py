"""What the kernels over rows of D values share.

A row is held as two parts of LO and HI values, powers of two as Triton asks for: 2304 is
2048 + 256, where the next power of two would idle 44 % of the lanes. Rows are numbered within a
sample.
"""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor


@cache
def forward_tile(D: int) -> dict:
    """Sizes of the tile of rows that a program of a forward holds, up to 80 values a lane.

    Several rows share the modulation that a program loads, and where a part of one row is too
    narrow for its warps to read 16 bytes a lane, that part of several rows is not.
    """
    LO, HI = _parts(D)
    num_warps, ROWS = 4, 1
    while LO + HI > 80 * 32 * num_warps and num_warps < 16:
        num_warps *= 2
    while 2 * ROWS * (LO + HI) <= 80 * 32 * num_warps and ROWS < 64:
        ROWS *= 2
    return {"D": D, "LO": LO, "HI": HI, "ROWS": ROWS, "num_warps": num_warps}


@cache
def backward_tile(D: int) -> dict:
    """The same of a backward: one row at a time, as sums over rows and four to six tensors share
    the registers, up to 20 values a lane. Left alone, ptxas spills one or two of these to fit one
    more program on a processor."""
    LO, HI = _parts(D)
    num_warps = 1
    while LO + HI > 20 * 32 * num_warps and num_warps < 16:
        num_warps *= 2
    maxnreg = min(255, 65536 // (32 * num_warps))
    return {"D": D, "LO": LO, "HI": HI, "num_warps": num_warps, "maxnreg": maxnreg}


def rows_per_program(rows: int) -> int:
    """How many of all rows a program of a backward adds up before it writes its partial sums: so
    many that the sums are a small part of the traffic, unless there are too few rows to keep a GPU
    busy."""
    return 16 if rows >= 4096 else 4


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`; triton.cdiv takes the host 2 us."""
    return -(-count // size)


def _parts(D: int) -> tuple[int, int]:
    LO = 1 << max(D - 1, 1).bit_length() - 1
    return LO, 1 << max(D - LO - 1, 0).bit_length()


def rows_of(tensor: Tensor | None) -> tuple[Tensor | None, int, int | None]:
    """A (B, L, D) or (B, D) tensor with no gaps within its rows, and its steps in b and l; the
    latter is None for one row per sample."""
    if tensor is None:
        return None, 0, None
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    return tensor, tensor.stride(0), None if tensor.ndim == 2 else tensor.stride(1)


def contiguous(vector: Tensor | None) -> Tensor | None:
    """The same, and None for None."""
    return None if vector is None else vector.contiguous()


@triton.jit
def program_rows(L, ROWS: tl.constexpr):
    """The sample of this program, and its rows in that sample, (ROWS, 1)."""
    b, first = program_chunk(L, ROWS)
    return b, first + tl.arange(0, ROWS)[:, None]


@triton.jit
def program_chunk(L, chunk):
    """The sample of this program, and the first of its `chunk` rows (or values) in it."""
    chunks = tl.cdiv(L, chunk)
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    return b, (program - b * chunks) * chunk


@triton.jit
def _part(rows, L, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns of one part, and which of its values there are."""
    columns = START + tl.arange(0, WIDTH)[None, :]
    there = rows < L
    if START + WIDTH > D:
        there = there & (columns < D)
    return columns, there


@triton.jit
def load_rows(ptr, step, rows, L, LO: tl.constexpr, HI: tl.constexpr, D: tl.constexpr):
    """Both parts of some rows in float32, zeros where there is nothing."""
    columns, there = _part(rows, L, 0, LO, D)
    lo = tl.load(ptr + rows * step + columns, mask=there, other=0.0)
    columns, there = _part(rows, L, LO, HI, D)
    hi = tl.load(ptr + rows * step + columns, mask=there, other=0.0)
    return lo.to(tl.float32), hi.to(tl.float32)


@triton.jit
def load_vector(ptr, LO: tl.constexpr, HI: tl.constexpr, D: tl.constexpr):
    """Both parts of D values in float32, (1, LO) and (1, HI)."""
    return load_rows(ptr, 0, tl.zeros((1, 1), tl.int64), 1, LO, HI, D)


@triton.jit
def load_modulation(ptr, step, rows, L, LO: tl.constexpr, HI: tl.constexpr, D: tl.constexpr):
    """Both parts of a modulation in float32: of one row where a sample has one."""
    if step is None:
        return load_vector(ptr, LO, HI, D)
    else:
        return load_rows(ptr, step, rows, L, LO, HI, D)


@triton.jit
def store_rows(ptr, lo, hi, rows, L, LO: tl.constexpr, HI: tl.constexpr, D: tl.constexpr):
    """Both parts to a contiguous (L, D), rounded to its dtype."""
    columns, there = _part(rows, L, 0, LO, D)
    tl.store(ptr + rows * D + columns, lo.to(ptr.dtype.element_ty), mask=there)
    columns, there = _part(rows, L, LO, HI, D)
    tl.store(ptr + rows * D + columns, hi.to(ptr.dtype.element_ty), mask=there)


@triton.jit
def row_sum(lo, hi):
    """Sums over the rows, (ROWS, 1)."""
    return (tl.sum(lo, 1) + tl.sum(hi, 1))[:, None]


@triton.jit
def tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2|x|); near 0, where 1 - e cancels, the Padé approximant
    [5/4], 3e-9 off at most."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    square = x * x
    near = size < 0.6
    above = tl.where(near, size * (945 + square * (105 + square)), 1 - e)
    below = tl.where(near, 945 + square * (420 + square * 15), 1 + e)
    return tl.where(x < 0, -above, above) / below


@triton.jit
def _normalise_part(
    x, mean, rstd, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, LAYER: tl.constexpr
):
    if LAYER:
        x = x - mean
        if START + WIDTH > D:
            x = tl.where(START + tl.arange(0, WIDTH)[None, :] < D, x, 0.0)
    return x * rstd


@triton.jit
def normalise(
    lo, hi, mean, rstd, LO: tl.constexpr, HI: tl.constexpr, D: tl.constexpr, LAYER: tl.constexpr
):
    """(x - mean) * rstd, or x * rstd; 0 beyond column D."""
    lo = _normalise_part(lo, mean, rstd, 0, LO, D, LAYER)
    return lo, _normalise_part(hi, mean, rstd, LO, HI, D, LAYER)


@triton.jit
def norm_statistics(
    lo, hi, eps, LO: tl.constexpr, HI: tl.constexpr, D: tl.constexpr, LAYER: tl.constexpr
):
    """mean (0 for an RMS norm) and 1 / sqrt(mean square + eps) of the rows, (ROWS, 1)."""
    mean = row_sum(lo, hi) / D if LAYER else tl.zeros((lo.shape[0], 1), tl.float32)
    lo, hi = normalise(lo, hi, mean, 1.0, LO, HI, D, LAYER)
    return mean, tl.rsqrt(row_sum(lo * lo, hi * hi) / D + eps)
