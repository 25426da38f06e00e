"""Triton kernel of rope_table: a program turns all heads of one token of q and k.

The gradients of q and k are the same sums with the two sines exchanged and negated. The kernel
does not differentiate the tables; the op refuses those that ask for a gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._rotation import (
    cut,
    heads_of,
    in_units,
    launch,
    load_row,
    program_token,
    store_row,
)


@triton.jit
def _turn_pairs(a, b, cos_a, sin_a, cos_b, sin_b, BACK: tl.constexpr):
    """(a cos_a - b sin_a, b cos_b + a sin_b), or with (sin_a, sin_b) -> (-sin_b, -sin_a)."""
    if BACK:
        first, second = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    return first, second


@triton.jit
def _interleaved(
    x_ptr, step, cos_ptr, sin_ptr, out_ptr, BACK: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    HS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """Pairs (2j, 2j + 1): a tile is split in registers, so that it is read as it lies."""
    x = load_row(x_ptr, step, H, K, HS, KS)
    cos, sin = load_row(cos_ptr, 0, 1, K, ((0, 1),), KS), load_row(sin_ptr, 0, 1, K, ((0, 1),), KS)
    out = ()
    for i in tl.static_range(len(HS)):
        for j in tl.static_range(len(KS)):
            a, b = tl.split(tl.reshape(x[i * len(KS) + j], (HS[i][1], KS[j][1] // 2, 2)))
            cos_a, cos_b = tl.split(tl.reshape(cos[j], (1, KS[j][1] // 2, 2)))
            sin_a, sin_b = tl.split(tl.reshape(sin[j], (1, KS[j][1] // 2, 2)))
            a, b = _turn_pairs(a, b, cos_a, sin_a, cos_b, sin_b, BACK)
            out = out + (tl.reshape(tl.join(a, b), (HS[i][1], KS[j][1])),)
    store_row(out_ptr, out, K, H, K, HS, KS)


@triton.jit
def _half(
    x_ptr, step, cos_ptr, sin_ptr, out_ptr, BACK: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    HS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """Pairs (j, j + K/2): the two halves of the heads are two rows."""
    M: tl.constexpr = K // 2
    a, b = load_row(x_ptr, step, H, M, HS, KS), load_row(x_ptr + M, step, H, M, HS, KS)
    cos_a = load_row(cos_ptr, 0, 1, M, ((0, 1),), KS)
    cos_b = load_row(cos_ptr + M, 0, 1, M, ((0, 1),), KS)
    sin_a = load_row(sin_ptr, 0, 1, M, ((0, 1),), KS)
    sin_b = load_row(sin_ptr + M, 0, 1, M, ((0, 1),), KS)
    out_a = ()
    out_b = ()
    for i in tl.static_range(len(HS)):
        for j in tl.static_range(len(KS)):
            first, second = a[i * len(KS) + j], b[i * len(KS) + j]
            first, second = _turn_pairs(first, second, cos_a[j], sin_a[j], cos_b[j], sin_b[j], BACK)
            out_a = out_a + (first,)
            out_b = out_b + (second,)
    store_row(out_ptr, out_a, K, H, M, HS, KS)
    store_row(out_ptr + M, out_b, K, H, M, HS, KS)


@triton.jit
def rope_table_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_b, q_l, q_h, k_b, k_l, k_h, cos_b, cos_l, sin_b, sin_l, L,
    UNIT: tl.constexpr, BACK: tl.constexpr, HALF: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    HS: tl.constexpr, GS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """x -> x * cos + rot(x) * sin for q and k, or with BACK the gradient of x from that of this"""
    token, b, at = program_token(L)
    cos = cos_ptr + (b * cos_b + at * cos_l) * UNIT
    sin = sin_ptr + (b * sin_b + at * sin_l) * UNIT
    q = q_ptr + (b * q_b + at * q_l) * UNIT
    if HALF:
        _half(q, q_h * UNIT, cos, sin, q_out_ptr + token * (H * K), BACK, H, K, HS, KS)
    else:
        _interleaved(q, q_h * UNIT, cos, sin, q_out_ptr + token * (H * K), BACK, H, K, HS, KS)
    if k_ptr is not None:
        k = k_ptr + (b * k_b + at * k_l) * UNIT
        if HALF:
            _half(k, k_h * UNIT, cos, sin, k_out_ptr + token * (G * K), BACK, G, K, GS, KS)
        else:
            _interleaved(k, k_h * UNIT, cos, sin, k_out_ptr + token * (G * K), BACK, G, K, GS, KS)


def _table_of(table: Tensor) -> tuple[Tensor, int, int]:
    """A (L, K) or (B, L, K) table with no gaps within its rows, and its steps in b and l."""
    if table.stride(-1) != 1:
        table = table.contiguous()
    return table, 0 if table.ndim == 2 else table.stride(0), table.stride(-2)


def rope_table_fwd(q, k, cos, sin, pairing, back: bool = False) -> tuple[Tensor, Tensor | None]:
    """q (B, L, H, K) and k (B, L, G, K) or None, rotated; `back`: the gradients of q and k."""
    B, L, H, K = q.shape
    G = 1 if k is None else k.shape[2]
    q_out, k_out = q.new_empty(q.shape), None if k is None else k.new_empty(k.shape)
    if q.numel() == 0:
        return q_out, k_out
    q, q_steps = heads_of(q)
    k, k_steps = (None, (0, 0, 0)) if k is None else heads_of(k)
    cos, *cos_steps = _table_of(cos)
    sin, *sin_steps = _table_of(sin)
    unit, steps = in_units(*q_steps, *k_steps, *cos_steps, *sin_steps)
    half = pairing == "half"
    rope_table_kernel[(B * L,)](
        q, k, cos, sin, q_out, k_out, *steps, L, UNIT=unit, BACK=back, HALF=half, H=H, G=G, K=K,
        HS=cut(H), GS=cut(G), KS=cut(K // 2 if half else K),
        **launch(max(H, G) * K, 80),
    )  # fmt: skip
    return q_out, k_out


def rope_table_bwd(dq_out, dk_out, cos, sin, pairing) -> tuple[Tensor, Tensor | None]:
    """dq and dk."""
    return rope_table_fwd(dq_out, dk_out, cos, sin, pairing, back=True)


def aot_calls(head_dim: int, dtype: torch.dtype):
    """Calls of the launchers at the model's shapes, 32 heads over 8."""
    q, k = (torch.zeros(1, 64, heads, head_dim, dtype=dtype) for heads in (32, 8))
    cos, sin = torch.zeros(64, head_dim), torch.zeros(64, head_dim)
    for pairing in ("interleaved", "half"):
        yield f"{pairing} fwd", lambda p=pairing: rope_table_fwd(q, k, cos, sin, p)
        yield f"{pairing} bwd", lambda p=pairing: rope_table_bwd(q, k, cos, sin, p)
