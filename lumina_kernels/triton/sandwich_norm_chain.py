"""Triton kernels of sandwich_norm_chain: a row stays in registers through both norms."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._norm import (
    modulate,
    modulate_bwd,
    modulation_grads,
    norm_bwd,
    store_sums,
)
from lumina_kernels.triton._tiles import (
    backward_tile,
    blocks,
    contiguous,
    forward_tile,
    load_rows,
    program_chunk,
    program_rows,
    row_sum,
    rows_of,
    rows_per_program,
    store_rows,
)
from lumina_kernels.triton.sandwich_norm import gate_grads, sandwich, sandwich_bwd


@triton.jit
def sandwich_norm_chain_fwd_kernel(
    y_ptr, residual_ptr, weight_ptr, gate_ptr, next_weight_ptr, next_scale_ptr,
    new_ptr, normed_ptr, rstd_ptr, next_rstd_ptr,
    y_b, y_l, residual_b, residual_l, gate_b, gate_l, scale_b, scale_l, L, eps,
    D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """new = residual + tanh(gate) * y * rstd * weight,
    normed = new * next_rstd * next_weight * (1 + next_scale)"""
    b, rows = program_rows(L, ROWS)
    y0, y1 = load_rows(y_ptr + b * y_b, y_l, rows, L, LO, HI, D)
    rstd = tl.rsqrt(row_sum(y0 * y0, y1 * y1) / D + eps)
    tl.store(rstd_ptr + b * L + rows, rstd, mask=rows < L)
    new0, new1 = sandwich(
        y0 * rstd, y1 * rstd, residual_ptr + b * residual_b, residual_l, weight_ptr,
        gate_ptr + b * gate_b, gate_l, rows, L, LO, HI, D,
    )  # fmt: skip
    store_rows(new_ptr + b * L * D, new0, new1, rows, L, LO, HI, D)
    rstd = tl.rsqrt(row_sum(new0 * new0, new1 * new1) / D + eps)
    tl.store(next_rstd_ptr + b * L + rows, rstd, mask=rows < L)
    scale = None if next_scale_ptr is None else next_scale_ptr + b * scale_b
    out0, out1 = modulate(
        new0 * rstd, new1 * rstd, next_weight_ptr, None, scale, scale_l, None, 0, rows, L, LO, HI, D
    )
    store_rows(normed_ptr + b * L * D, out0, out1, rows, L, LO, HI, D)


@triton.jit
def sandwich_norm_chain_bwd_kernel(
    dnew_ptr, dnormed_ptr, y_ptr, residual_ptr, weight_ptr, gate_ptr, next_weight_ptr,
    next_scale_ptr, rstd_ptr, next_rstd_ptr, dy_ptr, dresidual_ptr, dgate_ptr, dscale_ptr,
    partial_ptr, dnew_b, dnew_l, dnormed_b, dnormed_l, y_b, y_l, residual_b, residual_l,
    gate_b, gate_l, scale_b, scale_l, L, chunk,
    D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    """dresidual = dnew + that of the next norm's input, with `new` computed again rather than read
    rounded; dy from it as in sandwich_norm. partial: sums over `chunk` rows for next_weight and
    next_scale, then for weight and gate."""
    b, first = program_chunk(L, chunk)
    next_sum = (tl.zeros((1, LO), tl.float32), tl.zeros((1, HI), tl.float32))
    unused = (tl.zeros((1, LO), tl.float32), tl.zeros((1, HI), tl.float32))
    gate_sum = (tl.zeros((1, LO), tl.float32), tl.zeros((1, HI), tl.float32))
    scale = None if next_scale_ptr is None else next_scale_ptr + b * scale_b
    dscale = None if dscale_ptr is None else dscale_ptr + b * L * D
    dgate = None if dgate_ptr is None else dgate_ptr + b * L * D
    for row in range(first, tl.minimum(first + chunk, L)):
        rows = row + tl.zeros((1, 1), tl.int64)
        y0, y1 = load_rows(y_ptr + b * y_b, y_l, rows, L, LO, HI, D)
        rstd = tl.load(rstd_ptr + b * L + rows, mask=rows < L, other=0.0)
        y0, y1 = y0 * rstd, y1 * rstd
        n0, n1 = sandwich(
            y0, y1, residual_ptr + b * residual_b, residual_l, weight_ptr,
            gate_ptr + b * gate_b, gate_l, rows, L, LO, HI, D,
        )  # fmt: skip
        next_rstd = tl.load(next_rstd_ptr + b * L + rows, mask=rows < L, other=0.0)
        n0, n1 = n0 * next_rstd, n1 * next_rstd
        d0, d1 = load_rows(dnormed_ptr + b * dnormed_b, dnormed_l, rows, L, LO, HI, D)
        d0, d1, next_sum, unused = modulate_bwd(
            d0, d1, n0, n1, next_sum, unused, next_weight_ptr, None, scale, scale_l, dscale, rows,
            L, LO, HI, D,
        )  # fmt: skip
        d0, d1 = norm_bwd(d0, d1, n0, n1, next_rstd, D, False)
        e0, e1 = load_rows(dnew_ptr + b * dnew_b, dnew_l, rows, L, LO, HI, D)
        d0, d1 = d0 + e0, d1 + e1
        store_rows(dresidual_ptr + b * L * D, d0, d1, rows, L, LO, HI, D)
        d0, d1, gate_sum = sandwich_bwd(
            d0, d1, gate_sum, y0, y1, rstd, weight_ptr, gate_ptr + b * gate_b, gate_l, dgate,
            rows, L, LO, HI, D,
        )  # fmt: skip
        store_rows(dy_ptr + b * L * D, d0, d1, rows, L, LO, HI, D)
    partial_ptr += tl.program_id(0).to(tl.int64) * 2 * D
    store_sums(partial_ptr, next_sum, LO, HI, D)
    store_sums(partial_ptr + D, gate_sum, LO, HI, D)


def sandwich_norm_chain_fwd(
    y, residual, weight, gate, next_weight, next_scale, eps
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """new and normed (B, L, D), rstd and next_rstd (B, L)."""
    B, L, D = y.shape
    new, normed = residual.new_empty(B, L, D), residual.new_empty(B, L, D)
    rstd, next_rstd = (y.new_empty(B, L, dtype=torch.float32) for _ in range(2))
    if new.numel() == 0:
        return new, normed, rstd, next_rstd
    y, y_b, y_l = rows_of(y)
    residual, residual_b, residual_l = rows_of(residual)
    gate, gate_b, gate_l = rows_of(gate)
    next_scale, scale_b, scale_l = rows_of(next_scale)
    tile = forward_tile(D)
    sandwich_norm_chain_fwd_kernel[(B * blocks(L, tile["ROWS"]),)](
        y, residual, contiguous(weight), gate, contiguous(next_weight), next_scale,
        new, normed, rstd, next_rstd,
        y_b, y_l, residual_b, residual_l, gate_b, gate_l, scale_b, scale_l, L, eps,
        **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return new, normed, rstd, next_rstd


def sandwich_norm_chain_bwd(
    dnew, dnormed, y, residual, weight, gate, next_weight, next_scale, rstd, next_rstd
) -> list[Tensor | None]:
    """dy and dresidual (B, L, D), and the gradients of weight, gate, next_weight, next_scale."""
    B, L, D = y.shape
    dy, dresidual = y.new_empty(B, L, D), residual.new_empty(B, L, D)
    if dy.numel() == 0:
        parameters = (weight, gate, next_weight, next_scale)
        return [dy, dresidual, *(None if p is None else p.new_zeros(p.shape) for p in parameters)]
    tile = backward_tile(D)
    chunk = rows_per_program(B * L)
    chunks = blocks(L, chunk)
    partial = y.new_empty(B, chunks, 2, D, dtype=torch.float32)
    per_token = next_scale is not None and next_scale.ndim == 3
    dscale = next_scale.new_empty(B, L, D) if per_token else None
    dgate = gate.new_empty(B, L, D) if gate.ndim == 3 else None
    dnew, dnew_b, dnew_l = rows_of(dnew)
    dnormed, dnormed_b, dnormed_l = rows_of(dnormed)
    y, y_b, y_l = rows_of(y)
    residual, residual_b, residual_l = rows_of(residual)
    gate, gate_b, gate_l = rows_of(gate)
    next_scale, scale_b, scale_l = rows_of(next_scale)
    weight, next_weight = contiguous(weight), contiguous(next_weight)
    sandwich_norm_chain_bwd_kernel[(B * chunks,)](
        dnew, dnormed, y, residual, weight, gate, next_weight, next_scale, rstd, next_rstd,
        dy, dresidual, dgate, dscale, partial,
        dnew_b, dnew_l, dnormed_b, dnormed_l, y_b, y_l, residual_b, residual_l,
        gate_b, gate_l, scale_b, scale_l, L, chunk, **tile, enable_fp_fusion=True,
    )  # fmt: skip
    dweight, dgate_sum = gate_grads(partial.select(2, 1), weight, gate)
    dnext_weight, _, dscale_sum, _ = modulation_grads(
        partial, next_weight, None, next_scale, None, dnormed
    )
    return [
        dy, dresidual, dweight, dgate_sum if dgate is None else dgate,
        dnext_weight, dscale if per_token else dscale_sum,
    ]  # fmt: skip


def aot_calls(head_dim, dtype):
    """Launches at a model's shapes, for `lumina_kernels.aot`."""
    D = 32 * head_dim
    y, weight = torch.empty(2, 64, D, dtype=dtype), torch.empty(D, dtype=dtype)
    _, gate, scale, _ = torch.empty(2, 4 * D, dtype=dtype).chunk(4, 1)
    rstd = torch.empty(2, 64)
    parameters = (weight, gate, weight, scale)
    yield "fwd", lambda: sandwich_norm_chain_fwd(y, y, *parameters, 1e-5)
    yield "bwd", lambda: sandwich_norm_chain_bwd(y, y, y, y, *parameters, rstd, rstd)
