"""Triton kernels of qk_norm_rope3d: a program holds all heads of one token of q, then of k.

The statistics of a row cost no bytes, so the backward computes them again from the row it has to
read anyway.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._norm import sum_partials
from lumina_kernels.triton._rotation import (
    add,
    cut,
    frequencies_of,
    heads_of,
    in_units,
    keep_row,
    kept,
    launch,
    launch_loop,
    load_row,
    place,
    positions_of,
    product,
    program_token,
    scale,
    store_row,
    token_of,
    turn,
    turns_of,
    zeros,
)
from lumina_kernels.triton._tiles import blocks, contiguous
from lumina_kernels.triton.context_drop import mask_of, window_of


@triton.jit
def means(
    row, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr, NORM: tl.constexpr
):
    """For each cut of heads, the mean over what NORM normalises: all of the row, or each head."""
    out = ()
    if NORM == "rms_per_head":
        for i in tl.static_range(len(HS)):
            heads = tl.sum(row[i * len(KS)], 1)
            for j in tl.static_range(1, len(KS)):
                heads += tl.sum(row[i * len(KS) + j], 1)
            out = out + (heads[:, None] / K,)
    else:
        total = tl.sum(row[0])
        for n in tl.static_range(1, len(row)):
            total += tl.sum(row[n])
        for _ in tl.static_range(len(HS)):
            out = out + (total / (H * K),)
    return out


@triton.jit
def normalise(
    row, eps, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """(row - mean) * rstd, without the mean for an RMS norm, and rstd; zeros in the padding."""
    if NORM == "layer_across_heads":
        mean = means(row, H, K, HS, KS, NORM)
        centred = ()
        for i in tl.static_range(len(HS)):
            for j in tl.static_range(len(KS)):
                _, _, there = place(HS[i][0], HS[i][1], KS[j][0], KS[j][1], H, K)
                centred = centred + (tl.where(there, row[i * len(KS) + j] - mean[i], 0.0),)
        row = centred
    squares = means(product(row, row), H, K, HS, KS, NORM)
    rstd = ()
    normed = ()
    for i in tl.static_range(len(HS)):
        rstd = rstd + (tl.rsqrt(squares[i] + eps),)
        for j in tl.static_range(len(KS)):
            normed = normed + (row[i * len(KS) + j] * rstd[i],)
    return normed, rstd


@triton.jit
def load_parameter(
    ptr, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr, NORM: tl.constexpr
):
    """A weight or a bias, for the whole row or for a head, broadcastable to the tiles."""
    if NORM == "rms_per_head":
        head = load_row(ptr, 0, 1, K, ((0, 1),), KS)
        row = ()
        for _ in tl.static_range(len(HS)):
            row = row + head
    else:
        row = load_row(ptr, K, H, K, HS, KS)
    return row


@triton.jit
def norm_turn(
    row, weight_ptr, bias_ptr, turns, eps, H: tl.constexpr, K: tl.constexpr,
    HS: tl.constexpr, KS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The row normalised, times weight, plus bias, turned."""
    row, _ = normalise(row, eps, H, K, HS, KS, NORM)
    if weight_ptr is not None:
        row = product(row, load_parameter(weight_ptr, H, K, HS, KS, NORM))
    if bias_ptr is not None:
        row = add(row, load_parameter(bias_ptr, H, K, HS, KS, NORM))
    return turn(row, turns, HS, KS)


@triton.jit
def norm_turn_bwd(
    dout, row, weight_ptr, turns, eps, H: tl.constexpr, K: tl.constexpr,
    HS: tl.constexpr, KS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Gradients of the row, and this row's terms in those of weight and bias.

    With n the normalised row, d the gradient turned back and g = d * weight: dweight = d * n,
    dbias = d, drow = rstd * (g - mean(g) - n * mean(g * n)), without mean(g) for an RMS norm.
    """
    dbias = turn(dout, turns, HS, KS)
    normed, rstd = normalise(row, eps, H, K, HS, KS, NORM)
    grad = dbias
    if weight_ptr is not None:
        grad = product(grad, load_parameter(weight_ptr, H, K, HS, KS, NORM))
    along = means(product(grad, normed), H, K, HS, KS, NORM)
    shift = along
    if NORM == "layer_across_heads":
        shift = means(grad, H, K, HS, KS, NORM)
    drow = ()
    for i in tl.static_range(len(HS)):
        for j in tl.static_range(len(KS)):
            t = grad[i * len(KS) + j] - normed[i * len(KS) + j] * along[i]
            if NORM == "layer_across_heads":
                t -= shift[i]
            drow = drow + (t * rstd[i],)
    return drow, product(dbias, normed), dbias


@triton.jit
def qk_norm_rope3d_kernel(
    q_ptr, k_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,
    position_ptr, freq_ptr, axis_ptr, q_out_ptr, k_out_ptr, eps,
    q_b, q_l, q_h, k_b, k_l, k_h, position_b, position_l, position_c, freq_b, L,
    UNIT: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    HS: tl.constexpr, GS: tl.constexpr, KS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """x -> turn(norm(x) * weight + bias) for q and k, the turn as in rope3d"""
    token, b, at = program_token(L)
    q = load_row(q_ptr + (b * q_b + at * q_l) * UNIT, q_h * UNIT, H, K, HS, KS)
    k = load_row(k_ptr + (b * k_b + at * k_l) * UNIT, k_h * UNIT, G, K, GS, KS)
    position = position_ptr + b * position_b + at * position_l
    turns = turns_of(position, position_c, freq_ptr + b * freq_b, axis_ptr, 1, K, KS)
    q = norm_turn(q, q_weight_ptr, q_bias_ptr, turns, eps, H, K, HS, KS, NORM)
    store_row(q_out_ptr + token * (H * K), q, K, H, K, HS, KS)
    k = norm_turn(k, k_weight_ptr, k_bias_ptr, turns, eps, G, K, GS, KS, NORM)
    store_row(k_out_ptr + token * (G * K), k, K, G, K, GS, KS)


@triton.jit
def qk_norm_rope3d_bwd_kernel(
    dout_ptr, x_ptr, weight_ptr, position_ptr, freq_ptr, axis_ptr, dx_ptr, partial_ptr, eps,
    counts_ptr, mask_ptr, dout_b, dout_l, dout_h, x_b, x_l, x_h, position_b, position_l, position_c,
    freq_b, mask_b, mask_l, L, tokens, chunk, windows, grid_h, grid_w, factor,
    UNIT: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr,
    NORM: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """dx of `chunk` tokens by `norm_turn_bwd`, and the sums of its dweight and dbias over them:
    SUMS is 0 for no parameter, 1 for the weight alone, 2 for weight and bias.

    With counts, dout is that of means over windows (`qk_norm_rope3d_pool`): a valid token has its
    share in it, others none."""
    first = tl.program_id(0) * chunk
    dweight, dbias = zeros(HS, KS), zeros(HS, KS)
    for step in range(tl.minimum(chunk, tokens - first)):
        token, b, at = token_of(first + step, L)
        keep = None if mask_ptr is None else kept(mask_ptr, mask_b, mask_l, b, at)
        x = load_row(x_ptr + (b * x_b + at * x_l) * UNIT, x_h * UNIT, H, K, HS, KS, keep)
        l_out = at if counts_ptr is None else window_of(at.to(tl.int32), grid_h, grid_w, factor)
        dout = dout_ptr + (b * dout_b + l_out * dout_l) * UNIT
        dout = load_row(dout, dout_h * UNIT, H, K, HS, KS, keep)
        if counts_ptr is not None:
            count = tl.load(counts_ptr + b * windows + l_out)
            dout = scale(dout, 1.0 / tl.maximum(count, 1.0))
        position = position_ptr + b * position_b + at * position_l
        turns = turns_of(position, position_c, freq_ptr + b * freq_b, axis_ptr, -1, K, KS)
        dx, scaled, shifted = norm_turn_bwd(dout, x, weight_ptr, turns, eps, H, K, HS, KS, NORM)
        store_row(dx_ptr + token * (H * K), keep_row(dx, keep), K, H, K, HS, KS)
        if SUMS > 0:
            dweight = add(dweight, keep_row(scaled, keep))
        if SUMS > 1:
            dbias = add(dbias, shifted)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (SUMS * H * K)
    if SUMS > 0:
        store_row(partial, dweight, K, H, K, HS, KS)
    if SUMS > 1:
        store_row(partial + H * K, dbias, K, H, K, HS, KS)


@triton.jit
def _sum(
    partial_ptr, out_ptr, step, count, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Columns of the sum of `count` rows of WIDTH values, `step` apart."""
    if out_ptr is not None:
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        if tl.program_id(0) * COLUMNS < WIDTH:
            total = sum_partials(partial_ptr, count, step, columns, WIDTH, ROWS, COLUMNS)
            tl.store(out_ptr + columns, total.to(out_ptr.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def qk_norm_rope3d_parameters_kernel(
    q_partial_ptr, k_partial_ptr, dq_weight_ptr, dq_bias_ptr, dk_weight_ptr, dk_bias_ptr,
    q_step, k_step, programs, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dweight and dbias of q and k: the sums over programs, and over heads where they share it
    (then there is no bias, and the heads of all programs are rows one after another)."""
    if NORM == "rms_per_head":
        _sum(q_partial_ptr, dq_weight_ptr, K, programs * H, K, ROWS, COLUMNS)
        _sum(k_partial_ptr, dk_weight_ptr, K, programs * G, K, ROWS, COLUMNS)
    else:
        _sum(q_partial_ptr, dq_weight_ptr, q_step, programs, H * K, ROWS, COLUMNS)
        _sum(k_partial_ptr, dk_weight_ptr, k_step, programs, G * K, ROWS, COLUMNS)
        _sum(q_partial_ptr + H * K, dq_bias_ptr, q_step, programs, H * K, ROWS, COLUMNS)
        _sum(k_partial_ptr + G * K, dk_bias_ptr, k_step, programs, G * K, ROWS, COLUMNS)


# Of one row: values a lane holds, in the forward and in the backward, which holds four such rows.
FWD_PER_LANE, BWD_PER_LANE = 80, 24
# Programs whose sums the second stage adds at most, and tokens of a program at least.
MOST_PARTIALS, LEAST_TOKENS = 512, 4
# Tile of the sums that the second stage adds at a time.
ROWS, COLUMNS = 64, 32


def qk_norm_rope3d_fwd(
    q, k, q_weight, q_bias, k_weight, k_bias, positions, inv_freq, axis, eps, norm
) -> tuple[Tensor, Tensor]:
    """q (B, L, H, K) and k (B, L, G, K), normalised and rotated."""
    B, L, H, K = q.shape
    G = k.shape[2]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q_out.numel() + k_out.numel() == 0:
        return q_out, k_out
    q, q_steps = heads_of(q)
    k, k_steps = heads_of(k)
    unit, steps = in_units(*q_steps, *k_steps)
    positions, *position_steps = positions_of(positions)
    inv_freq, freq_b = frequencies_of(inv_freq)
    qk_norm_rope3d_kernel[(B * L,)](
        q, k, *map(contiguous, (q_weight, q_bias, k_weight, k_bias)),
        positions, inv_freq, axis.contiguous(), q_out, k_out, eps,
        *steps, *position_steps, freq_b, L, UNIT=unit, H=H, G=G, K=K,
        HS=cut(H), GS=cut(G), KS=cut(K), NORM=norm,
        **launch(max(H, G) * K, FWD_PER_LANE),
    )  # fmt: skip
    return q_out, k_out


def row_bwd(dout, x, weight, bias, positions, inv_freq, axis, eps, norm, pool=None):
    """dx, and the partial sums of dweight and dbias, (programs, H * K of each).

    `pool`: counts, grid, factor and key_mask of the windows that dout, (B, L', H, K), is for.
    """
    B, L, H, K = x.shape
    chunk = max(LEAST_TOKENS, blocks(B * L, MOST_PARTIALS))
    sums = 0 if weight is None and bias is None else 1 if bias is None else 2
    dx = x.new_empty(x.shape)
    partial = x.new_empty(blocks(B * L, chunk), sums * H * K, dtype=torch.float32)
    counts, (_, grid_h, grid_w), factor, key_mask = pool or (None, (1, 1, 1), 1, None)
    windows = 0 if counts is None else counts.shape[1]
    key_mask, *mask_steps = mask_of(key_mask)
    dout, dout_steps = heads_of(dout)
    x, x_steps = heads_of(x)
    unit, steps = in_units(*dout_steps, *x_steps)
    positions, *position_steps = positions_of(positions)
    inv_freq, freq_b = frequencies_of(inv_freq)
    qk_norm_rope3d_bwd_kernel[(len(partial),)](
        dout, x, contiguous(weight), positions, inv_freq, axis.contiguous(), dx, partial, eps,
        counts, key_mask, *steps, *position_steps, freq_b, *mask_steps, L, B * L, chunk,
        windows, grid_h, grid_w, factor, UNIT=unit, H=H, K=K, HS=cut(H), KS=cut(K), NORM=norm,
        SUMS=sums, **launch_loop(H * K, BWD_PER_LANE),
    )  # fmt: skip
    return dx, partial


def parameter_grads(q_partial, k_partial, parameters, H, G, K, norm) -> list[Tensor]:
    """Gradients of the weights and biases of q and k from `row_bwd`'s sums, empty for None."""
    grads = [None if p is None else p.new_empty(p.shape) for p in parameters]
    if any(grad is not None for grad in grads):
        width = K if norm == "rms_per_head" else max(H, G) * K
        qk_norm_rope3d_parameters_kernel[(blocks(width, COLUMNS),)](
            q_partial, k_partial, *grads, q_partial.stride(0), k_partial.stride(0),
            len(q_partial), H=H, G=G, K=K, NORM=norm, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return [q_partial.new_empty(0) if grad is None else grad for grad in grads]


def empty_grads(inputs, parameters) -> list[Tensor]:
    """The gradients of inputs without a value: empty as they are, zeros for the parameters."""
    like = inputs[0].new_empty(0, dtype=torch.float32)
    zeros = [like.clone() if p is None else torch.zeros_like(p) for p in parameters]
    return [x.new_empty(x.shape) for x in inputs] + zeros


def qk_norm_rope3d_bwd(
    dq_out, dk_out, q, k, q_weight, q_bias, k_weight, k_bias, positions, inv_freq, axis, eps, norm
) -> tuple[Tensor, ...]:
    """dq, dk, and the gradients of the four parameters, empty for None."""
    (_, _, H, K), G = q.shape, k.shape[2]
    parameters = q_weight, q_bias, k_weight, k_bias
    if q.numel() + k.numel() == 0:
        return tuple(empty_grads((q, k), parameters))
    table = positions, inv_freq, axis, eps, norm
    dq, q_partial = row_bwd(dq_out, q, q_weight, q_bias, *table)
    dk, k_partial = row_bwd(dk_out, k, k_weight, k_bias, *table)
    return dq, dk, *parameter_grads(q_partial, k_partial, parameters, H, G, K, norm)


def aot_calls(head_dim: int, dtype: torch.dtype):
    """Calls of the launchers at the model's shapes, 32 heads over 8."""
    q, k = (torch.zeros(1, 64, heads, head_dim, dtype=dtype) for heads in (32, 8))
    positions = torch.zeros(64, 3, dtype=torch.int64)
    table = positions, torch.zeros(head_dim // 2), torch.zeros(head_dim // 2, dtype=torch.int64)
    for norm in ("layer_across_heads", "rms_per_head", "rms_across_heads"):
        rows = (head_dim, head_dim) if norm == "rms_per_head" else (32 * head_dim, 8 * head_dim)
        q_weight, k_weight = (torch.zeros(width, dtype=dtype) for width in rows)
        biased = norm == "layer_across_heads"
        q_bias, k_bias = (q_weight.clone(), k_weight.clone()) if biased else (None, None)
        rest = q_weight, q_bias, k_weight, k_bias, *table, 1e-5, norm
        yield f"{norm} fwd", lambda rest=rest: qk_norm_rope3d_fwd(q, k, *rest)
        yield f"{norm} bwd", lambda rest=rest: qk_norm_rope3d_bwd(q, k, q, k, *rest)
