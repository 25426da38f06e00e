"""Triton kernel of rope3d: a program turns all heads of one token of q and k.

The gradients of q and k are the opposite rotation. The kernel differentiates neither positions nor
frequencies; the op refuses those that ask for a gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._rotation import (
    cut,
    frequencies_of,
    heads_of,
    in_units,
    launch,
    load_row,
    positions_of,
    program_token,
    store_row,
    turn,
    turns_of,
)


@triton.jit
def rope3d_kernel(
    q_ptr, k_ptr, position_ptr, freq_ptr, axis_ptr, q_out_ptr, k_out_ptr,
    q_b, q_l, q_h, k_b, k_l, k_h, position_b, position_l, position_c, freq_b, L,
    UNIT: tl.constexpr, SIGN: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    HS: tl.constexpr, GS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """(a, b) -> (a cos - b sin, a sin + b cos) with the angle SIGN * position[axis] * inv_freq"""
    token, b, at = program_token(L)
    q = load_row(q_ptr + (b * q_b + at * q_l) * UNIT, q_h * UNIT, H, K, HS, KS)
    k = load_row(k_ptr + (b * k_b + at * k_l) * UNIT, k_h * UNIT, G, K, GS, KS)
    position = position_ptr + b * position_b + at * position_l
    turns = turns_of(position, position_c, freq_ptr + b * freq_b, axis_ptr, SIGN, K, KS)
    store_row(q_out_ptr + token * (H * K), turn(q, turns, HS, KS), K, H, K, HS, KS)
    store_row(k_out_ptr + token * (G * K), turn(k, turns, GS, KS), K, G, K, GS, KS)


def rope3d_fwd(q, k, positions, inv_freq, axis, sign: int = 1) -> tuple[Tensor, Tensor]:
    """q (B, L, H, K) and k (B, L, G, K) rotated by `sign` times the angles."""
    B, L, H, K = q.shape
    G = k.shape[2]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if B * L * max(H, G) * K == 0:
        return q_out, k_out
    q, q_steps = heads_of(q)
    k, k_steps = heads_of(k)
    unit, steps = in_units(*q_steps, *k_steps)
    positions, *position_steps = positions_of(positions)
    inv_freq, freq_b = frequencies_of(inv_freq)
    rope3d_kernel[(B * L,)](
        q, k, positions, inv_freq, axis.contiguous(), q_out, k_out,
        *steps, *position_steps, freq_b, L, UNIT=unit, SIGN=sign, H=H, G=G, K=K,
        HS=cut(H), GS=cut(G), KS=cut(K), **launch(max(H, G) * K, 80),
    )  # fmt: skip
    return q_out, k_out


def rope3d_bwd(dq_out, dk_out, positions, inv_freq, axis) -> tuple[Tensor, Tensor]:
    """dq and dk."""
    return rope3d_fwd(dq_out, dk_out, positions, inv_freq, axis, -1)


def aot_calls(head_dim: int, dtype: torch.dtype):
    """Calls of the launchers at the model's shapes, 32 heads over 8."""
    q, k = (
        torch.zeros(1, 64, 32, head_dim, dtype=dtype),
        torch.zeros(1, 64, 8, head_dim, dtype=dtype),
    )
    positions = torch.zeros(64, 3, dtype=torch.int64)
    table = positions, torch.zeros(head_dim // 2), torch.zeros(head_dim // 2, dtype=torch.int64)
    yield "fwd", lambda: rope3d_fwd(q, k, *table)
    yield "bwd", lambda: rope3d_bwd(q, k, *table)
