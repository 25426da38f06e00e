"""Triton kernels of gate_residual_norm: a row stays in registers from the sum to the norm."""

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
    add,
    blocks,
    load_rows,
    multiply,
    program_chunk,
    program_rows,
    store_rows,
    zero_row,
)
from lumina_kernels.triton._tune import tuned


@triton.jit(do_not_specialize=COUNTS)
def gate_residual_norm_fwd_kernel(
    y, residual, gate, weight_ptr, bias_ptr, scale, shift,  # rows: (pointer, stride of b, of l)
    new_residual_ptr, normed_ptr, rstd_ptr, mean_ptr,  # mean None: an RMS norm
    L, eps, D: tl.constexpr, DS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """new_residual = residual + gate * y,
    normed = (norm(new_residual) * weight + bias) * (1 + scale) + shift"""
    b, rows = program_rows(L, ROWS)
    y = load_rows(y, b, rows, L, D, DS)
    residual = load_rows(residual, b, rows, L, D, DS)
    if gate is not None:
        y = multiply(load_rows(gate, b, rows, L, D, DS), y)
    new_residual = add(residual, y)
    store_rows(new_residual_ptr, new_residual, b, rows, L, D, DS)
    n = normalise(new_residual, eps, rstd_ptr, mean_ptr, b, rows, L, D, DS)
    normed = modulate(n, weight_ptr, bias_ptr, scale, shift, b, rows, L, D, DS)
    store_rows(normed_ptr, normed, b, rows, L, D, DS)


@triton.jit(do_not_specialize=COUNTS)
def gate_residual_norm_bwd_kernel(
    dnew_residual, dnormed, y, residual, gate, weight_ptr, bias_ptr, scale, rstd_ptr, mean_ptr,
    dy_ptr, dresidual_ptr, dgate_ptr, dscale_ptr, partial_ptr,
    L, chunk, D: tl.constexpr, DS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dresidual = dnew_residual + the gradient of the norm's input, dy = gate * dresidual.
    `new_residual` is recomputed, because the stored value is rounded. partial: over `chunk` rows
    the sums of `modulate_bwd` and, if there is a gate, that of dresidual * y, which is dgate."""
    b, first = program_chunk(L, chunk)
    dn_sum, d_sum, gate_sum = zero_row(DS), zero_row(DS), zero_row(DS)
    for row in tl.range(first, tl.minimum(first + chunk, L), num_stages=STAGES):
        rows = row + tl.zeros((1, 1), tl.int64)
        y_row = load_rows(y, b, rows, L, D, DS)
        residual_row = load_rows(residual, b, rows, L, D, DS)
        if gate is None:
            new_residual = add(residual_row, y_row)
        else:
            gate_row = load_rows(gate, b, rows, L, D, DS)
            new_residual = add(residual_row, multiply(gate_row, y_row))
        n, rstd = normalise_from_statistics(new_residual, rstd_ptr, mean_ptr, b, rows, L, D, DS)
        d = load_rows(dnormed, b, rows, L, D, DS)
        d, dn_sum, d_sum = modulate_bwd(
            d, n, dn_sum, d_sum, weight_ptr, bias_ptr, scale, dscale_ptr, b, rows, L, D, DS
        )
        d = norm_bwd(d, n, rstd, D, mean_ptr is not None)
        d = add(d, load_rows(dnew_residual, b, rows, L, D, DS))
        store_rows(dresidual_ptr, d, b, rows, L, D, DS)
        if gate is None:
            store_rows(dy_ptr, d, b, rows, L, D, DS)
        else:
            store_rows(dy_ptr, multiply(gate_row, d), b, rows, L, D, DS)
            if dgate_ptr is None:
                gate_sum = add(gate_sum, multiply(d, y_row))
            else:
                store_rows(dgate_ptr, multiply(d, y_row), b, rows, L, D, DS)
    if gate is None:
        store_sums(partial_ptr, 2, (dn_sum, d_sum), D, DS)
    else:
        store_sums(partial_ptr, 3, (dn_sum, d_sum, gate_sum), D, DS)


def gate_residual_norm_fwd(
    y, residual, gate, weight, bias, scale, shift, eps, kind
) -> tuple[Tensor, Tensor, Tensor]:
    """new_residual and normed (B, L, D), and the statistics: rstd and a LayerNorm's mean."""
    B, L, D = y.shape
    new_residual, normed = empty_as(residual), empty_as(residual)
    statistics = y.new_empty(1 + (kind == "layer"), B, L, dtype=torch.float32)
    if new_residual.numel() == 0:
        return new_residual, normed, statistics
    options = tuned("gate_residual_norm_fwd", D, y, forward_options(D))
    arguments = (
        rows_of(y), rows_of(residual), rows_of(gate), contiguous(weight), contiguous(bias),
        rows_of(scale), rows_of(shift), new_residual, normed, *rstd_and_mean(statistics),
        L, eps,
    )  # fmt: skip
    programs = B * blocks(L, options["ROWS"])
    launch(gate_residual_norm_fwd_kernel, programs, arguments, options)
    return new_residual, normed, statistics


def gate_residual_norm_bwd(
    dnew_residual, dnormed, y, residual, gate, weight, bias, scale, shift, statistics
) -> tuple[Tensor | None, ...]:
    """The gradients of y, residual, gate, weight, bias, scale and shift; None for None."""
    B, L, D = y.shape
    dy, dresidual = empty_as(y), empty_as(residual)
    if dy.numel() == 0:
        return dy, dresidual, *zeros_of(gate, weight, bias, scale, shift)
    options = tuned("gate_residual_norm_bwd", D, y, backward_options(D, few=12))
    chunk = rows_per_program(B, L, options)
    chunks = blocks(L, chunk)
    partial = y.new_empty(B, chunks, 2 if gate is None else 3, D, dtype=torch.float32)
    scale_per_token = scale is not None and scale.ndim == 3
    dscale = empty_as(scale) if scale_per_token else None
    dgate = empty_as(gate) if gate is not None and gate.ndim == 3 else None
    arguments = (
        rows_of(dnew_residual), rows_of(dnormed), rows_of(y), rows_of(residual), rows_of(gate),
        contiguous(weight), contiguous(bias), rows_of(scale), *rstd_and_mean(statistics),
        dy, dresidual, dgate, dscale, partial, L, chunk,
    )  # fmt: skip
    stages = row_stages(7, options, y)
    launch(gate_residual_norm_bwd_kernel, B * chunks, arguments, options, STAGES=stages)
    if gate is not None and dgate is None:
        dgate = partial[:, :, 2].sum(1).to(gate.dtype)
    dweight, dbias, dscale_sum, dshift = modulation_grads(
        partial, weight, bias, scale, shift, dnormed
    )
    dscale = dscale if scale_per_token else dscale_sum
    return dy, dresidual, dgate, dweight, dbias, dscale, dshift
