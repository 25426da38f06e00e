"""What the kernels that rotate heads share.

A program holds whole tokens: the H heads of K values of one are cut into tiles whose sides are
powers of two, as Triton asks for (72 is 64 + 8, 24 heads are 16 + 8), and padded where that costs
next to nothing. HS and KS are the cuts, tuples of (start, width); a row is the tuple of its tiles
in float32, head cuts outside, and stays in registers. What differs between tokens but not between
heads, the cosines and sines, is computed once per token.
"""

import math
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._tiles import blocks


@cache
def cut(n: int) -> tuple[tuple[int, int], ...]:
    """(start, width) of the fewest powers of two that hold n values with at most n/10 idle."""
    parts, start = (), 0
    while True:
        padded = 1 << (n - start - 1).bit_length()
        if (start + padded) * 10 <= n * 11:
            return (*parts, (start, padded))
        width = 1 << (n - start).bit_length() - 1
        parts, start = (*parts, (start, width)), start + width


def heads_of(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """A (B, L, H, K) tensor with no gaps within its heads, and its steps in b, l and h."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    (B, L, H, _), (step_b, step_l, step_h, _) = x.shape, x.stride()
    return x, (step_b if B > 1 else 0, step_l if L > 1 else 0, step_h if H > 1 else 0)


def in_units(*steps: int) -> tuple[int, tuple[int, ...]]:
    """A common divisor of the steps, at most 16, and the quotients. Triton knows of an argument
    whether 16 divides it, and nothing of 72; 16-byte loads need the 8 in it."""
    unit = math.gcd(16, *steps)
    return unit, tuple(step // unit for step in steps)


def positions_of(positions: Tensor) -> tuple[Tensor, int, int, int]:
    """Positions, (L, 3) or (B, L, 3), and their steps in b, l and column."""
    return positions, 0 if positions.ndim == 2 else positions.stride(0), *positions.stride()[-2:]


def frequencies_of(inv_freq: Tensor) -> tuple[Tensor, int]:
    """Frequencies, (K/2,) or (B, K/2), without gaps, and their step in b."""
    inv_freq = inv_freq.contiguous()
    return inv_freq, 0 if inv_freq.ndim == 1 else inv_freq.stride(0)


@cache
def launch(values: int, per_lane: int) -> dict:
    """Options of a launch: warps for a row of so many values, at most `per_lane` of them a lane."""
    num_warps = min(16, 1 << (blocks(values, 32 * per_lane) - 1).bit_length())
    return {"num_warps": num_warps, "enable_fp_fusion": True}


@cache
def launch_loop(values: int, per_lane: int) -> dict:
    """The same for a kernel that carries sums through a loop, with all registers there are: left
    alone, ptxas spills one or two of them, for some K and GPUs, to fit one more program."""
    options = launch(values, per_lane)
    return options | {"maxnreg": min(255, 65536 // (32 * options["num_warps"]))}


@triton.jit
def token_of(number, L):
    """A token's number, its sample, and its number in the sample, int64."""
    b = number // L
    return number.to(tl.int64), b.to(tl.int64), (number - b * L).to(tl.int64)


@triton.jit
def program_token(L):
    """The token of this program, as `token_of` gives it."""
    return token_of(tl.program_id(0), L)


@triton.jit
def sincos(x):
    """sin(x) and cos(x), within 1.1 ulp of 1 for |x| < 1.6e6, bounded beyond; nan for inf, nan.

    libdevice's go through memory for large x. Here x = n * pi/2 + r with pi/2 = c1 + c2 + c3: c1
    and c2 have 14 bits, n is split into a multiple of 1024 and the rest, so all products with them
    are exact, with fused multiply-adds and without. Adding 1.5 * 2^23 rounds to whole numbers.
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
def turns_of(
    position_ptr, step, freq_ptr, axis_ptr, SIGN: tl.constexpr, K: tl.constexpr, KS: tl.constexpr
):
    """(cos, sin) of SIGN * position[axis[j]] * inv_freq[j] for the pairs of each cut of K, (1, .).

    nan where axis is not 0, 1 or 2.
    """
    t = tl.load(position_ptr).to(tl.float32)
    h = tl.load(position_ptr + step).to(tl.float32)
    w = tl.load(position_ptr + 2 * step).to(tl.float32)
    turns = ()
    for j in tl.static_range(len(KS)):
        pair = KS[j][0] // 2 + tl.arange(0, KS[j][1] // 2)
        axis = tl.load(axis_ptr + pair, mask=pair < K // 2, other=0)
        freq = tl.load(freq_ptr + pair, mask=pair < K // 2, other=0.0).to(tl.float32)
        position = tl.where(axis == 1, h, tl.where(axis == 2, w, float("nan")))
        sin, cos = sincos(tl.where(axis == 0, t, position) * freq)
        turns = turns + ((cos[None, :], SIGN * sin[None, :]),)
    return turns


@triton.jit
def turn(row, turns, HS: tl.constexpr, KS: tl.constexpr):
    """Every pair (a, b) of the row becomes (a cos - b sin, a sin + b cos)."""
    out = ()
    for i in tl.static_range(len(HS)):
        for j in tl.static_range(len(KS)):
            cos, sin = turns[j]
            a, b = tl.split(tl.reshape(row[i * len(KS) + j], (HS[i][1], KS[j][1] // 2, 2)))
            pairs = tl.join(a * cos - b * sin, a * sin + b * cos)
            out = out + (tl.reshape(pairs, (HS[i][1], KS[j][1])),)
    return out


@triton.jit
def place(
    H0: tl.constexpr, HN: tl.constexpr, K0: tl.constexpr, KN: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Heads and channels of a tile, and which of its values there are."""
    h = H0 + tl.arange(0, HN)[:, None]
    c = K0 + tl.arange(0, KN)[None, :]
    if H0 + HN > H or K0 + KN > K:
        there = (h < H) & (c < K)
    else:
        there = tl.full((HN, KN), True, tl.int1)
    return h, c, there


@triton.jit
def load_row(
    ptr, step, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr, keep=None
):
    """The row at `ptr`, its heads `step` apart; zeros in the padding, all where not `keep`."""
    row = ()
    for i in tl.static_range(len(HS)):
        for j in tl.static_range(len(KS)):
            h, c, there = place(HS[i][0], HS[i][1], KS[j][0], KS[j][1], H, K)
            if keep is not None:
                there = there & (h < tl.where(keep, H, 0))  # & keep fails in the interpreter
            value = tl.load(ptr + h * step + c, mask=there, other=0.0)
            row = row + (value.to(tl.float32),)
    return row


@triton.jit
def store_row(ptr, row, step, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr):
    """The row to `ptr`, its heads `step` apart, rounded to the dtype there."""
    for i in tl.static_range(len(HS)):
        for j in tl.static_range(len(KS)):
            h, c, there = place(HS[i][0], HS[i][1], KS[j][0], KS[j][1], H, K)
            value = row[i * len(KS) + j].to(ptr.dtype.element_ty)
            tl.store(ptr + h * step + c, value, mask=there)


@triton.jit
def zeros(HS: tl.constexpr, KS: tl.constexpr):
    """A row of zeros."""
    row = ()
    for i in tl.static_range(len(HS)):
        for j in tl.static_range(len(KS)):
            row = row + (tl.full((HS[i][1], KS[j][1]), 0.0, tl.float32),)
    return row


@triton.jit
def product(a, b):
    """a * b, tile by tile."""
    out = ()
    for n in tl.static_range(len(a)):
        out = out + (a[n] * b[n],)
    return out


@triton.jit
def add(a, b):
    """a + b, tile by tile."""
    out = ()
    for n in tl.static_range(len(a)):
        out = out + (a[n] + b[n],)
    return out


@triton.jit
def scale(row, factor):
    """row * factor, a scalar."""
    out = ()
    for n in tl.static_range(len(row)):
        out = out + (row[n] * factor,)
    return out


@triton.jit
def keep_row(row, keep):
    """The row, or zeros where not `keep`: a selection, since what is masked may be nan."""
    out = ()
    for n in tl.static_range(len(row)):
        out = out + (row[n] if keep is None else tl.where(keep, row[n], 0.0),)
    return out


@triton.jit
def kept(mask_ptr, step_b, step, b, at):
    """Whether token `at` of sample b counts."""
    return tl.load(mask_ptr + b * step_b + at * step) != 0
