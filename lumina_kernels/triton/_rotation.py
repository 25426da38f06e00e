"""Rotations of heads by angles or tables, and how the kernels that hold whole tokens are launched.

A program holds all H heads of K values of a token as a tile. Cosines and sines differ between
tokens but not between heads, so they are computed once per token.
"""

from functools import cache

import triton
import triton.language as tl

from lumina_kernels.triton._tiles import blocks, load_tile, load_vector, to_float32


@cache
def token_options(values: int, per_lane: int) -> dict:
    """Launch options for tokens of this many values, at most `per_lane` per lane."""
    num_warps = min(16, 1 << (blocks(values, 32 * per_lane) - 1).bit_length())
    return {"num_warps": num_warps, "enable_fp_fusion": True}


@cache
def loop_options(values: int, per_lane: int, most_registers: int = 255) -> dict:
    """The same for a kernel that carries sums through a loop. Without maxnreg ptxas spills one or
    two registers, for some K and GPUs, to fit one more program on a processor."""
    options = token_options(values, per_lane)
    return options | {"maxnreg": min(most_registers, 65536 // (32 * options["num_warps"]))}


@triton.jit
def sincos(x):
    """sin(x) and cos(x), within 1.1 ulp of 1 for |x| < 1.6e6, bounded beyond; NaN for inf and NaN.

    libdevice's versions go through memory for large x. Here x = n * pi/2 + r, with pi/2 = c1 + c2 +
    c3. As c1 and c2 have 14 bits and n is split into a multiple of 1024 and the rest, their
    products are exact, with or without fused multiply-adds. Adding 1.5 * 2^23 rounds to an integer.
    """
    shifted = x * 0.6366197723675814 + 12582912.0
    n = shifted - 12582912.0
    coarse = (n + 12884901888.0) - 12884901888.0
    fine = n - coarse
    r = x - coarse * 1.5706787109375
    r = r - fine * 1.5706787109375
    r = r - coarse * 0.00011761486530303955
    r = r - fine * 0.00011761486530303955
    r = r - n * 9.92093629470503e-10
    r = tl.minimum(tl.maximum(r, -1.0, tl.PropagateNan.ALL), 1.0, tl.PropagateNan.ALL)
    u = r * r
    odd = (-0.00019514957966748625 * u + 0.00833215843886137) * u - 0.16666655242443085
    odd = r + r * u * odd
    even = (2.4432785721728578e-05 * u - 0.0013887312961742282) * u + 0.04166664555668831
    even = 1.0 + u * (u * even - 0.5)
    quadrant = shifted.to(tl.int32, bitcast=True)
    sin = tl.where(quadrant & 1 == 0, odd, even)
    cos = tl.where(quadrant & 1 == 0, even, odd)
    return tl.where(quadrant & 2 == 0, sin, -sin), tl.where(quadrant + 1 & 2 == 0, cos, -cos)


@triton.jit
def cos_sin_of(
    positions, inv_freq, axis_ptr, b, index, SIGN: tl.constexpr, K: tl.constexpr, KS: tl.constexpr
):
    """(cos, sin) of SIGN * position[axis[j]] * inv_freq[j] for the pairs j of a cut, one per cut.

    positions: (pointer, stride of b, of l, of the column); inv_freq: (pointer, stride of b). NaN
    where the axis is not 0, 1 or 2.
    """
    position_ptr, position_b, position_l, position_c = positions
    position_ptr += b * position_b + index * position_l
    t = tl.load(position_ptr).to(tl.float32)
    position_ptr += position_c
    h = tl.load(position_ptr).to(tl.float32)
    w = tl.load(position_ptr + position_c).to(tl.float32)
    freq_ptr, freq_b = inv_freq
    freq_ptr += b * freq_b
    cos_sin = ()
    for j in tl.static_range(len(KS)):
        pair = KS[j][0] // 2 + tl.arange(0, KS[j][1] // 2)
        axis = tl.load(axis_ptr + pair, mask=pair < K // 2, other=0)
        freq = tl.load(freq_ptr + pair, mask=pair < K // 2, other=0.0).to(tl.float32)
        position = tl.where(axis == 1, h, tl.where(axis == 2, w, float("nan")))
        sin, cos = sincos(tl.where(axis == 0, t, position) * freq)
        cos_sin = cos_sin + ((cos[None, :], SIGN * sin[None, :]),)
    return cos_sin


@triton.jit
def rotate(tile, cos_sin, HS: tl.constexpr, KS: tl.constexpr):
    """Every pair of channels (a, b) becomes (a cos - b sin, a sin + b cos)."""
    out = ()
    for i in tl.static_range(len(HS)):
        for j in tl.static_range(len(KS)):
            cos, sin = cos_sin[j]
            a, b = tl.split(tl.reshape(tile[i * len(KS) + j], (HS[i][1], KS[j][1] // 2, 2)))
            pairs = tl.join(a * cos - b * sin, a * sin + b * cos)
            out = out + (tl.reshape(pairs, (HS[i][1], KS[j][1])),)
    return out


@triton.jit
def load_table(
    table, b, index, first, UNIT: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
    TS: tl.constexpr, HS: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    """Entries `first` to `first` + N of a token's table as a tile in float32: rows for its T heads,
    or one row for every band of HS if T is 1."""
    ptr = table[0] + (b * table[1] + index * table[2]) * UNIT
    if T == 1 and len(table) == 4:
        tile = load_vector(ptr + first, N, NS)
    else:
        tile = ()
        for i in tl.static_range(len(TS)):
            h = TS[i][0] + tl.arange(0, TS[i][1])[:, None]
            rows = ptr + h.to(tl.int64) * table[3] * UNIT
            if len(table) == 4:
                tile = tile + load_tile(rows, first, h < T, N, NS)
            else:
                for j in tl.static_range(len(NS)):
                    n = NS[j][0] + tl.arange(0, NS[j][1])[None, :]
                    ptrs = rows + (first + n).to(tl.int64) * table[4]
                    tile = tile + (tl.load(ptrs, mask=(h < T) & (n < N), other=0.0),)
        tile = to_float32(tile)
    if T == 1:
        row = tile
        for _ in tl.static_range(1, len(HS)):
            tile = tile + row
    return tile


@triton.jit
def load_halves(
    table, b, index, UNIT: tl.constexpr, T: tl.constexpr, M: tl.constexpr, TS: tl.constexpr,
    HS: tl.constexpr, WS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The entries of channels j and of channels j + M; PAIRS: these share them."""
    first = load_table(table, b, index, 0, UNIT, T, M, TS, HS, WS)
    second = first if PAIRS else load_table(table, b, index, M, UNIT, T, M, TS, HS, WS)
    return first, second


@triton.jit
def rotate_pairs(a, b, cos_a, sin_a, cos_b, sin_b, BACKWARD: tl.constexpr):
    """(a cos_a - b sin_a, b cos_b + a sin_b); BACKWARD: with (sin_a, sin_b) -> (-sin_b, -sin_a)."""
    if BACKWARD:
        first, second = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    return first, second


@triton.jit
def split_entries(entries, PAIRS: tl.constexpr):
    """The entries of the first and of the second channels; PAIRS: these share them."""
    if PAIRS:
        a, b = entries, entries
    else:
        a, b = tl.split(tl.reshape(entries, (entries.shape[0], entries.shape[1] // 2, 2)))
    return a, b
