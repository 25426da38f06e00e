"""Triton kernels of sandwich_norm: a row stays in registers between statistic and output."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._arguments import COUNTS, contiguous, empty_as, rows_of
from lumina_kernels.triton._launch import launch
from lumina_kernels.triton._norm import (
    BLOCK_D,
    SUM_OPTIONS,
    backward_options,
    forward_options,
    norm_bwd,
    row_stages,
    rows_per_program,
    rstd_of,
    store_sums,
    sum_partials,
    zeros_of,
)
from lumina_kernels.triton._tiles import (
    add,
    blocks,
    load_row_values,
    load_rows,
    load_vector,
    multiply,
    program_chunk,
    program_rows,
    scale_by,
    store_row_values,
    store_rows,
    zero_row,
)
from lumina_kernels.triton._tune import tuned


@triton.jit
def tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2|x|); near 0, where 1 - e cancels, the Padé approximant
    [5/4], which is off by at most 3e-9."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    square = x * x
    near = size < 0.6
    above = tl.where(near, size * (945 + square * (105 + square)), 1 - e)
    below = tl.where(near, 945 + square * (420 + square * 15), 1 + e)
    return tl.where(x < 0, -above, above) / below


@triton.jit
def tanh_tile(tile):
    """tanh of a tile."""
    out = ()
    for n in tl.static_range(len(tile)):
        out = out + (tanh(tile[n]),)
    return out


@triton.jit
def one_minus_square(tile):
    """1 - t², the derivative of tanh where t is its value."""
    out = ()
    for n in tl.static_range(len(tile)):
        out = out + (1 - tile[n] * tile[n],)
    return out


@triton.jit
def sandwich_factor(
    weight_ptr, gate, b, rows, L, TANH: tl.constexpr, D: tl.constexpr, DS: tl.constexpr
):
    """tanh(gate) * weight, what the normalised row is multiplied by, without the factor that is
    None; None for neither. Without TANH the gate as it is."""
    factor = None
    if weight_ptr is not None:
        factor = load_vector(weight_ptr, D, DS)
    if gate is not None:
        t = load_rows(gate, b, rows, L, D, DS)
        if TANH:
            t = tanh_tile(t)
        factor = t if weight_ptr is None else multiply(t, factor)
    return factor


@triton.jit
def add_branch(residual, n, factor):
    """residual + factor * n; factor None: 1."""
    return add(residual, n if factor is None else multiply(factor, n))


@triton.jit
def sandwich(
    n, residual, weight_ptr, gate, b, rows, L, TANH: tl.constexpr, D: tl.constexpr, DS: tl.constexpr
):
    """residual + tanh(gate) * n * weight, n the normalised row, without the factors that are None;
    without TANH the gate as it is."""
    if weight_ptr is not None:
        weight = load_vector(weight_ptr, D, DS)
    if gate is not None:
        gates = load_rows(gate, b, rows, L, D, DS)
    residual = load_rows(residual, b, rows, L, D, DS)
    out = ()
    for j in tl.static_range(len(n)):  # a block at a time: on sm_80 that saves registers
        branch = n[j]
        if gate is not None:
            t = tanh(gates[j]) if TANH else gates[j]
        if weight_ptr is not None:
            branch = branch * weight[j]
        if gate is not None:
            branch = t * branch
        out = out + (residual[j] + branch,)
    return out


@triton.jit
def sandwich_bwd(
    d, gate_sum, n, rstd, factor, weight_ptr, gate, dgate_ptr, b, rows, L,
    TANH: tl.constexpr, D: tl.constexpr, DS: tl.constexpr,
):  # fmt: skip
    """Gradient of y from that of the output, d, and the sums over rows of f * d * n, n = y * rstd;
    factor: `sandwich_factor`.

    Where `gate` has a row per token, f is tanh(gate), and the gradient of `gate`,
    (1 - tanh²) * d * n * weight, is stored; without TANH f is the gate, and its gradient d * n *
    weight. Otherwise f is 1: the second stage multiplies by f.
    """
    dn = multiply(d, n)
    if dgate_ptr is None:
        gate_sum = add(gate_sum, dn)
    else:
        t = load_rows(gate, b, rows, L, D, DS)
        if TANH:
            t = tanh_tile(t)
        gate_sum = add(gate_sum, multiply(t, dn))
        dgate = dn
        if TANH:
            dgate = multiply(one_minus_square(t), dgate)
        if weight_ptr is not None:
            dgate = multiply(dgate, load_vector(weight_ptr, D, DS))
        store_rows(dgate_ptr, dgate, b, rows, L, D, DS)
    if factor is not None:
        d = multiply(d, factor)
    return norm_bwd(d, n, rstd, D, False), gate_sum


@triton.jit(do_not_specialize=COUNTS)
def sandwich_norm_fwd_kernel(
    y, residual, weight_ptr, gate,  # rows: (pointer, stride of b, of l)
    out_ptr, rstd_ptr, L, eps,
    TANH: tl.constexpr, EARLY: tl.constexpr, D: tl.constexpr, DS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out = residual + tanh(gate) * y * rstd * weight,  rstd = 1 / sqrt(mean(y²) + eps)"""
    b, rows = program_rows(L, ROWS)
    if EARLY:  # what the output takes is loaded before the warps wait for the statistic
        residual_rows = load_rows(residual, b, rows, L, D, DS)
        factor = sandwich_factor(weight_ptr, gate, b, rows, L, TANH, D, DS)
    y = load_rows(y, b, rows, L, D, DS)
    rstd = rstd_of(y, eps, D)
    store_row_values(rstd_ptr, rstd, b, rows, L)
    n = scale_by(y, rstd)
    if EARLY:
        out = add_branch(residual_rows, n, factor)
    else:
        out = sandwich(n, residual, weight_ptr, gate, b, rows, L, TANH, D, DS)
    store_rows(out_ptr, out, b, rows, L, D, DS)


@triton.jit(do_not_specialize=COUNTS)
def sandwich_norm_bwd_kernel(
    dout, y, weight_ptr, gate, rstd_ptr, dy_ptr, dgate_ptr, partial_ptr,
    L, chunk, TANH: tl.constexpr, D: tl.constexpr, DS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """With n = y * rstd, d = dout * tanh(gate) * weight: dy = rstd * (d - n * mean(d * n));
    partial: `sandwich_bwd`'s sums over `chunk` rows."""
    b, first = program_chunk(L, chunk)
    gate_sum = zero_row(DS)
    if dgate_ptr is None:
        factor = sandwich_factor(weight_ptr, gate, b, first, L, TANH, D, DS)
    for row in tl.range(first, tl.minimum(first + chunk, L), num_stages=STAGES):
        rows = row + tl.zeros((1, 1), tl.int64)
        d = load_rows(dout, b, rows, L, D, DS)
        y_row = load_rows(y, b, rows, L, D, DS)
        rstd = load_row_values(rstd_ptr, b, rows, L)
        if dgate_ptr is None:
            row_factor = factor
        else:
            row_factor = sandwich_factor(weight_ptr, gate, b, rows, L, TANH, D, DS)
        dy, gate_sum = sandwich_bwd(
            d, gate_sum, scale_by(y_row, rstd), rstd, row_factor, weight_ptr, gate, dgate_ptr,
            b, rows, L, TANH, D, DS,
        )  # fmt: skip
        store_rows(dy_ptr, dy, b, rows, L, D, DS)
    store_sums(partial_ptr, 1, (gate_sum,), D, DS)


@triton.jit(do_not_specialize=COUNTS)
def sandwich_norm_gate_kernel(
    partial_ptr, weight_ptr, gate, dweight_ptr, dgate_ptr, B, chunks, sums,
    TANH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From the sums S of dout * n over a sample's rows: dgate = (1 - tanh(gate)²) * weight * S,
    dweight = sum_b tanh(gate) * S; without TANH dgate = weight * S, dweight = sum_b gate * S.
    Without gate S has that factor already, or there is none: dweight = sum_b S."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = columns < D
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    sample = tl.full((), chunks, tl.int64) * sums * D
    for number in range(B):
        b = tl.cast(number, tl.int64)
        first = partial_ptr + b * sample
        S = sum_partials(first, chunks, sums * D, columns, D, BLOCK, BLOCK_D)
        if gate is not None:
            gate_ptr, stride_b = gate
            g = tl.load(gate_ptr + b * stride_b + columns, mask=mask).to(tl.float32)
            slope = 1.0
            if TANH:
                g = tanh(g)
                slope = 1 - g * g
            if weight_ptr is not None:
                slope *= tl.load(weight_ptr + columns, mask=mask).to(tl.float32)
            dgate = (slope * S).to(dgate_ptr.dtype.element_ty)
            tl.store(dgate_ptr + b * D + columns, dgate, mask=mask)
            S = g * S
        dweight += S
    if dweight_ptr is not None:
        tl.store(dweight_ptr + columns, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)


def gate_grads(
    partial: Tensor, weight: Tensor | None, gate: Tensor | None, tanh: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dweight and dgate, None where there is no such parameter or where `gate` has a row per token,
    from the partial sums S (B, chunks, D), a view of (B, chunks, sums, D)."""
    B, chunks, D = partial.shape
    gate = gate if gate is not None and gate.ndim == 2 else None
    dweight, dgate = (None if p is None else empty_as(p) for p in (weight, gate))
    if weight is not None or gate is not None:
        arguments = (
            partial, contiguous(weight), rows_of(gate), dweight, dgate, B, chunks,
            partial.stride(1) // D,
        )  # fmt: skip
        programs = blocks(D, BLOCK_D)
        launch(sandwich_norm_gate_kernel, programs, arguments, SUM_OPTIONS, TANH=tanh, D=D)
    return dweight, dgate


def loads_early(y: Tensor, gate: Tensor | None, options: dict) -> bool:
    """Whether a forward has the registers to load all that a row takes before its statistics."""
    return y.itemsize == 2 and options["ROWS"] <= 4 and (gate is None or gate.ndim == 2)


def sandwich_norm_fwd(y, residual, weight, gate, eps, tanh) -> tuple[Tensor, Tensor]:
    """out (B, L, D) and rstd (B, L)."""
    B, L, D = y.shape
    out = empty_as(residual)
    rstd = y.new_empty(B, L, dtype=torch.float32)
    if out.numel() == 0:
        return out, rstd
    options = tuned("sandwich_norm_fwd", D, y, forward_options(D))
    arguments = (
        rows_of(y), rows_of(residual), contiguous(weight), rows_of(gate), out, rstd, L, eps
    )  # fmt: skip
    programs = B * blocks(L, options["ROWS"])
    early = loads_early(y, gate, options)
    launch(sandwich_norm_fwd_kernel, programs, arguments, options, TANH=tanh, EARLY=early)
    return out, rstd


def sandwich_norm_bwd(dout, y, weight, gate, tanh, rstd) -> tuple[Tensor | None, ...]:
    """dy (B, L, D), dweight (D,) and dgate, shaped as gate; None for None."""
    B, L, D = y.shape
    dy = empty_as(y)
    if dy.numel() == 0:
        return dy, *zeros_of(weight, gate)
    options = tuned("sandwich_norm_bwd", D, y, backward_options(D))
    chunk = rows_per_program(B, L, options)
    chunks = blocks(L, chunk)
    partial = dy.new_empty(B, chunks, D, dtype=torch.float32)
    dgate = empty_as(gate) if gate is not None and gate.ndim == 3 else None
    arguments = (
        rows_of(dout), rows_of(y), contiguous(weight), rows_of(gate), rstd, dy, dgate, partial,
        L, chunk,
    )  # fmt: skip
    stages = row_stages(4, options, y)
    launch(sandwich_norm_bwd_kernel, B * chunks, arguments, options, TANH=tanh, STAGES=stages)
    dweight, dgate_sum = gate_grads(partial, weight, gate, tanh)
    return dy, dweight, dgate_sum if dgate is None else dgate
