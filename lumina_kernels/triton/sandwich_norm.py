"""Triton kernels of sandwich_norm: a row stays in registers between statistic and output."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._norm import (
    BLOCK_D,
    BLOCK_SUMS,
    norm_bwd,
    store_sums,
    sum_partials,
)
from lumina_kernels.triton._tiles import (
    backward_tile,
    blocks,
    contiguous,
    forward_tile,
    load_modulation,
    load_rows,
    load_vector,
    program_chunk,
    program_rows,
    row_sum,
    rows_of,
    rows_per_program,
    store_rows,
    tanh,
)


@triton.jit
def sandwich(
    n0, n1, residual_ptr, residual_l, weight_ptr, gate_ptr, gate_l, rows, L,
    LO: tl.constexpr, HI: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """residual + tanh(gate) * n * weight, n the normalised row"""
    w0, w1 = load_vector(weight_ptr, LO, HI, D)
    g0, g1 = load_modulation(gate_ptr, gate_l, rows, L, LO, HI, D)
    r0, r1 = load_rows(residual_ptr, residual_l, rows, L, LO, HI, D)
    return r0 + tanh(g0) * (n0 * w0), r1 + tanh(g1) * (n1 * w1)


@triton.jit
def sandwich_bwd(
    d0, d1, gate_sum, n0, n1, rstd, weight_ptr, gate_ptr, gate_l, dgate_ptr, rows, L,
    LO: tl.constexpr, HI: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradient of y from that of the output, d, and the sums over rows of f * d * n, n = y * rstd.

    f is tanh(gate) where `gate` has a row per token: then its gradient (1 - tanh²) * d * n * weight
    is written to `dgate_ptr`. Else f is 1, and the second stage knows the gate.
    """
    s0, s1 = gate_sum
    w0, w1 = load_vector(weight_ptr, LO, HI, D)
    g0, g1 = load_modulation(gate_ptr, gate_l, rows, L, LO, HI, D)
    g0, g1 = tanh(g0), tanh(g1)
    if dgate_ptr is None:
        s0, s1 = s0 + d0 * n0, s1 + d1 * n1
    else:
        s0, s1 = s0 + g0 * d0 * n0, s1 + g1 * d1 * n1
        dg0, dg1 = (1 - g0 * g0) * d0 * n0 * w0, (1 - g1 * g1) * d1 * n1 * w1
        store_rows(dgate_ptr, dg0, dg1, rows, L, LO, HI, D)
    dy0, dy1 = norm_bwd(d0 * g0 * w0, d1 * g1 * w1, n0, n1, rstd, D, False)
    return dy0, dy1, (s0, s1)


@triton.jit
def sandwich_norm_fwd_kernel(
    y_ptr, residual_ptr, weight_ptr, gate_ptr, out_ptr, rstd_ptr,
    y_b, y_l, residual_b, residual_l, gate_b, gate_l, L, eps,
    D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out = residual + tanh(gate) * y * rstd * weight,  rstd = 1 / sqrt(mean(y²) + eps)"""
    b, rows = program_rows(L, ROWS)
    y0, y1 = load_rows(y_ptr + b * y_b, y_l, rows, L, LO, HI, D)
    rstd = tl.rsqrt(row_sum(y0 * y0, y1 * y1) / D + eps)
    tl.store(rstd_ptr + b * L + rows, rstd, mask=rows < L)
    out0, out1 = sandwich(
        y0 * rstd, y1 * rstd, residual_ptr + b * residual_b, residual_l, weight_ptr,
        gate_ptr + b * gate_b, gate_l, rows, L, LO, HI, D,
    )  # fmt: skip
    store_rows(out_ptr + b * L * D, out0, out1, rows, L, LO, HI, D)


@triton.jit
def sandwich_norm_bwd_kernel(
    dout_ptr, y_ptr, weight_ptr, gate_ptr, rstd_ptr, dy_ptr, dgate_ptr, partial_ptr,
    dout_b, dout_l, y_b, y_l, gate_b, gate_l, L, chunk,
    D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    """With n = y * rstd, d = dout * tanh(gate) * weight: dy = rstd * (d - n * mean(d * n));
    partial: sums over `chunk` rows, see `sandwich_bwd`."""
    b, first = program_chunk(L, chunk)
    gate_sum = (tl.zeros((1, LO), tl.float32), tl.zeros((1, HI), tl.float32))
    dgate = None if dgate_ptr is None else dgate_ptr + b * L * D
    for row in range(first, tl.minimum(first + chunk, L)):
        rows = row + tl.zeros((1, 1), tl.int64)
        d0, d1 = load_rows(dout_ptr + b * dout_b, dout_l, rows, L, LO, HI, D)
        y0, y1 = load_rows(y_ptr + b * y_b, y_l, rows, L, LO, HI, D)
        rstd = tl.load(rstd_ptr + b * L + rows, mask=rows < L, other=0.0)
        dy0, dy1, gate_sum = sandwich_bwd(
            d0, d1, gate_sum, y0 * rstd, y1 * rstd, rstd, weight_ptr,
            gate_ptr + b * gate_b, gate_l, dgate, rows, L, LO, HI, D,
        )  # fmt: skip
        store_rows(dy_ptr + b * L * D, dy0, dy1, rows, L, LO, HI, D)
    store_sums(partial_ptr + tl.program_id(0).to(tl.int64) * D, gate_sum, LO, HI, D)


@triton.jit
def sandwich_norm_gate_kernel(
    partial_ptr, weight_ptr, gate_ptr, dweight_ptr, dgate_ptr, gate_b, B, chunks, sums,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of the sums S of dout * n over a sample's rows: dgate = (1 - tanh(gate)²) * weight * S,
    dweight = sum_b tanh(gate) * S; without gate, S has that factor and dweight = sum_b S."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    there = columns < D
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    sample = tl.full((), chunks, tl.int64) * sums * D
    for b in range(B):
        first = partial_ptr + b * sample
        S = sum_partials(first, chunks, sums * D, columns, D, BLOCK, BLOCK_D)
        if gate_ptr is not None:
            g = tanh(tl.load(gate_ptr + b * gate_b + columns, mask=there).to(tl.float32))
            w = tl.load(weight_ptr + columns, mask=there).to(tl.float32)
            dgate = ((1 - g * g) * w * S).to(dgate_ptr.dtype.element_ty)
            tl.store(dgate_ptr + b * D + columns, dgate, mask=there)
            S = g * S
        dweight += S
    tl.store(dweight_ptr + columns, dweight.to(dweight_ptr.dtype.element_ty), mask=there)


def gate_grads(partial: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor | None]:
    """dweight, and dgate (None where `gate` has a row per token), from the partial sums S
    (B, chunks, D), a view of (B, chunks, sums, D)."""
    B, chunks, D = partial.shape
    dweight, dgate = weight.new_empty(D), None
    gate = gate if gate.ndim == 2 else None
    if gate is not None:
        dgate = gate.new_empty(B, D)
    gate, gate_b, _ = rows_of(gate)
    sandwich_norm_gate_kernel[(blocks(D, BLOCK_D),)](
        partial, contiguous(weight), gate, dweight, dgate,
        gate_b, B, chunks, partial.stride(1) // D, D=D, BLOCK=BLOCK_SUMS,
        BLOCK_D=BLOCK_D, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return dweight, dgate


def sandwich_norm_fwd(y, residual, weight, gate, eps) -> tuple[Tensor, Tensor]:
    """out (B, L, D) and rstd (B, L)."""
    B, L, D = y.shape
    out = residual.new_empty(B, L, D)
    rstd = y.new_empty(B, L, dtype=torch.float32)
    if out.numel() == 0:
        return out, rstd
    y, y_b, y_l = rows_of(y)
    residual, residual_b, residual_l = rows_of(residual)
    gate, gate_b, gate_l = rows_of(gate)
    tile = forward_tile(D)
    sandwich_norm_fwd_kernel[(B * blocks(L, tile["ROWS"]),)](
        y, residual, contiguous(weight), gate, out, rstd,
        y_b, y_l, residual_b, residual_l, gate_b, gate_l, L, eps, **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return out, rstd


def sandwich_norm_bwd(dout, y, weight, gate, rstd) -> tuple[Tensor, Tensor, Tensor]:
    """dy (B, L, D), dweight (D,) and dgate, shaped as gate."""
    B, L, D = y.shape
    dy = y.new_empty(B, L, D)
    if dy.numel() == 0:
        return dy, torch.zeros_like(weight), gate.new_zeros(gate.shape)
    dout, dout_b, dout_l = rows_of(dout)
    y, y_b, y_l = rows_of(y)
    gate, gate_b, gate_l = rows_of(gate)
    tile = backward_tile(D)
    chunk = rows_per_program(B * L)
    chunks = blocks(L, chunk)
    partial = dy.new_empty(B, chunks, D, dtype=torch.float32)
    dgate = gate.new_empty(B, L, D) if gate.ndim == 3 else None
    sandwich_norm_bwd_kernel[(B * chunks,)](
        dout, y, contiguous(weight), gate, rstd, dy, dgate, partial,
        dout_b, dout_l, y_b, y_l, gate_b, gate_l, L, chunk, **tile, enable_fp_fusion=True,
    )  # fmt: skip
    dweight, per_sample = gate_grads(partial, weight, gate)
    return dy, dweight, per_sample if dgate is None else dgate


def aot_calls(head_dim, dtype):
    """Launches at a model's shapes, for `lumina_kernels.aot`."""
    D = 32 * head_dim
    y, weight = torch.empty(2, 64, D, dtype=dtype), torch.empty(D, dtype=dtype)
    gate = torch.empty(2, 4 * D, dtype=dtype).chunk(4, 1)[1]
    rstd = torch.empty(2, 64)
    yield "fwd", lambda: sandwich_norm_fwd(y, y, weight, gate, 1e-5)
    yield "bwd", lambda: sandwich_norm_bwd(y, y, weight, gate, rstd)
