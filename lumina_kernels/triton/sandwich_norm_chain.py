"""Triton kernels of sandwich_norm_chain: a row stays in registers through both norms."""

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
    store_sums,
    zeros_of,
)
from lumina_kernels.triton._tiles import (
    add,
    blocks,
    load_rows,
    program_chunk,
    program_rows,
    store_rows,
    zero_row,
)
from lumina_kernels.triton._tune import tuned
from lumina_kernels.triton.sandwich_norm import (
    add_branch,
    gate_grads,
    loads_early,
    sandwich,
    sandwich_bwd,
    sandwich_factor,
)


@triton.jit(do_not_specialize=COUNTS)
def sandwich_norm_chain_fwd_kernel(
    y, residual, weight_ptr, gate, next_weight_ptr, next_scale,  # (pointer, stride of b, of l)
    new_residual_ptr, normed_ptr, rstd_ptr, next_rstd_ptr, L, eps,
    TANH: tl.constexpr, EARLY: tl.constexpr, D: tl.constexpr, DS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """new_residual = residual + tanh(gate) * y * rstd * weight,
    normed = new_residual * next_rstd * next_weight * (1 + next_scale)"""
    b, rows = program_rows(L, ROWS)
    if EARLY:
        residual_rows = load_rows(residual, b, rows, L, D, DS)
        factor = sandwich_factor(weight_ptr, gate, b, rows, L, TANH, D, DS)
    y = load_rows(y, b, rows, L, D, DS)
    n = normalise(y, eps, rstd_ptr, None, b, rows, L, D, DS)
    if EARLY:
        new_residual = add_branch(residual_rows, n, factor)
    else:
        new_residual = sandwich(n, residual, weight_ptr, gate, b, rows, L, TANH, D, DS)
    store_rows(new_residual_ptr, new_residual, b, rows, L, D, DS)
    n = normalise(new_residual, eps, next_rstd_ptr, None, b, rows, L, D, DS)
    normed = modulate(n, next_weight_ptr, None, next_scale, None, b, rows, L, D, DS)
    store_rows(normed_ptr, normed, b, rows, L, D, DS)


@triton.jit(do_not_specialize=COUNTS)
def sandwich_norm_chain_bwd_kernel(
    dnew_residual, dnormed, y, residual, weight_ptr, gate, next_weight_ptr, next_scale,
    rstd_ptr, next_rstd_ptr, dy_ptr, dresidual_ptr, dgate_ptr, dscale_ptr, partial_ptr,
    L, chunk, TANH: tl.constexpr, D: tl.constexpr, DS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dresidual = dnew_residual + the gradient of the next norm's input; dy from it as in
    sandwich_norm. `new_residual` is recomputed, because the stored value is rounded. partial:
    over `chunk` rows the sums for next_weight and next_scale, then those for weight and gate."""
    b, first = program_chunk(L, chunk)
    next_sum, unused, gate_sum = zero_row(DS), zero_row(DS), zero_row(DS)
    if dgate_ptr is None:
        factor = sandwich_factor(weight_ptr, gate, b, first, L, TANH, D, DS)
    for row in tl.range(first, tl.minimum(first + chunk, L), num_stages=STAGES):
        rows = row + tl.zeros((1, 1), tl.int64)
        y_row = load_rows(y, b, rows, L, D, DS)
        n, rstd = normalise_from_statistics(y_row, rstd_ptr, None, b, rows, L, D, DS)
        if dgate_ptr is None:
            row_factor = factor
        else:
            row_factor = sandwich_factor(weight_ptr, gate, b, rows, L, TANH, D, DS)
        new_residual = add_branch(load_rows(residual, b, rows, L, D, DS), n, row_factor)
        next_n, next_rstd = normalise_from_statistics(
            new_residual, next_rstd_ptr, None, b, rows, L, D, DS
        )
        d = load_rows(dnormed, b, rows, L, D, DS)
        d, next_sum, unused = modulate_bwd(
            d, next_n, next_sum, unused, next_weight_ptr, None, next_scale, dscale_ptr, b, rows, L,
            D, DS,
        )  # fmt: skip
        d = norm_bwd(d, next_n, next_rstd, D, False)
        d = add(d, load_rows(dnew_residual, b, rows, L, D, DS))
        store_rows(dresidual_ptr, d, b, rows, L, D, DS)
        d, gate_sum = sandwich_bwd(
            d, gate_sum, n, rstd, row_factor, weight_ptr, gate, dgate_ptr, b, rows, L, TANH, D, DS
        )
        store_rows(dy_ptr, d, b, rows, L, D, DS)
    store_sums(partial_ptr, 2, (next_sum, gate_sum), D, DS)


def sandwich_norm_chain_fwd(
    y, residual, weight, gate, next_weight, next_scale, eps, tanh
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """new_residual and normed (B, L, D), rstd and next_rstd (B, L)."""
    B, L, D = y.shape
    new_residual, normed = empty_as(residual), empty_as(residual)
    rstd, next_rstd = (y.new_empty(B, L, dtype=torch.float32) for _ in range(2))
    if new_residual.numel() == 0:
        return new_residual, normed, rstd, next_rstd
    options = tuned("sandwich_norm_chain_fwd", D, y, forward_options(D))
    arguments = (
        rows_of(y), rows_of(residual), contiguous(weight), rows_of(gate), contiguous(next_weight),
        rows_of(next_scale), new_residual, normed, rstd, next_rstd, L, eps,
    )  # fmt: skip
    programs = B * blocks(L, options["ROWS"])
    early = loads_early(y, gate, options)
    launch(sandwich_norm_chain_fwd_kernel, programs, arguments, options, TANH=tanh, EARLY=early)
    return new_residual, normed, rstd, next_rstd


def sandwich_norm_chain_bwd(
    dnew_residual, dnormed, y, residual, weight, gate, next_weight, next_scale, tanh, rstd,
    next_rstd,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of y, residual, weight, gate, next_weight and next_scale; None for None."""
    B, L, D = y.shape
    dy, dresidual = empty_as(y), empty_as(residual)
    if dy.numel() == 0:
        return dy, dresidual, *zeros_of(weight, gate, next_weight, next_scale)
    # A gate with a row per token leaves no factor to hold over the rows, hence registers for more.
    most = 20 if gate is not None and gate.ndim == 3 else 16
    options = tuned("sandwich_norm_chain_bwd", D, y, backward_options(D, most))
    chunk = rows_per_program(B, L, options)
    chunks = blocks(L, chunk)
    partial = y.new_empty(B, chunks, 2, D, dtype=torch.float32)
    scale_per_token = next_scale is not None and next_scale.ndim == 3
    dscale = empty_as(next_scale) if scale_per_token else None
    dgate = empty_as(gate) if gate is not None and gate.ndim == 3 else None
    weight, next_weight = contiguous(weight), contiguous(next_weight)
    arguments = (
        rows_of(dnew_residual), rows_of(dnormed), rows_of(y), rows_of(residual),
        weight, rows_of(gate),
        next_weight, rows_of(next_scale), rstd, next_rstd, dy, dresidual, dgate, dscale, partial,
        L, chunk,
    )  # fmt: skip
    stages = row_stages(7, options, y)
    launch(sandwich_norm_chain_bwd_kernel, B * chunks, arguments, options, TANH=tanh, STAGES=stages)
    dweight, dgate_sum = gate_grads(partial.select(2, 1), weight, gate, tanh)
    dnext_weight, _, dscale_sum, _ = modulation_grads(
        partial, next_weight, None, next_scale, None, dnormed
    )
    dgate = dgate_sum if dgate is None else dgate
    return dy, dresidual, dweight, dgate, dnext_weight, dscale if scale_per_token else dscale_sum
