"""Triton kernel of rope_table: a program rotates all heads of one token of q and k.

The gradients of q and k are the same sums with the two sines exchanged and negated. The kernel
does not differentiate the tables; the op refuses those that ask for a gradient.
"""

import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._arguments import (
    COUNTS,
    empty_as,
    heads_of,
    in_units,
    table_heads,
    table_of,
)
from lumina_kernels.triton._launch import launch
from lumina_kernels.triton._rotation import (
    load_halves,
    load_table,
    rotate_pairs,
    split_entries,
    token_options,
)
from lumina_kernels.triton._tiles import cut, load_heads, split_token, store_heads
from lumina_kernels.triton._tune import tuned


@triton.jit
def _rotate_interleaved(
    x_ptr, stride, cos, sin, out_ptr, b, index, TABLE_UNIT: tl.constexpr, BACKWARD: tl.constexpr,
    H: tl.constexpr, T: tl.constexpr, K: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    HS: tl.constexpr, TS: tl.constexpr, CS: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """Pairs (2j, 2j + 1): a block is read as it lies in memory and split in registers."""
    x = load_heads(x_ptr, stride, H, C, HS, CS)
    cos = load_table(cos, b, index, 0, TABLE_UNIT, T, W, TS, HS, WS)
    sin = load_table(sin, b, index, 0, TABLE_UNIT, T, W, TS, HS, WS)
    out = ()
    for i in tl.static_range(len(HS)):
        for j in tl.static_range(len(CS)):
            first, second = tl.split(tl.reshape(x[i * len(CS) + j], (HS[i][1], CS[j][1] // 2, 2)))
            cos_a, cos_b = split_entries(cos[i * len(CS) + j], W < C)
            sin_a, sin_b = split_entries(sin[i * len(CS) + j], W < C)
            first, second = rotate_pairs(first, second, cos_a, sin_a, cos_b, sin_b, BACKWARD)
            out = out + (tl.reshape(tl.join(first, second), (HS[i][1], CS[j][1])),)
    store_heads(out_ptr, out, K, H, C, HS, CS)


@triton.jit
def _rotate_halves(
    x_ptr, stride, cos, sin, out_ptr, b, index, TABLE_UNIT: tl.constexpr, BACKWARD: tl.constexpr,
    H: tl.constexpr, T: tl.constexpr, K: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    HS: tl.constexpr, TS: tl.constexpr, CS: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """Pairs (j, j + C/2): the two halves of the heads are two tiles."""
    M: tl.constexpr = C // 2
    x_a, x_b = load_heads(x_ptr, stride, H, M, HS, CS), load_heads(x_ptr + M, stride, H, M, HS, CS)
    cos_a, cos_b = load_halves(cos, b, index, TABLE_UNIT, T, M, TS, HS, WS, W < C)
    sin_a, sin_b = load_halves(sin, b, index, TABLE_UNIT, T, M, TS, HS, WS, W < C)
    out_a = ()
    out_b = ()
    for n in tl.static_range(len(HS) * len(CS)):
        first, second = rotate_pairs(
            x_a[n], x_b[n], cos_a[n], sin_a[n], cos_b[n], sin_b[n], BACKWARD
        )
        out_a = out_a + (first,)
        out_b = out_b + (second,)
    store_heads(out_ptr, out_a, K, H, M, HS, CS)
    store_heads(out_ptr + M, out_b, K, H, M, HS, CS)


@triton.jit
def _rotate_token(
    x, cos, sin, out_ptr, number, b, index, UNIT: tl.constexpr, TABLE_UNIT: tl.constexpr,
    BACKWARD: tl.constexpr, HALF: tl.constexpr, H: tl.constexpr, T: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, W: tl.constexpr, HS: tl.constexpr, TS: tl.constexpr,
    CS: tl.constexpr, WS: tl.constexpr, RS: tl.constexpr,
):  # fmt: skip
    ptr, stride_b, stride_l, stride_h = x
    ptr += (b * stride_b + index * stride_l) * UNIT
    out_ptr += number * (H * K)
    if HALF:
        _rotate_halves(
            ptr, stride_h * UNIT, cos, sin, out_ptr, b, index, TABLE_UNIT, BACKWARD,
            H, T, K, C, W, HS, TS, CS, WS,
        )  # fmt: skip
    else:
        _rotate_interleaved(
            ptr, stride_h * UNIT, cos, sin, out_ptr, b, index, TABLE_UNIT, BACKWARD,
            H, T, K, C, W, HS, TS, CS, WS,
        )  # fmt: skip
    if C < K:
        rest = load_heads(ptr + C, stride_h * UNIT, H, K - C, HS, RS)
        store_heads(out_ptr + C, rest, K, H, K - C, HS, RS)


@triton.jit(do_not_specialize=COUNTS)
def rope_table_kernel(
    q, k,  # heads: (pointer, stride of b, of l, of h), k or None
    cos, sin,  # the same, and where entries have gaps the stride of these, not in units
    q_out_ptr, k_out_ptr, L,
    UNIT: tl.constexpr, TABLE_UNIT: tl.constexpr, BACKWARD: tl.constexpr, HALF: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, T: tl.constexpr,  # T heads of the tables
    K: tl.constexpr, C: tl.constexpr, W: tl.constexpr,  # C rotated channels, W entries
    HS: tl.constexpr, GS: tl.constexpr, TS: tl.constexpr,
    CS: tl.constexpr, WS: tl.constexpr, RS: tl.constexpr,  # RS cuts the K - C other channels
):  # fmt: skip
    """x -> x * cos + rot(x) * sin for q and k; BACKWARD: from the gradient of that, x's gradient"""
    number, b, index = split_token(tl.program_id(0), L)
    _rotate_token(
        q, cos, sin, q_out_ptr, number, b, index, UNIT, TABLE_UNIT, BACKWARD, HALF,
        H, T, K, C, W, HS, TS, CS, WS, RS,
    )  # fmt: skip
    if k is not None:
        _rotate_token(
            k, cos, sin, k_out_ptr, number, b, index, UNIT, TABLE_UNIT, BACKWARD, HALF,
            G, T, K, C, W, GS, TS, CS, WS, RS,
        )  # fmt: skip


def rope_table_fwd(
    q, k, cos, sin, pairing, channels, backward: bool = False
) -> tuple[Tensor, Tensor | None]:
    """q (B, L, H, K) and k (B, L, G, K) or None, rotated; `backward`: the gradients of q and k."""
    B, L, H, K = q.shape
    G = 1 if k is None else k.shape[2]
    q_out, k_out = empty_as(q), None if k is None else empty_as(k)
    if q.numel() == 0:
        return q_out, k_out
    half, W, T = pairing == "half", cos.shape[-1], max(table_heads(cos), table_heads(sin))
    cuts = entry_cuts = cut(channels // 2 if half else channels)
    if W < channels and not half:
        entry_cuts = tuple([(start // 2, width // 2) for start, width in cuts])
    rest = cut(K - channels) if channels < K else None
    values = max(H, G) * K + (T * 2 * W if T > 1 else 0)  # tables for each head are tiles too
    (q, k), unit = in_units(heads_of(q), heads_of(k))
    (cos, sin), table_unit = in_units(table_of(cos), table_of(sin))
    launch(
        rope_table_kernel, B * L, (q, k, cos, sin, q_out, k_out, L),
        tuned("rope_table", values, q_out, token_options(values, 80)),
        UNIT=unit, TABLE_UNIT=table_unit, BACKWARD=backward, HALF=half, H=H, G=G, T=T, K=K,
        C=channels, W=W, HS=cut(H), GS=cut(G), TS=cut(T), CS=cuts, WS=entry_cuts, RS=rest,
    )  # fmt: skip
    return q_out, k_out


def rope_table_bwd(dq_out, dk_out, cos, sin, pairing, channels) -> tuple[Tensor, Tensor | None]:
    """dq and dk, None for None."""
    return rope_table_fwd(dq_out, dk_out, cos, sin, pairing, channels, backward=True)
