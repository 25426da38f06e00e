"""Triton kernels of gate_residual_norm: a row stays in registers from the sum to the norm."""

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
    load_modulation,
    load_rows,
    norm_statistics,
    normalise,
    program_chunk,
    program_rows,
    rows_of,
    rows_per_program,
    store_rows,
)


@triton.jit
def gate_residual_norm_fwd_kernel(
    y_ptr, residual_ptr, gate_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    new_ptr, normed_ptr, rstd_ptr, mean_ptr,
    y_b, y_l, residual_b, residual_l, gate_b, gate_l, scale_b, scale_l, shift_b, shift_l, L, eps,
    D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, ROWS: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """new = residual + gate * y, normed = (norm(new) * weight + bias) * (1 + scale) + shift"""
    b, rows = program_rows(L, ROWS)
    y0, y1 = load_rows(y_ptr + b * y_b, y_l, rows, L, LO, HI, D)
    r0, r1 = load_rows(residual_ptr + b * residual_b, residual_l, rows, L, LO, HI, D)
    g0, g1 = load_modulation(gate_ptr + b * gate_b, gate_l, rows, L, LO, HI, D)
    r0, r1 = r0 + g0 * y0, r1 + g1 * y1
    store_rows(new_ptr + b * L * D, r0, r1, rows, L, LO, HI, D)
    mean, rstd = norm_statistics(r0, r1, eps, LO, HI, D, LAYER)
    tl.store(rstd_ptr + b * L + rows, rstd, mask=rows < L)
    if LAYER:
        tl.store(mean_ptr + b * L + rows, mean, mask=rows < L)
    n0, n1 = normalise(r0, r1, mean, rstd, LO, HI, D, LAYER)
    scale = None if scale_ptr is None else scale_ptr + b * scale_b
    shift = None if shift_ptr is None else shift_ptr + b * shift_b
    out0, out1 = modulate(
        n0, n1, weight_ptr, bias_ptr, scale, scale_l, shift, shift_l, rows, L, LO, HI, D
    )
    store_rows(normed_ptr + b * L * D, out0, out1, rows, L, LO, HI, D)


@triton.jit
def gate_residual_norm_bwd_kernel(
    dnew_ptr, dnormed_ptr, y_ptr, residual_ptr, gate_ptr, weight_ptr, bias_ptr, scale_ptr,
    rstd_ptr, mean_ptr, dy_ptr, dresidual_ptr, dgate_ptr, dscale_ptr, partial_ptr,
    dnew_b, dnew_l, dnormed_b, dnormed_l, y_b, y_l, residual_b, residual_l,
    gate_b, gate_l, scale_b, scale_l, L, chunk,
    D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """dresidual = dnew + that of the norm's input, dy = gate * dresidual; `new` is computed again
    rather than read rounded. partial: sums over `chunk` rows, `modulate_bwd`, and of
    dresidual * y, which is dgate."""
    b, first = program_chunk(L, chunk)
    dn_sum = (tl.zeros((1, LO), tl.float32), tl.zeros((1, HI), tl.float32))
    d_sum = (tl.zeros((1, LO), tl.float32), tl.zeros((1, HI), tl.float32))
    s0, s1 = tl.zeros((1, LO), tl.float32), tl.zeros((1, HI), tl.float32)
    scale = None if scale_ptr is None else scale_ptr + b * scale_b
    dscale = None if dscale_ptr is None else dscale_ptr + b * L * D
    for row in range(first, tl.minimum(first + chunk, L)):
        rows = row + tl.zeros((1, 1), tl.int64)
        y0, y1 = load_rows(y_ptr + b * y_b, y_l, rows, L, LO, HI, D)
        n0, n1 = load_rows(residual_ptr + b * residual_b, residual_l, rows, L, LO, HI, D)
        g0, g1 = load_modulation(gate_ptr + b * gate_b, gate_l, rows, L, LO, HI, D)
        rstd = tl.load(rstd_ptr + b * L + rows, mask=rows < L, other=0.0)
        mean = tl.load(mean_ptr + b * L + rows, mask=rows < L, other=0.0) if LAYER else 0.0
        n0, n1 = normalise(n0 + g0 * y0, n1 + g1 * y1, mean, rstd, LO, HI, D, LAYER)
        d0, d1 = load_rows(dnormed_ptr + b * dnormed_b, dnormed_l, rows, L, LO, HI, D)
        d0, d1, dn_sum, d_sum = modulate_bwd(
            d0, d1, n0, n1, dn_sum, d_sum, weight_ptr, bias_ptr, scale, scale_l, dscale, rows, L,
            LO, HI, D,
        )  # fmt: skip
        d0, d1 = norm_bwd(d0, d1, n0, n1, rstd, D, LAYER)
        e0, e1 = load_rows(dnew_ptr + b * dnew_b, dnew_l, rows, L, LO, HI, D)
        d0, d1 = d0 + e0, d1 + e1
        store_rows(dresidual_ptr + b * L * D, d0, d1, rows, L, LO, HI, D)
        store_rows(dy_ptr + b * L * D, g0 * d0, g1 * d1, rows, L, LO, HI, D)
        if dgate_ptr is None:
            s0, s1 = s0 + d0 * y0, s1 + d1 * y1
        else:
            store_rows(dgate_ptr + b * L * D, d0 * y0, d1 * y1, rows, L, LO, HI, D)
    partial_ptr += tl.program_id(0).to(tl.int64) * 3 * D
    store_sums(partial_ptr, dn_sum, LO, HI, D)
    store_sums(partial_ptr + D, d_sum, LO, HI, D)
    store_sums(partial_ptr + 2 * D, (s0, s1), LO, HI, D)


def gate_residual_norm_fwd(
    y, residual, gate, weight, bias, scale, shift, eps, kind
) -> tuple[Tensor, Tensor, Tensor]:
    """new and normed (B, L, D), and the statistics: rstd and, of a LayerNorm, the mean."""
    B, L, D = y.shape
    new, normed = residual.new_empty(B, L, D), residual.new_empty(B, L, D)
    statistics = y.new_empty(1 + (kind == "layer"), B, L, dtype=torch.float32)
    if new.numel() == 0:
        return new, normed, statistics
    y, y_b, y_l = rows_of(y)
    residual, residual_b, residual_l = rows_of(residual)
    gate, gate_b, gate_l = rows_of(gate)
    scale, scale_b, scale_l = rows_of(scale)
    shift, shift_b, shift_l = rows_of(shift)
    tile = forward_tile(D)
    gate_residual_norm_fwd_kernel[(B * blocks(L, tile["ROWS"]),)](
        y, residual, gate, contiguous(weight), contiguous(bias), scale, shift,
        new, normed, statistics[0], statistics[-1],
        y_b, y_l, residual_b, residual_l, gate_b, gate_l, scale_b, scale_l, shift_b, shift_l,
        L, eps, LAYER=kind == "layer", **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return new, normed, statistics


def gate_residual_norm_bwd(
    dnew, dnormed, y, residual, gate, weight, bias, scale, shift, statistics
) -> list[Tensor | None]:
    """The gradients of the seven tensors, None where there is none."""
    B, L, D = y.shape
    dy, dresidual = y.new_empty(B, L, D), residual.new_empty(B, L, D)
    if dy.numel() == 0:
        parameters = (gate, weight, bias, scale, shift)
        return [dy, dresidual, *(None if p is None else p.new_zeros(p.shape) for p in parameters)]
    tile = backward_tile(D)
    chunk = rows_per_program(B * L)
    chunks = blocks(L, chunk)
    partial = y.new_empty(B, chunks, 3, D, dtype=torch.float32)
    dscale = scale.new_empty(B, L, D) if scale is not None and scale.ndim == 3 else None
    dgate = gate.new_empty(B, L, D) if gate.ndim == 3 else None
    dnew, dnew_b, dnew_l = rows_of(dnew)
    dnormed_rows, dnormed_b, dnormed_l = rows_of(dnormed)
    y, y_b, y_l = rows_of(y)
    residual, residual_b, residual_l = rows_of(residual)
    gate_rows, gate_b, gate_l = rows_of(gate)
    scale_rows, scale_b, scale_l = rows_of(scale)
    gate_residual_norm_bwd_kernel[(B * chunks,)](
        dnew, dnormed_rows, y, residual, gate_rows, contiguous(weight), contiguous(bias),
        scale_rows, statistics[0], statistics[-1], dy, dresidual, dgate, dscale, partial,
        dnew_b, dnew_l, dnormed_b, dnormed_l, y_b, y_l, residual_b, residual_l,
        gate_b, gate_l, scale_b, scale_l, L, chunk,
        LAYER=len(statistics) == 2, **tile, enable_fp_fusion=True,
    )  # fmt: skip
    if dgate is None:
        dgate = partial[:, :, 2].sum(1).to(gate.dtype)
    dweight, dbias, per_sample, dshift = modulation_grads(
        partial, weight, bias, scale, shift, dnormed
    )
    return [
        dy, dresidual, dgate, dweight, dbias, per_sample if dscale is None else dscale, dshift
    ]  # fmt: skip


def aot_calls(head_dim, dtype):
    """Launches at a model's shapes, for `lumina_kernels.aot`."""
    D = 32 * head_dim
    y = torch.empty(2, 64, D, dtype=dtype)
    gate, scale, shift, _ = torch.empty(2, 4 * D, dtype=dtype).chunk(4, 1)
    statistics = torch.empty(2, 2, 64)
    parameters = (gate, None, None, scale, shift)
    yield "fwd", lambda: gate_residual_norm_fwd(y, y, *parameters, 1e-6, "layer")
    yield "bwd", lambda: gate_residual_norm_bwd(y, y, y, y, *parameters, statistics)
