"""Triton kernels of qk_norm_rope3d: a program holds all heads of one token of q, then of k.

The statistics of a token are not stored: the backward has to read the token anyway and computes
them again.
"""

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
from lumina_kernels.triton._head_sums import parameter_grads, partial_sums, store_parameter_sums
from lumina_kernels.triton._launch import launch
from lumina_kernels.triton._norm import zeros_of
from lumina_kernels.triton._rotation import cos_sin_of, loop_options, rotate, token_options
from lumina_kernels.triton._tiles import (
    add,
    band,
    clear_padding,
    cut,
    load_heads,
    load_token,
    load_valid,
    load_vector,
    multiply,
    scale_by,
    select,
    split_token,
    store_token,
    sum_columns,
    zeros,
)
from lumina_kernels.triton._tune import loop_stages, tuned
from lumina_kernels.triton.context_drop import window_of

# Values of a token that a lane holds, in the forward and in the backward, which has sums, too.
FWD_PER_LANE, BWD_PER_LANE = 60, 24


@triton.jit
def _means(
    tile, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr, NORM: tl.constexpr
):
    """For each band of heads, the mean over what NORM normalises: the whole token, or each head."""
    means = ()
    if NORM == "rms_per_head":
        for i in tl.static_range(len(HS)):
            means = means + (sum_columns(band(tile, i, KS))[:, None] / K,)
    else:
        total = tl.sum(tile[0])
        for n in tl.static_range(1, len(tile)):
            total += tl.sum(tile[n])
        for _ in tl.static_range(len(HS)):
            means = means + (total / (H * K),)
    return means


@triton.jit
def _normalise(
    tile, eps, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """(tile - mean) * rstd, without the mean for an RMS norm, and rstd; zeros in the padding."""
    if NORM == "layer_across_heads":
        mean = _means(tile, H, K, HS, KS, NORM)
        centred = ()
        for i in tl.static_range(len(HS)):
            for j in tl.static_range(len(KS)):
                centred = centred + (tile[i * len(KS) + j] - mean[i],)
        tile = clear_padding(centred, H, K, HS, KS)
    squares = _means(multiply(tile, tile), H, K, HS, KS, NORM)
    rstd = ()
    normed = ()
    for i in tl.static_range(len(HS)):
        rstd = rstd + (tl.rsqrt(squares[i] + eps),)
        for j in tl.static_range(len(KS)):
            normed = normed + (tile[i * len(KS) + j] * rstd[i],)
    return normed, rstd


@triton.jit
def _load_parameter(
    ptr, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr, NORM: tl.constexpr
):
    """A weight or a bias, of the whole token or of a head, broadcastable to the tile."""
    if NORM == "rms_per_head":
        head = load_vector(ptr, K, KS)
        parameter = ()
        for _ in tl.static_range(len(HS)):
            parameter = parameter + head
    else:
        parameter = load_heads(ptr, K, H, K, HS, KS)
    return parameter


@triton.jit
def norm_tile(
    tile, parameters, eps, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """norm(tile) * weight + bias. parameters: pointers of weight and bias, each or None."""
    weight_ptr, bias_ptr = parameters
    tile, _ = _normalise(tile, eps, H, K, HS, KS, NORM)
    if weight_ptr is not None:
        tile = multiply(tile, _load_parameter(weight_ptr, H, K, HS, KS, NORM))
    if bias_ptr is not None:
        tile = add(tile, _load_parameter(bias_ptr, H, K, HS, KS, NORM))
    return tile


@triton.jit
def norm_rotate(
    tile, parameters, cos_sin, eps, H: tl.constexpr, K: tl.constexpr,
    HS: tl.constexpr, KS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """rotate(norm(tile) * weight + bias)"""
    return rotate(norm_tile(tile, parameters, eps, H, K, HS, KS, NORM), cos_sin, HS, KS)


@triton.jit
def norm_bwd(
    d, tile, weight_ptr, eps, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Gradient of the tile, and its terms in the gradient of the weight, from d, the gradient of
    norm(tile) * weight + bias, which is the bias' own.

    With n the normalised tile and g = d * weight: dweight = d * n and dtile = rstd * (g - n *
    mean(g * n) - mean(g)), without mean(g) for an RMS norm.
    """
    normed, rstd = _normalise(tile, eps, H, K, HS, KS, NORM)
    grad = d
    if weight_ptr is not None:
        grad = multiply(grad, _load_parameter(weight_ptr, H, K, HS, KS, NORM))
    along = _means(multiply(grad, normed), H, K, HS, KS, NORM)
    mean = along
    if NORM == "layer_across_heads":
        mean = _means(grad, H, K, HS, KS, NORM)
    dtile = ()
    for i in tl.static_range(len(HS)):
        for j in tl.static_range(len(KS)):
            t = grad[i * len(KS) + j] - normed[i * len(KS) + j] * along[i]
            if NORM == "layer_across_heads":
                t -= mean[i]
            dtile = dtile + (t * rstd[i],)
    return dtile, multiply(d, normed)


@triton.jit(do_not_specialize=COUNTS)
def qk_norm_rope3d_kernel(
    q, k,  # heads: (pointer, stride of b, of l, of h)
    q_parameters, k_parameters,  # (weight, bias), pointers or None
    positions, inv_freq, axis_ptr,  # as in `cos_sin_of`
    q_out_ptr, k_out_ptr, eps, L,
    UNIT: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    HS: tl.constexpr, GS: tl.constexpr, KS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """x -> rotate(norm(x) * weight + bias) for q and k, the rotation as in rope3d"""
    number, b, index = split_token(tl.program_id(0), L)
    q = load_token(q, b, index, UNIT, H, K, HS, KS)
    k = load_token(k, b, index, UNIT, G, K, GS, KS)
    cos_sin = cos_sin_of(positions, inv_freq, axis_ptr, b, index, 1, K, KS)
    q = norm_rotate(q, q_parameters, cos_sin, eps, H, K, HS, KS, NORM)
    store_token(q_out_ptr, q, number, H, K, HS, KS)
    k = norm_rotate(k, k_parameters, cos_sin, eps, G, K, GS, KS, NORM)
    store_token(k_out_ptr, k, number, G, K, GS, KS)


@triton.jit(do_not_specialize=COUNTS)
def qk_norm_rope3d_bwd_kernel(
    dout, x, weight_ptr, positions, inv_freq, axis_ptr, dx_ptr, partial_ptr, eps,
    counts_ptr, windows, grid, factor,  # of a sample; None without windows
    key_mask, L, tokens, chunk,
    UNIT: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr,
    NORM: tl.constexpr, SUMS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx of `chunk` tokens, and the sums of their terms in dweight and dbias. SUMS: 0 for no
    parameter, 1 for the weight alone, 2 for weight and bias.

    With counts (qk_norm_rope3d_pool) dout is the gradient of means over windows: a valid token gets
    its share of it, others get 0."""
    first = tl.program_id(0) * chunk
    dweight, dbias = zeros(HS, KS), zeros(HS, KS)
    for step in tl.range(tl.minimum(chunk, tokens - first), num_stages=STAGES):
        number, b, index = split_token(first + step, L)
        valid = None if key_mask is None else load_valid(key_mask, b, index)
        tile = load_token(x, b, index, UNIT, H, K, HS, KS, valid)
        if counts_ptr is None:
            d = load_token(dout, b, index, UNIT, H, K, HS, KS, valid)
        else:
            window = window_of(index.to(tl.int32), grid, factor)
            d = load_token(dout, b, window, UNIT, H, K, HS, KS, valid)
            count = tl.load(counts_ptr + b * windows + window)
            d = scale_by(d, 1.0 / tl.maximum(count, 1.0))
        cos_sin = cos_sin_of(positions, inv_freq, axis_ptr, b, index, -1, K, KS)
        d = rotate(d, cos_sin, HS, KS)
        dx, dw = norm_bwd(d, tile, weight_ptr, eps, H, K, HS, KS, NORM)
        store_token(dx_ptr, select(dx, valid), number, H, K, HS, KS)
        if SUMS > 0:
            dweight = add(dweight, select(dw, valid))
        if SUMS > 1:
            dbias = add(dbias, d)
    store_parameter_sums(partial_ptr, dweight, dbias, H, K, HS, KS, NORM, SUMS)


def qk_norm_rope3d_fwd(
    q, k, q_weight, q_bias, k_weight, k_bias, positions, inv_freq, axis, eps, norm
) -> tuple[Tensor, Tensor]:
    """q (B, L, H, K) and k (B, L, G, K), normalised and rotated."""
    B, L, H, K = q.shape
    G = k.shape[2]
    q_out, k_out = empty_as(q), empty_as(k)
    if q_out.numel() + k_out.numel() == 0:
        return q_out, k_out
    (q, k), unit = in_units(heads_of(q), heads_of(k))
    arguments = (
        q, k, (contiguous(q_weight), contiguous(q_bias)),
        (contiguous(k_weight), contiguous(k_bias)), positions_of(positions),
        frequencies_of(inv_freq), axis.contiguous(), q_out, k_out, eps, L,
    )  # fmt: skip
    options = token_options(max(H, G) * K, FWD_PER_LANE)
    launch(
        qk_norm_rope3d_kernel, B * L, arguments, tuned("qk_norm_rope3d_fwd", H * K, q_out, options),
        UNIT=unit, H=H, G=G, K=K, HS=cut(H), GS=cut(G), KS=cut(K), NORM=norm,
    )  # fmt: skip
    return q_out, k_out


def heads_bwd(
    dout, x, weight, bias, positions, inv_freq, axis, eps, norm, pool=None
) -> tuple[Tensor, Tensor]:
    """dx of q or of k, and `partial_sums`.

    `pool`: counts, grid, factor and key_mask of the windows; dout, (B, L', H, K), is then the
    gradient of the window means.
    """
    B, L, H, K = x.shape
    dx = empty_as(x)
    options = tuned("qk_norm_rope3d_bwd", H * K, dx, loop_options(H * K, BWD_PER_LANE, 168))
    partial, chunk, sums = partial_sums(x, weight, bias, norm, options)
    counts, grid, factor, key_mask = pool or (None,) * 4
    windows, grid = (None, None) if pool is None else (counts.shape[1], tuple(grid))
    (dout, x), unit = in_units(heads_of(dout), heads_of(x))
    arguments = (
        dout, x, contiguous(weight), positions_of(positions), frequencies_of(inv_freq),
        axis.contiguous(), dx, partial, eps, counts, windows, grid, factor, mask_of(key_mask),
        L, B * L, chunk,
    )  # fmt: skip
    launch(
        qk_norm_rope3d_bwd_kernel, partial.shape[0], arguments, options,
        UNIT=unit, H=H, K=K, HS=cut(H), KS=cut(K), NORM=norm, SUMS=sums,
        STAGES=loop_stages(4 * H * K * dx.itemsize),
    )  # fmt: skip
    return dx, partial


def qk_norm_rope3d_bwd(
    dq_out, dk_out, q, k, q_weight, q_bias, k_weight, k_bias, positions, inv_freq, axis, eps, norm
) -> tuple[Tensor | None, ...]:
    """dq, dk, and the gradients of the four parameters, None for None."""
    (_, _, H, K), G = q.shape, k.shape[2]
    parameters = q_weight, q_bias, k_weight, k_bias
    if q.numel() + k.numel() == 0:
        return empty_as(q), empty_as(k), *zeros_of(*parameters)
    table = positions, inv_freq, axis, eps, norm
    dq, q_partial = heads_bwd(dq_out, q, q_weight, q_bias, *table)
    dk, k_partial = heads_bwd(dk_out, k, k_weight, k_bias, *table)
    return dq, dk, *parameter_grads(q_partial, k_partial, parameters, H, G, K, norm)
