"""Triton kernels of qk_norm_rope_table: a program holds all heads of one token of q, then of k.

A head is cut where rotated channels end and, for pairs in halves, where the halves meet, so that
the channels of a pair are in one block or in two of the same width. Statistics are not stored, as
in qk_norm_rope3d, whose norm this is.
"""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._arguments import (
    COUNTS,
    contiguous,
    empty_as,
    heads_of,
    in_units,
    table_heads,
    table_of,
)
from lumina_kernels.triton._head_sums import parameter_grads, partial_sums, store_parameter_sums
from lumina_kernels.triton._launch import launch
from lumina_kernels.triton._norm import zeros_of
from lumina_kernels.triton._rotation import (
    load_halves,
    load_table,
    loop_options,
    rotate_pairs,
    split_entries,
    token_options,
)
from lumina_kernels.triton._tiles import (
    add,
    cut,
    load_token,
    split_token,
    store_token,
    zeros,
)
from lumina_kernels.triton._tune import loop_stages, tuned
from lumina_kernels.triton.qk_norm_rope3d import (
    BWD_PER_LANE,
    norm_bwd,
    norm_tile,
)

# Values of a token that a lane holds in the forward, and where pairs are in halves; with twice as
# many it spills there.
FWD_PER_LANE, HALF_PER_LANE = 80, 40


@triton.jit
def _rotate(
    tile, cos, sin, b, index, UNIT: tl.constexpr, BACKWARD: tl.constexpr, HALF: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr, W: tl.constexpr, HS: tl.constexpr, TS: tl.constexpr,
    KS: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """The tile with its first C channels rotated by the tables, see rope_table."""
    out = ()
    if HALF:
        M: tl.constexpr = C // 2
        cos_a, cos_b = load_halves(cos, b, index, UNIT, T, M, TS, HS, WS, W < C)
        sin_a, sin_b = load_halves(sin, b, index, UNIT, T, M, TS, HS, WS, W < C)
        for i in tl.static_range(len(HS)):
            seconds = ()
            for j in tl.static_range(len(WS)):
                first, second = rotate_pairs(
                    tile[i * len(KS) + j], tile[i * len(KS) + len(WS) + j],
                    cos_a[i * len(WS) + j], sin_a[i * len(WS) + j],
                    cos_b[i * len(WS) + j], sin_b[i * len(WS) + j], BACKWARD,
                )  # fmt: skip
                out = out + (first,)
                seconds = seconds + (second,)
            out = out + seconds
            for j in tl.static_range(2 * len(WS), len(KS)):
                out = out + (tile[i * len(KS) + j],)
    else:
        cos = load_table(cos, b, index, 0, UNIT, T, W, TS, HS, WS)
        sin = load_table(sin, b, index, 0, UNIT, T, W, TS, HS, WS)
        for i in tl.static_range(len(HS)):
            for j in tl.static_range(len(WS)):
                first, second = tl.split(
                    tl.reshape(tile[i * len(KS) + j], (HS[i][1], KS[j][1] // 2, 2))
                )
                cos_a, cos_b = split_entries(cos[i * len(WS) + j], W < C)
                sin_a, sin_b = split_entries(sin[i * len(WS) + j], W < C)
                first, second = rotate_pairs(first, second, cos_a, sin_a, cos_b, sin_b, BACKWARD)
                out = out + (tl.reshape(tl.join(first, second), (HS[i][1], KS[j][1])),)
            for j in tl.static_range(len(WS), len(KS)):
                out = out + (tile[i * len(KS) + j],)
    return out


@triton.jit(do_not_specialize=COUNTS)
def qk_norm_rope_table_kernel(
    q, k,  # heads: (pointer, stride of b, of l, of h), k or None
    q_parameters, k_parameters,  # (weight, bias), pointers or None
    cos, sin, q_out_ptr, k_out_ptr, eps, L,  # tables as in `load_table`
    UNIT: tl.constexpr, TABLE_UNIT: tl.constexpr, HALF: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, T: tl.constexpr,  # T heads of the tables
    K: tl.constexpr, C: tl.constexpr, W: tl.constexpr,  # C rotated channels, W entries
    HS: tl.constexpr, GS: tl.constexpr, TS: tl.constexpr, KS: tl.constexpr, WS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """x -> rotate(norm(x) * weight + bias) for q and k, the rotation as in rope_table"""
    number, b, index = split_token(tl.program_id(0), L)
    q = load_token(q, b, index, UNIT, H, K, HS, KS)
    if k is not None:
        k_tile = load_token(k, b, index, UNIT, G, K, GS, KS)
    q = norm_tile(q, q_parameters, eps, H, K, HS, KS, NORM)
    q = _rotate(q, cos, sin, b, index, TABLE_UNIT, False, HALF, T, C, W, HS, TS, KS, WS)
    store_token(q_out_ptr, q, number, H, K, HS, KS)
    if k is not None:
        k = norm_tile(k_tile, k_parameters, eps, G, K, GS, KS, NORM)
        k = _rotate(k, cos, sin, b, index, TABLE_UNIT, False, HALF, T, C, W, GS, TS, KS, WS)
        store_token(k_out_ptr, k, number, G, K, GS, KS)


@triton.jit(do_not_specialize=COUNTS)
def qk_norm_rope_table_bwd_kernel(
    dout, x, weight_ptr, table, dx_ptr, partial_ptr, eps, L, tokens, chunk,
    UNIT: tl.constexpr, TABLE_UNIT: tl.constexpr, HALF: tl.constexpr, H: tl.constexpr,
    T: tl.constexpr, K: tl.constexpr, C: tl.constexpr, W: tl.constexpr, HS: tl.constexpr,
    TS: tl.constexpr, KS: tl.constexpr, WS: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx of `chunk` tokens, and the sums of their terms in dweight and dbias. SUMS: 0 for no
    parameter, 1 for the weight alone, 2 for weight and bias. `table`: cos and sin."""
    cos, sin = table
    first = tl.program_id(0) * chunk
    dweight, dbias = zeros(HS, KS), zeros(HS, KS)
    for step in tl.range(tl.minimum(chunk, tokens - first), num_stages=STAGES):
        number, b, index = split_token(first + step, L)
        tile = load_token(x, b, index, UNIT, H, K, HS, KS)
        d = load_token(dout, b, index, UNIT, H, K, HS, KS)
        d = _rotate(d, cos, sin, b, index, TABLE_UNIT, True, HALF, T, C, W, HS, TS, KS, WS)
        dx, dw = norm_bwd(d, tile, weight_ptr, eps, H, K, HS, KS, NORM)
        store_token(dx_ptr, dx, number, H, K, HS, KS)
        if SUMS > 0:
            dweight = add(dweight, dw)
        if SUMS > 1:
            dbias = add(dbias, d)
    store_parameter_sums(partial_ptr, dweight, dbias, H, K, HS, KS, NORM, SUMS)


@cache
def _cuts(K: int, C: int, half: bool) -> tuple[tuple, tuple]:
    """Cuts of a head of K values, and those of them, or of their first half, that are rotated."""
    size = C // 2 if half else C
    part = cut(C) if C == K and not half else _powers(size)
    head = part if not half else (*part, *_shifted(part, size))
    return (*head, *_shifted(cut(K - C), C)) if C < K else head, part


def _powers(n: int) -> tuple[tuple[int, int], ...]:
    """(start, width) of powers of two that n values fill."""
    widths = [1 << bit for bit in reversed(range(n.bit_length())) if n >> bit & 1]
    return tuple([(sum(widths[:i]), width) for i, width in enumerate(widths)])


def _shifted(cuts, by: int) -> tuple[tuple[int, int], ...]:
    return tuple([(start + by, width) for start, width in cuts])


def _table_options(cos, sin, half, channels, K) -> tuple[tuple, tuple, dict, int]:
    """The tables as arguments, the constants of the rotation, and the values of tables that a
    program holds."""
    W, T = cos.shape[-1], max(table_heads(cos), table_heads(sin))
    head, entries = _cuts(K, channels, half)
    if W < channels and not half:
        entries = tuple([(start // 2, width // 2) for start, width in entries])
    (cos, sin), unit = in_units(table_of(cos), table_of(sin))
    constants = {"TABLE_UNIT": unit, "HALF": half, "T": T, "K": K, "C": channels, "W": W}
    return (
        cos,
        sin,
        constants | {"TS": cut(T), "KS": head, "WS": entries},
        2 * T * W if T > 1 else 0,
    )


def qk_norm_rope_table_fwd(
    q, k, q_weight, q_bias, k_weight, k_bias, cos, sin, pairing, channels, eps, norm
) -> tuple[Tensor, Tensor | None]:
    """q (B, L, H, K) and k (B, L, G, K) or None, normalised and rotated."""
    B, L, H, K = q.shape
    G = 0 if k is None else k.shape[2]
    q_out, k_out = empty_as(q), None if k is None else empty_as(k)
    if B * L * max(H, G) * K == 0:
        return q_out, k_out
    half = pairing == "half"
    cos, sin, constants, held = _table_options(cos, sin, half, channels, K)
    (q, k), unit = in_units(heads_of(q), heads_of(k))
    per_lane = HALF_PER_LANE if half else FWD_PER_LANE
    options = token_options(max(H, G) * K + held, per_lane)
    arguments = (
        q, k, (contiguous(q_weight), contiguous(q_bias)),
        (contiguous(k_weight), contiguous(k_bias)), cos, sin, q_out, k_out, eps, L,
    )  # fmt: skip
    launch(
        qk_norm_rope_table_kernel, B * L, arguments,
        tuned("qk_norm_rope_table_fwd", H * K, q_out, options),
        UNIT=unit, H=H, G=G, HS=cut(H), GS=cut(G or 1), NORM=norm, **constants,
    )  # fmt: skip
    return q_out, k_out


def _heads_bwd(
    dout, x, weight, bias, cos, sin, pairing, channels, eps, norm
) -> tuple[Tensor, Tensor]:
    """dx of q or of k, and `partial_sums`."""
    B, L, H, K = x.shape
    dx = empty_as(x)
    cos, sin, constants, held = _table_options(cos, sin, pairing == "half", channels, K)
    options = loop_options(H * K + held, BWD_PER_LANE, 168)
    options = tuned("qk_norm_rope_table_bwd", H * K, dx, options)
    partial, chunk, sums = partial_sums(x, weight, bias, norm, options)
    (dout, x), unit = in_units(heads_of(dout), heads_of(x))
    arguments = dout, x, contiguous(weight), (cos, sin), dx, partial, eps, L, B * L, chunk
    launch(
        qk_norm_rope_table_bwd_kernel, partial.shape[0], arguments, options,
        UNIT=unit, H=H, HS=cut(H), NORM=norm, SUMS=sums,
        STAGES=loop_stages(4 * H * K * dx.itemsize), **constants,
    )  # fmt: skip
    return dx, partial


def qk_norm_rope_table_bwd(
    dq_out, dk_out, q, k, q_weight, q_bias, k_weight, k_bias, cos, sin, pairing, channels, eps, norm
) -> tuple[Tensor | None, ...]:
    """dq, dk, and the gradients of the four parameters, None for None."""
    (B, L, H, K), G = q.shape, 0 if k is None else k.shape[2]
    parameters = q_weight, q_bias, k_weight, k_bias
    if B * L * max(H, G) * K == 0:
        empties = (None if x is None else empty_as(x) for x in (q, k))
        return *empties, *zeros_of(*parameters)
    table = cos, sin, pairing, channels, eps, norm
    dq, q_partial = _heads_bwd(dq_out, q, q_weight, q_bias, *table)
    dk, k_partial = None, None
    if k is not None:
        dk, k_partial = _heads_bwd(dk_out, k, k_weight, k_bias, *table)
    return dq, dk, *parameter_grads(q_partial, k_partial, parameters, H, G, K, norm)
