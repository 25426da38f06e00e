"""Triton kernel of rope3d: a program rotates all heads of one token of q and k.

The gradients of q and k are the opposite rotation. The kernel differentiates neither positions nor
frequencies; the op refuses those that ask for a gradient.
"""

import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._arguments import (
    COUNTS,
    empty_as,
    frequencies_of,
    heads_of,
    in_units,
    positions_of,
)
from lumina_kernels.triton._launch import launch
from lumina_kernels.triton._rotation import cos_sin_of, rotate, token_options
from lumina_kernels.triton._tiles import cut, load_token, split_token, store_token
from lumina_kernels.triton._tune import tuned


@triton.jit(do_not_specialize=COUNTS)
def rope3d_kernel(
    q, k,  # heads: (pointer, stride of b, of l, of h)
    positions, inv_freq, axis_ptr,  # as in `cos_sin_of`
    q_out_ptr, k_out_ptr, L,
    UNIT: tl.constexpr, SIGN: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    HS: tl.constexpr, GS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """(a, b) -> (a cos - b sin, a sin + b cos) with the angle SIGN * position[axis] * inv_freq"""
    number, b, index = split_token(tl.program_id(0), L)
    q = load_token(q, b, index, UNIT, H, K, HS, KS)
    k = load_token(k, b, index, UNIT, G, K, GS, KS)
    cos_sin = cos_sin_of(positions, inv_freq, axis_ptr, b, index, SIGN, K, KS)
    store_token(q_out_ptr, rotate(q, cos_sin, HS, KS), number, H, K, HS, KS)
    store_token(k_out_ptr, rotate(k, cos_sin, GS, KS), number, G, K, GS, KS)


def rope3d_fwd(q, k, positions, inv_freq, axis, sign: int = 1) -> tuple[Tensor, Tensor]:
    """q (B, L, H, K) and k (B, L, G, K) rotated by `sign` times the angles."""
    B, L, H, K = q.shape
    G = k.shape[2]
    q_out, k_out = empty_as(q), empty_as(k)
    if B * L * max(H, G) * K == 0:
        return q_out, k_out
    (q, k), unit = in_units(heads_of(q), heads_of(k))
    arguments = (
        q, k, positions_of(positions), frequencies_of(inv_freq), axis.contiguous(), q_out, k_out, L
    )  # fmt: skip
    launch(
        rope3d_kernel, B * L, arguments,
        tuned("rope3d", H * K, q_out, token_options(max(H, G) * K, 80)),
        UNIT=unit, SIGN=sign, H=H, G=G, K=K, HS=cut(H), GS=cut(G), KS=cut(K),
    )  # fmt: skip
    return q_out, k_out


def rope3d_bwd(dq_out, dk_out, positions, inv_freq, axis) -> tuple[Tensor, Tensor]:
    """dq and dk."""
    return rope3d_fwd(dq_out, dk_out, positions, inv_freq, axis, -1)
