"""Triton kernels of norm_modulate: a row stays in registers between its statistics and output."""

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
    norm_statistics,
    normalise,
    program_chunk,
    program_rows,
    rows_of,
    rows_per_program,
    store_rows,
)


@triton.jit
def norm_modulate_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, out_ptr, rstd_ptr, mean_ptr,
    x_b, x_l, scale_b, scale_l, shift_b, shift_l, L, eps,
    D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, ROWS: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """out = ((x - mean) * rstd * weight + bias) * (1 + scale) + shift"""
    b, rows = program_rows(L, ROWS)
    x0, x1 = load_rows(x_ptr + b * x_b, x_l, rows, L, LO, HI, D)
    mean, rstd = norm_statistics(x0, x1, eps, LO, HI, D, LAYER)
    n0, n1 = normalise(x0, x1, mean, rstd, LO, HI, D, LAYER)
    scale = None if scale_ptr is None else scale_ptr + b * scale_b
    shift = None if shift_ptr is None else shift_ptr + b * shift_b
    out0, out1 = modulate(
        n0, n1, weight_ptr, bias_ptr, scale, scale_l, shift, shift_l, rows, L, LO, HI, D
    )
    store_rows(out_ptr + b * L * D, out0, out1, rows, L, LO, HI, D)
    tl.store(rstd_ptr + b * L + rows, rstd, mask=rows < L)
    if LAYER:
        tl.store(mean_ptr + b * L + rows, mean, mask=rows < L)


@triton.jit
def norm_modulate_bwd_kernel(
    dout_ptr, x_ptr, weight_ptr, bias_ptr, scale_ptr, rstd_ptr, mean_ptr,
    dx_ptr, dscale_ptr, partial_ptr, dout_b, dout_l, x_b, x_l, scale_b, scale_l, L, chunk,
    D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """With n = (x - mean) * rstd, d = dout * (1 + scale) * weight:
    dx = rstd * (d - mean(d) - n * mean(d * n)); partial: sums over `chunk` rows, `modulate_bwd`."""
    b, first = program_chunk(L, chunk)
    dn_sum = (tl.zeros((1, LO), tl.float32), tl.zeros((1, HI), tl.float32))
    d_sum = (tl.zeros((1, LO), tl.float32), tl.zeros((1, HI), tl.float32))
    scale = None if scale_ptr is None else scale_ptr + b * scale_b
    dscale = None if dscale_ptr is None else dscale_ptr + b * L * D
    for row in range(first, tl.minimum(first + chunk, L)):
        rows = row + tl.zeros((1, 1), tl.int64)
        d0, d1 = load_rows(dout_ptr + b * dout_b, dout_l, rows, L, LO, HI, D)
        x0, x1 = load_rows(x_ptr + b * x_b, x_l, rows, L, LO, HI, D)
        rstd = tl.load(rstd_ptr + b * L + rows, mask=rows < L, other=0.0)
        mean = tl.load(mean_ptr + b * L + rows, mask=rows < L, other=0.0) if LAYER else 0.0
        n0, n1 = normalise(x0, x1, mean, rstd, LO, HI, D, LAYER)
        d0, d1, dn_sum, d_sum = modulate_bwd(
            d0, d1, n0, n1, dn_sum, d_sum, weight_ptr, bias_ptr, scale, scale_l, dscale, rows, L,
            LO, HI, D,
        )  # fmt: skip
        dx0, dx1 = norm_bwd(d0, d1, n0, n1, rstd, D, LAYER)
        store_rows(dx_ptr + b * L * D, dx0, dx1, rows, L, LO, HI, D)
    partial_ptr += tl.program_id(0).to(tl.int64) * 2 * D
    store_sums(partial_ptr, dn_sum, LO, HI, D)
    store_sums(partial_ptr + D, d_sum, LO, HI, D)


def norm_modulate_fwd(x, weight, bias, scale, shift, eps, kind) -> tuple[Tensor, Tensor]:
    """out (B, L, D), and the statistics: rstd and, of a LayerNorm, the mean, (1 or 2, B, L)."""
    B, L, D = x.shape
    out = x.new_empty(B, L, D)
    statistics = x.new_empty(1 + (kind == "layer"), B, L, dtype=torch.float32)
    if out.numel() == 0:
        return out, statistics
    x, x_b, x_l = rows_of(x)
    scale, scale_b, scale_l = rows_of(scale)
    shift, shift_b, shift_l = rows_of(shift)
    tile = forward_tile(D)
    norm_modulate_fwd_kernel[(B * blocks(L, tile["ROWS"]),)](
        x, contiguous(weight), contiguous(bias), scale, shift, out, statistics[0], statistics[-1],
        x_b, x_l, scale_b, scale_l, shift_b, shift_l, L, eps,
        LAYER=kind == "layer", **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return out, statistics


def norm_modulate_bwd(dout, x, weight, bias, scale, shift, statistics) -> list[Tensor | None]:
    """dx (B, L, D), and dweight, dbias, dscale, dshift, shaped as what they belong to or None."""
    B, L, D = x.shape
    dx = x.new_empty(B, L, D)
    if dx.numel() == 0:
        parameters = (weight, bias, scale, shift)
        return [dx, *(None if p is None else p.new_zeros(p.shape) for p in parameters)]
    tile = backward_tile(D)
    chunk = rows_per_program(B * L)
    chunks = blocks(L, chunk)
    partial = x.new_empty(B, chunks, 2, D, dtype=torch.float32)
    dscale = scale.new_empty(B, L, D) if scale is not None and scale.ndim == 3 else None
    rows, dout_b, dout_l = rows_of(dout)
    x, x_b, x_l = rows_of(x)
    scale_rows, scale_b, scale_l = rows_of(scale)
    norm_modulate_bwd_kernel[(B * chunks,)](
        rows, x, contiguous(weight), contiguous(bias), scale_rows, statistics[0], statistics[-1],
        dx, dscale, partial, dout_b, dout_l, x_b, x_l, scale_b, scale_l, L, chunk,
        LAYER=len(statistics) == 2, **tile, enable_fp_fusion=True,
    )  # fmt: skip
    grads = modulation_grads(partial, weight, bias, scale, shift, dout)
    return [dx, *grads] if dscale is None else [dx, *grads[:2], dscale, grads[3]]


def aot_calls(head_dim, dtype):
    """Launches at a model's shapes, for `lumina_kernels.aot`: Next-DiT's norm, and DiT's."""
    D = 32 * head_dim
    x, weight = torch.empty(2, 64, D, dtype=dtype), torch.empty(D, dtype=dtype)
    scale, shift, *_ = torch.empty(2, 4 * D, dtype=dtype).chunk(4, 1)
    statistics = torch.empty(2, 2, 64)
    rms, layer = (weight, None, scale, None), (None, None, scale, shift)
    yield "rms fwd", lambda: norm_modulate_fwd(x, *rms, 1e-5, "rms")
    yield "rms bwd", lambda: norm_modulate_bwd(x, x, *rms, statistics[:1])
    yield "layer fwd", lambda: norm_modulate_fwd(x, *layer, 1e-5, "layer")
    yield "layer bwd", lambda: norm_modulate_bwd(x, x, *layer, statistics)
