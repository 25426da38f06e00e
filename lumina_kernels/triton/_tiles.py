"""Tiles: two-dimensional values of any size, held in registers as a tuple of Triton blocks.

A Triton block has sides that are powers of two. Rounding 72 columns up to 128, or 2304 up to 4096,
would idle 44 % of the lanes, so a tile cuts its sides: 72 columns are a block of 64 and one of 8.
The cuts of a side are a constexpr tuple of (start, width), named after the side: DS cuts D, KS cuts
K, HS and GS cut the heads H and G. The blocks of a tile are listed one band of rows after another.
A last block may overhang its side; that padding is loaded as zeros and never stored.

Tensors with strides come as tuples, (pointer, stride of b, of l, ...); see `_arguments`.
"""

from functools import cache

import triton
import triton.language as tl


@cache
def cut(n: int) -> tuple[tuple[int, int], ...]:
    """(start, width) of the fewest powers of two that hold n values with at most n/10 idle."""
    cuts, start = (), 0
    while True:
        padded = 1 << (n - start - 1).bit_length()
        if (start + padded) * 10 <= n * 11:
            return (*cuts, (start, padded))
        width = 1 << (n - start).bit_length() - 1
        cuts, start = (*cuts, (start, width)), start + width


def blocks(count: int, size: int) -> int:
    """Number of blocks of `size` that hold `count`; triton.cdiv takes the host 2 us."""
    return -(-count // size)


# Which part of the work is this program's.


@triton.jit
def ceil_div(n, size):
    """n / size rounded up, n > 0. tl.cdiv adds before it divides, and n may be close to 2^31."""
    return (n - 1) // size + 1


@triton.jit
def program_chunk(L, chunk):
    """This program's sample, and the first of its `chunk` rows (or values) there."""
    chunks = ceil_div(L, chunk)
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    return b, (program - b * chunks) * chunk


@triton.jit
def program_rows(L, ROWS: tl.constexpr):
    """This program's sample, and its rows there, (ROWS, 1)."""
    b, first = program_chunk(L, ROWS)
    return b, first + tl.arange(0, ROWS)[:, None]


@triton.jit
def split_token(number, L):
    """Of a token numbered through all samples: that number, its sample, and its number there, as
    int64."""
    b = number // L
    return number.to(tl.int64), b.to(tl.int64), (number - b * L).to(tl.int64)


# Loads and stores.


@triton.jit
def _mask_columns(mask, columns, N):
    """`mask` of rows, None for all of them, without the columns from N on."""
    if mask is None:
        return columns < N
    else:
        return mask & (columns < N)


@triton.jit
def load_tile(ptr, rows, mask, N: tl.constexpr, NS: tl.constexpr):
    """One band of rows of N values, in their own dtype; zeros for rows outside `mask`, (M, 1), None
    for all. They start at `ptr + rows`, both (M, 1) or one for all. The columns are added to `rows`
    first, so that int32 offsets take no 64-bit registers where many tiles share them."""
    tile = ()
    for j in tl.static_range(len(NS)):
        columns = NS[j][0] + tl.arange(0, NS[j][1])[None, :]
        ptrs = ptr + (rows + columns)
        if NS[j][0] + NS[j][1] > N:
            tile = tile + (tl.load(ptrs, mask=_mask_columns(mask, columns, N), other=0.0),)
        elif mask is None:
            tile = tile + (tl.load(ptrs),)
        else:
            tile = tile + (tl.load(ptrs, mask=mask, other=0.0),)
    return tile


@triton.jit
def store_tile(ptr, tile, rows, mask, N: tl.constexpr, NS: tl.constexpr):
    """The reverse of `load_tile`, rounded to the dtype of `ptr`."""
    for j in tl.static_range(len(NS)):
        columns = NS[j][0] + tl.arange(0, NS[j][1])[None, :]
        block = tile[j].to(ptr.dtype.element_ty)
        ptrs = ptr + (rows + columns)
        if NS[j][0] + NS[j][1] > N:
            tl.store(ptrs, block, mask=_mask_columns(mask, columns, N))
        else:
            tl.store(ptrs, block, mask=mask)


@triton.jit
def load_vector(ptr, N: tl.constexpr, NS: tl.constexpr):
    """N values in float32, as one row."""
    return to_float32(load_tile(ptr, 0, None, N, NS))


@triton.jit
def load_rows(x, b, rows, L, D: tl.constexpr, DS: tl.constexpr):
    """Rows of a (B, L, D) tensor in float32, zeros from L on. A (B, D) tensor has no stride
    of l and gives the one row of the sample."""
    ptr = x[0] + b * x[1]
    if len(x) == 2:
        return load_vector(ptr, D, DS)
    else:
        return to_float32(load_tile(ptr + rows * x[2], 0, rows < L, D, DS))


@triton.jit
def store_rows(ptr, tile, b, rows, L, D: tl.constexpr, DS: tl.constexpr):
    """Rows of a contiguous (B, L, D) tensor."""
    store_tile(ptr + b * L * D + rows * D, tile, 0, rows < L, D, DS)


@triton.jit
def load_row_values(ptr, b, rows, L):
    """One value per row, of a contiguous (B, L) tensor."""
    return tl.load(ptr + b * L + rows, mask=rows < L, other=0.0)


@triton.jit
def store_row_values(ptr, values, b, rows, L):
    """The reverse of `load_row_values`."""
    tl.store(ptr + b * L + rows, values, mask=rows < L)


@triton.jit
def load_heads(
    ptr, stride, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr, valid=None
):
    """H rows of K values, `stride` apart, in float32; zeros where not `valid`."""
    tile = ()
    for i in tl.static_range(len(HS)):
        h = HS[i][0] + tl.arange(0, HS[i][1])[:, None]
        if valid is not None:
            mask = h < tl.where(valid, H, 0)  # `& valid` fails in the interpreter
            tile = tile + load_tile(ptr + h * stride, 0, mask, K, KS)
        elif HS[i][0] + HS[i][1] > H:
            tile = tile + load_tile(ptr + h * stride, 0, h < H, K, KS)
        else:
            tile = tile + load_tile(ptr + h * stride, 0, None, K, KS)
    return to_float32(tile)


@triton.jit
def store_heads(
    ptr, tile, stride, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr
):
    """The reverse of `load_heads`."""
    for i in tl.static_range(len(HS)):
        h = HS[i][0] + tl.arange(0, HS[i][1])[:, None]
        if HS[i][0] + HS[i][1] > H:
            store_tile(ptr + h * stride, band(tile, i, KS), 0, h < H, K, KS)
        else:
            store_tile(ptr + h * stride, band(tile, i, KS), 0, None, K, KS)


@triton.jit
def load_token(
    x, b, index, UNIT: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    HS: tl.constexpr, KS: tl.constexpr, valid=None,
):  # fmt: skip
    """All heads of one token of a (B, L, H, K) tensor, whose strides come in units of UNIT."""
    ptr, stride_b, stride_l, stride_h = x
    ptr += (b * stride_b + index * stride_l) * UNIT
    return load_heads(ptr, stride_h * UNIT, H, K, HS, KS, valid)


@triton.jit
def store_token(
    ptr, tile, number, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr
):
    """All heads of one token of a contiguous tensor."""
    store_heads(ptr + number * (H * K), tile, K, H, K, HS, KS)


@triton.jit
def load_valid(mask, b, index):
    """Whether token `index` of sample b is valid."""
    ptr, stride_b, stride_l = mask
    return tl.load(ptr + b * stride_b + index * stride_l) != 0


# Arithmetic, block by block.


@triton.jit
def zeros(HS: tl.constexpr, KS: tl.constexpr):
    """A tile of float32 zeros."""
    tile = ()
    for i in tl.static_range(len(HS)):
        for j in tl.static_range(len(KS)):
            tile = tile + (tl.full((HS[i][1], KS[j][1]), 0.0, tl.float32),)
    return tile


@triton.jit
def zero_row(DS: tl.constexpr):
    """One row of float32 zeros."""
    return zeros(((0, 1),), DS)


@triton.jit
def band(tile, i: tl.constexpr, KS: tl.constexpr):
    """The blocks of band i of rows."""
    blocks = ()
    for j in tl.static_range(len(KS)):
        blocks = blocks + (tile[i * len(KS) + j],)
    return blocks


@triton.jit
def to_float32(tile):
    """The tile in float32."""
    out = ()
    for n in tl.static_range(len(tile)):
        out = out + (tile[n].to(tl.float32),)
    return out


@triton.jit
def add(a, b):
    """a + b"""
    out = ()
    for n in tl.static_range(len(a)):
        out = out + (a[n] + b[n],)
    return out


@triton.jit
def subtract(a, b):
    """a - b"""
    out = ()
    for n in tl.static_range(len(a)):
        out = out + (a[n] - b[n],)
    return out


@triton.jit
def multiply(a, b):
    """a * b"""
    out = ()
    for n in tl.static_range(len(a)):
        out = out + (a[n] * b[n],)
    return out


@triton.jit
def shift_by(tile, value):
    """tile + value, a number or (M, 1)."""
    out = ()
    for n in tl.static_range(len(tile)):
        out = out + (tile[n] + value,)
    return out


@triton.jit
def scale_by(tile, factor):
    """tile * factor, a number or (M, 1)."""
    out = ()
    for n in tl.static_range(len(tile)):
        out = out + (tile[n] * factor,)
    return out


@triton.jit
def negate(tile):
    """-tile"""
    out = ()
    for n in tl.static_range(len(tile)):
        out = out + (-tile[n],)
    return out


@triton.jit
def select(tile, valid):
    """The tile where `valid`, a number or (M, 1), else zeros; all of it for None. A selection, as
    what is not valid may be NaN."""
    out = ()
    for n in tl.static_range(len(tile)):
        if valid is None:
            out = out + (tile[n],)
        else:
            out = out + (tl.where(valid, tile[n], 0.0),)
    return out


@triton.jit
def clear_padding(
    tile, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr
):  # fmt: skip
    """The tile with zeros from row H and from column K on."""
    out = ()
    for i in tl.static_range(len(HS)):
        for j in tl.static_range(len(KS)):
            block = tile[i * len(KS) + j]
            if HS[i][0] + HS[i][1] > H:
                block = tl.where(HS[i][0] + tl.arange(0, HS[i][1])[:, None] < H, block, 0.0)
            if KS[j][0] + KS[j][1] > K:
                block = tl.where(KS[j][0] + tl.arange(0, KS[j][1])[None, :] < K, block, 0.0)
            out = out + (block,)
    return out


@triton.jit
def sum_columns(tile):
    """The sum of each row of one band, (M,)."""
    total = tl.sum(tile[0], 1)
    for j in tl.static_range(1, len(tile)):
        total += tl.sum(tile[j], 1)
    return total


@triton.jit
def dot_rows(a, b):
    """a bᵀ of two bands, (rows of a, rows of b). ieee: float32 is not cut to tf32."""
    out = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for j in tl.static_range(1, len(a)):
        out = tl.dot(a[j], tl.trans(b[j]), out, input_precision="ieee")
    return out


@triton.jit
def add_dot(acc, p, b):
    """acc + p b, p a block that is rounded to the dtype of the band b."""
    p = p.to(b[0].dtype)
    out = ()
    for j in tl.static_range(len(b)):
        out = out + (tl.dot(p, b[j], acc[j], input_precision="ieee"),)
    return out
