"""Triton kernels of norm_modulate: a row stays in registers between its statistics and output."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._arguments import COUNTS, contiguous, empty_as, rows_of
from lumina_kernels.triton._launch import launch
from lumina_kernels.triton._norm import (
    backward_options,
    forward_options,
    modulate,
    modulate_bwd,
    modulation_grads,
    norm_bwd,
    normalise,
    normalise_from_statistics,
    row_stages,
    rows_per_program,
    rstd_and_mean,
    store_sums,
    zeros_of,
)
from lumina_kernels.triton._tiles import (
    blocks,
    load_rows,
    program_chunk,
    program_rows,
    store_rows,
    zero_row,
)
from lumina_kernels.triton._tune import tuned


@triton.jit(do_not_specialize=COUNTS)
def norm_modulate_fwd_kernel(
    x, weight_ptr, bias_ptr, scale, shift,  # rows: (pointer, stride of b, of l)
    out_ptr, rstd_ptr, mean_ptr,  # mean None: an RMS norm
    L, eps, D: tl.constexpr, DS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out = ((x - mean) * rstd * weight + bias) * (1 + scale) + shift"""
    b, rows = program_rows(L, ROWS)
    n = normalise(load_rows(x, b, rows, L, D, DS), eps, rstd_ptr, mean_ptr, b, rows, L, D, DS)
    out = modulate(n, weight_ptr, bias_ptr, scale, shift, b, rows, L, D, DS)
    store_rows(out_ptr, out, b, rows, L, D, DS)


@triton.jit(do_not_specialize=COUNTS)
def norm_modulate_bwd_kernel(
    dout, x, weight_ptr, bias_ptr, scale, rstd_ptr, mean_ptr,
    dx_ptr, dscale_ptr, partial_ptr, L, chunk, D: tl.constexpr, DS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """With n = (x - mean) * rstd, d = dout * (1 + scale) * weight:
    dx = rstd * (d - mean(d) - n * mean(d * n)); partial: `modulate_bwd`'s sums over `chunk` rows.
    """
    b, first = program_chunk(L, chunk)
    dn_sum, d_sum = zero_row(DS), zero_row(DS)
    for row in tl.range(first, tl.minimum(first + chunk, L), num_stages=STAGES):
        rows = row + tl.zeros((1, 1), tl.int64)
        d = load_rows(dout, b, rows, L, D, DS)
        x_row = load_rows(x, b, rows, L, D, DS)
        n, rstd = normalise_from_statistics(x_row, rstd_ptr, mean_ptr, b, rows, L, D, DS)
        d, dn_sum, d_sum = modulate_bwd(
            d, n, dn_sum, d_sum, weight_ptr, bias_ptr, scale, dscale_ptr, b, rows, L, D, DS
        )
        dx = norm_bwd(d, n, rstd, D, mean_ptr is not None)
        store_rows(dx_ptr, dx, b, rows, L, D, DS)
    store_sums(partial_ptr, 2, (dn_sum, d_sum), D, DS)


def norm_modulate_fwd(x, weight, bias, scale, shift, eps, kind) -> tuple[Tensor, Tensor]:
    """out (B, L, D), and the statistics: rstd and, for a LayerNorm, the mean, (1 or 2, B, L)."""
    B, L, D = x.shape
    out = empty_as(x)
    statistics = x.new_empty(1 + (kind == "layer"), B, L, dtype=torch.float32)
    if out.numel() == 0:
        return out, statistics
    options = tuned("norm_modulate_fwd", D, x, forward_options(D))
    arguments = (
        rows_of(x), contiguous(weight), contiguous(bias), rows_of(scale), rows_of(shift),
        out, *rstd_and_mean(statistics), L, eps,
    )  # fmt: skip
    launch(norm_modulate_fwd_kernel, B * blocks(L, options["ROWS"]), arguments, options)
    return out, statistics


def norm_modulate_bwd(dout, x, weight, bias, scale, shift, statistics) -> tuple[Tensor | None, ...]:
    """dx, dweight, dbias, dscale and dshift, shaped as their inputs; None for None."""
    B, L, D = x.shape
    dx = empty_as(x)
    if dx.numel() == 0:
        return dx, *zeros_of(weight, bias, scale, shift)
    options = tuned("norm_modulate_bwd", D, x, backward_options(D))
    chunk = rows_per_program(B, L, options)
    chunks = blocks(L, chunk)
    partial = x.new_empty(B, chunks, 2, D, dtype=torch.float32)
    per_token = scale is not None and scale.ndim == 3
    dscale = empty_as(scale) if per_token else None
    arguments = (
        rows_of(dout), rows_of(x), contiguous(weight), contiguous(bias), rows_of(scale),
        *rstd_and_mean(statistics), dx, dscale, partial, L, chunk,
    )  # fmt: skip
    stages = row_stages(4, options, x)
    launch(norm_modulate_bwd_kernel, B * chunks, arguments, options, STAGES=stages)
    dweight, dbias, dscale_sum, dshift = modulation_grads(partial, weight, bias, scale, shift, dout)
    return dx, dweight, dbias, dscale if per_token else dscale_sum, dshift
