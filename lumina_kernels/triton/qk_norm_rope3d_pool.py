"""Triton kernel of qk_norm_rope3d_pool: a program holds one window of tokens.

It normalises and rotates all heads of q and k of each of them, writes q, and keeps k and v as sums
in registers, so that the whole k is never written. The backward is that of qk_norm_rope3d, where k
reads the gradient of its window, and of context_drop for v.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._rotation import (
    add,
    cut,
    frequencies_of,
    heads_of,
    in_units,
    keep_row,
    kept,
    launch_loop,
    load_row,
    positions_of,
    scale,
    store_row,
    turns_of,
    zeros,
)
from lumina_kernels.triton._tiles import contiguous
from lumina_kernels.triton.context_drop import (
    context_drop_bwd,
    mask_of,
    program_window,
    windows_of,
)
from lumina_kernels.triton.qk_norm_rope3d import empty_grads, norm_turn, parameter_grads, row_bwd

# Values of a row of q that a lane holds, at most; at 48 the kernel spills for K = 48 in float32.
PER_LANE = 47


@triton.jit
def qk_norm_rope3d_pool_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,
    position_ptr, freq_ptr, axis_ptr, mask_ptr,
    q_out_ptr, k_out_ptr, v_out_ptr, mask_out_ptr, counts_ptr, eps,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, position_b, position_l, position_c, freq_b,
    mask_b, mask_l, T, grid_h, grid_w, factor,
    UNIT: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    HS: tl.constexpr, GS: tl.constexpr, KS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """turn(norm(q)) for the tokens of a window; over the valid ones the means of turn(norm(k)) and
    of v, 0 where there is none; their number"""
    window, b, first, height, width = program_window(T, grid_h, grid_w, factor)
    k_sum, v_sum = zeros(GS, KS), zeros(GS, KS)
    count = 0.0
    for i in range(height):
        for j in range(width):
            at = first + i * grid_w + j
            position = position_ptr + b * position_b + at * position_l
            turns = turns_of(position, position_c, freq_ptr + b * freq_b, axis_ptr, 1, K, KS)
            q = load_row(q_ptr + (b * q_b + at * q_l) * UNIT, q_h * UNIT, H, K, HS, KS)
            q = norm_turn(q, q_weight_ptr, q_bias_ptr, turns, eps, H, K, HS, KS, NORM)
            q_out = q_out_ptr + (b * T * grid_h * grid_w + at) * (H * K)
            store_row(q_out, q, K, H, K, HS, KS)
            keep = None if mask_ptr is None else kept(mask_ptr, mask_b, mask_l, b, at)
            k = load_row(k_ptr + (b * k_b + at * k_l) * UNIT, k_h * UNIT, G, K, GS, KS, keep)
            k = norm_turn(k, k_weight_ptr, k_bias_ptr, turns, eps, G, K, GS, KS, NORM)
            k_sum = add(k_sum, keep_row(k, keep))
            v = load_row(v_ptr + (b * v_b + at * v_l) * UNIT, v_h * UNIT, G, K, GS, KS, keep)
            v_sum = add(v_sum, v)
            count += 1.0 if keep is None else tl.where(keep, 1.0, 0.0)
    share = 1.0 / tl.maximum(count, 1.0)
    store_row(k_out_ptr + window * (G * K), scale(k_sum, share), K, G, K, GS, KS)
    store_row(v_out_ptr + window * (G * K), scale(v_sum, share), K, G, K, GS, KS)
    tl.store(mask_out_ptr + window, count > 0)
    tl.store(counts_ptr + window, count)


def qk_norm_rope3d_pool_fwd(
    q, k, v, q_weight, q_bias, k_weight, k_bias, positions, inv_freq, axis, grid, factor, key_mask,
    eps, norm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q normalised and rotated, (B, L, H, K); k that and averaged and v averaged over windows,
    (B, L', G, K); their mask and counts, (B, L')."""
    B, _, H, K = q.shape
    G, windows = k.shape[2], windows_of(grid, factor)
    q_out = q.new_empty(q.shape)
    k_out, v_out = k.new_empty(B, windows, G, K), v.new_empty(B, windows, G, K)
    mask = k.new_empty(B, windows, dtype=torch.bool)
    counts = k.new_empty(B, windows, dtype=torch.float32)
    if B * windows == 0:
        return q_out, k_out, v_out, mask, counts
    q, q_steps = heads_of(q)
    k, k_steps = heads_of(k)
    v, v_steps = heads_of(v)
    unit, steps = in_units(*q_steps, *k_steps, *v_steps)
    positions, *position_steps = positions_of(positions)
    inv_freq, freq_b = frequencies_of(inv_freq)
    key_mask, *mask_steps = mask_of(key_mask)
    qk_norm_rope3d_pool_kernel[(B * windows,)](
        q, k, v, *map(contiguous, (q_weight, q_bias, k_weight, k_bias)),
        positions, inv_freq, axis.contiguous(), key_mask,
        q_out, k_out, v_out, mask, counts, eps,
        *steps, *position_steps, freq_b, *mask_steps, *grid, factor,
        UNIT=unit, H=H, G=G, K=K, HS=cut(H), GS=cut(G), KS=cut(K), NORM=norm,
        **launch_loop(max(H, G) * K, PER_LANE),
    )  # fmt: skip
    return q_out, k_out, v_out, mask, counts


def qk_norm_rope3d_pool_bwd(
    dq_out, dk_out, dv_out, q, k, q_weight, q_bias, k_weight, k_bias, positions, inv_freq, axis,
    counts, grid, factor, key_mask, eps, norm,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dv, and the gradients of the four parameters, empty for None."""
    (_, _, H, K), G = q.shape, k.shape[2]
    parameters = q_weight, q_bias, k_weight, k_bias
    if q.numel() + k.numel() == 0:
        dq, dk, *grads = empty_grads((q, k), parameters)
        return dq, dk, dv_out.new_empty(k.shape), *grads
    table = positions, inv_freq, axis, eps, norm
    dq, q_partial = row_bwd(dq_out, q, q_weight, q_bias, *table)
    pool = counts, grid, factor, key_mask
    dk, k_partial = row_bwd(dk_out, k, k_weight, k_bias, *table, pool)
    _, dv = context_drop_bwd(None, dv_out, *pool)
    return dq, dk, dv, *parameter_grads(q_partial, k_partial, parameters, H, G, K, norm)


def aot_calls(head_dim: int, dtype: torch.dtype):
    """Calls of the launchers at the model's shapes, 32 heads over 8."""
    q, k, small = (
        torch.zeros(1, length, heads, head_dim, dtype=dtype)
        for length, heads in ((256, 32), (256, 8), (64, 8))
    )
    q_weight, k_weight = (torch.zeros(heads * head_dim, dtype=dtype) for heads in (32, 8))
    parameters = q_weight, q_weight.clone(), k_weight, k_weight.clone()
    positions = torch.zeros(256, 3, dtype=torch.int64)
    table = positions, torch.zeros(head_dim // 2), torch.zeros(head_dim // 2, dtype=torch.int64)
    counts, grid, norm = torch.ones(1, 64), (1, 16, 16), "layer_across_heads"
    for name, mask in (("", None), (" mask", torch.ones(1, 256, dtype=torch.bool))):
        rest = grid, 2, mask, 1e-5, norm
        yield (
            f"fwd{name}",
            lambda rest=rest: qk_norm_rope3d_pool_fwd(q, k, k, *parameters, *table, *rest),
        )
        yield (
            f"bwd{name}",
            lambda rest=rest: qk_norm_rope3d_pool_bwd(
                q, small, small, q, k, *parameters, *table, counts, *rest
            ),
        )
