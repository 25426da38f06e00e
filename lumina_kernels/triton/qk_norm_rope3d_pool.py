"""Triton kernel of qk_norm_rope3d_pool: a program holds one window of tokens.

It normalises and rotates all heads of q and k of each of them, writes q, and keeps k and v as sums
in registers, so that the whole k is never written. The backward is that of qk_norm_rope3d, where k
reads the gradient of its window, and of context_drop for v.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._arguments import (
    COUNTS,
    contiguous,
    empty_as,
    frequencies_of,
    heads_of,
    in_units,
    mask_of,
    positions_of,
)
from lumina_kernels.triton._head_sums import parameter_grads
from lumina_kernels.triton._launch import launch
from lumina_kernels.triton._norm import zeros_of
from lumina_kernels.triton._rotation import cos_sin_of, loop_options
from lumina_kernels.triton._tiles import (
    add,
    cut,
    load_token,
    load_valid,
    scale_by,
    select,
    store_token,
    zeros,
)
from lumina_kernels.triton._tune import tuned
from lumina_kernels.triton.context_drop import context_drop_bwd, program_window, windows_of
from lumina_kernels.triton.qk_norm_rope3d import heads_bwd, norm_rotate

# Values of a token of q that a lane holds at most; at 48 the kernel spills for K = 48 in float32.
PER_LANE = 47


@triton.jit(do_not_specialize=COUNTS)
def qk_norm_rope3d_pool_kernel(
    q, k, v,  # heads: (pointer, stride of b, of l, of h)
    q_parameters, k_parameters,  # (weight, bias), pointers or None
    positions, inv_freq, axis_ptr,  # as in `cos_sin_of`
    key_mask,  # (pointer, stride of b, of l) or None
    q_out_ptr, k_out_ptr, v_out_ptr, mask_ptr, counts_ptr, eps,
    grid, factor,  # grid: (T, height, width)
    UNIT: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    HS: tl.constexpr, GS: tl.constexpr, KS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """rotate(norm(q)) for the tokens of a window; over the valid ones the means of rotate(norm(k))
    and of v, 0 where there is none; their number"""
    window, b, first, height, width = program_window(grid, factor)
    T, grid_h, grid_w = grid
    k_sum, v_sum = zeros(GS, KS), zeros(GS, KS)
    count = 0.0
    for i in range(height):
        for j in range(width):
            index = first + i * grid_w + j
            cos_sin = cos_sin_of(positions, inv_freq, axis_ptr, b, index, 1, K, KS)
            q_tile = load_token(q, b, index, UNIT, H, K, HS, KS)
            q_tile = norm_rotate(q_tile, q_parameters, cos_sin, eps, H, K, HS, KS, NORM)
            store_token(q_out_ptr, q_tile, b * T * grid_h * grid_w + index, H, K, HS, KS)
            valid = None if key_mask is None else load_valid(key_mask, b, index)
            k_tile = load_token(k, b, index, UNIT, G, K, GS, KS, valid)
            k_tile = norm_rotate(k_tile, k_parameters, cos_sin, eps, G, K, GS, KS, NORM)
            k_sum = add(k_sum, select(k_tile, valid))
            v_sum = add(v_sum, load_token(v, b, index, UNIT, G, K, GS, KS, valid))
            count += 1.0 if valid is None else tl.where(valid, 1.0, 0.0)
    share = 1.0 / tl.maximum(count, 1.0)
    store_token(k_out_ptr, scale_by(k_sum, share), window, G, K, GS, KS)
    store_token(v_out_ptr, scale_by(v_sum, share), window, G, K, GS, KS)
    tl.store(mask_ptr + window, count > 0)
    tl.store(counts_ptr + window, count)


def qk_norm_rope3d_pool_fwd(
    q, k, v, q_weight, q_bias, k_weight, k_bias, positions, inv_freq, axis, grid, factor, key_mask,
    eps, norm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q normalised and rotated, (B, L, H, K); k normalised, rotated and averaged over windows, and
    v averaged, (B, L', G, K); their mask and counts, (B, L')."""
    B, _, H, K = q.shape
    G, windows = k.shape[2], windows_of(grid, factor)
    q_out = empty_as(q)
    k_out, v_out = k.new_empty(B, windows, G, K), v.new_empty(B, windows, G, K)
    mask = k.new_empty(B, windows, dtype=torch.bool)
    counts = k.new_empty(B, windows, dtype=torch.float32)
    if B * windows == 0:
        return q_out, k_out, v_out, mask, counts
    (q, k, v), unit = in_units(heads_of(q), heads_of(k), heads_of(v))
    arguments = (
        q, k, v, (contiguous(q_weight), contiguous(q_bias)),
        (contiguous(k_weight), contiguous(k_bias)), positions_of(positions),
        frequencies_of(inv_freq), axis.contiguous(), mask_of(key_mask),
        q_out, k_out, v_out, mask, counts, eps, tuple(grid), factor,
    )  # fmt: skip
    options = loop_options(max(H, G) * K, PER_LANE)
    launch(
        qk_norm_rope3d_pool_kernel, B * windows, arguments,
        tuned("qk_norm_rope3d_pool_fwd", H * K, q_out, options),
        UNIT=unit, H=H, G=G, K=K, HS=cut(H), GS=cut(G), KS=cut(K), NORM=norm,
    )  # fmt: skip
    return q_out, k_out, v_out, mask, counts


def qk_norm_rope3d_pool_bwd(
    dq_out, dk_out, dv_out, q, k, q_weight, q_bias, k_weight, k_bias, positions, inv_freq, axis,
    counts, grid, factor, key_mask, eps, norm,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dq, dk, dv, and the gradients of the four parameters, None for None."""
    (_, _, H, K), G = q.shape, k.shape[2]
    parameters = q_weight, q_bias, k_weight, k_bias
    if q.numel() + k.numel() == 0:
        grads = empty_as(q), empty_as(k), dv_out.new_empty(k.shape)
        return *grads, *zeros_of(*parameters)
    table = positions, inv_freq, axis, eps, norm
    dq, q_partial = heads_bwd(dq_out, q, q_weight, q_bias, *table)
    pool = counts, grid, factor, key_mask
    dk, k_partial = heads_bwd(dk_out, k, k_weight, k_bias, *table, pool)
    _, dv = context_drop_bwd(None, dv_out, *pool)
    return dq, dk, dv, *parameter_grads(q_partial, k_partial, parameters, H, G, K, norm)
