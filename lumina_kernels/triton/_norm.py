"""The modulated norm y = (n * weight + bias) * (1 + scale) + shift, n = norm(x), as the kernels of
three ops have it, and the second stage of its parameters' gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._tiles import (
    blocks,
    contiguous,
    load_modulation,
    load_vector,
    row_sum,
    rows_of,
    store_rows,
)

# Columns that a program of the second stage adds up, and partial sums it reads at once.
BLOCK_D, BLOCK_SUMS = 64, 32


@triton.jit
def modulate(
    n0, n1, weight_ptr, bias_ptr, scale_ptr, scale_l, shift_ptr, shift_l, rows, L,
    LO: tl.constexpr, HI: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """(n * weight + bias) * (1 + scale) + shift of both parts, None leaves its term out."""
    if weight_ptr is not None:
        p0, p1 = load_vector(weight_ptr, LO, HI, D)
        n0, n1 = n0 * p0, n1 * p1
    if bias_ptr is not None:
        p0, p1 = load_vector(bias_ptr, LO, HI, D)
        n0, n1 = n0 + p0, n1 + p1
    if scale_ptr is not None:
        p0, p1 = load_modulation(scale_ptr, scale_l, rows, L, LO, HI, D)
        n0, n1 = n0 * (1 + p0), n1 * (1 + p1)
    if shift_ptr is not None:
        p0, p1 = load_modulation(shift_ptr, shift_l, rows, L, LO, HI, D)
        n0, n1 = n0 + p0, n1 + p1
    return n0, n1


@triton.jit
def modulate_bwd(
    d0, d1, n0, n1, dn_sum, d_sum, weight_ptr, bias_ptr, scale_ptr, scale_l, dscale_ptr, rows, L,
    LO: tl.constexpr, HI: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradient of n from that of y, and the sums over rows of f * d * n and f * d.

    f is 1 + scale where `scale` has a row per token: then its gradient d * (n * weight + bias) is
    written to `dscale_ptr`. Else f is 1, and the second stage knows scale.
    """
    a0, a1 = dn_sum
    e0, e1 = d_sum
    w0, w1 = tl.full((1, 1), 1.0, tl.float32), tl.full((1, 1), 1.0, tl.float32)
    if weight_ptr is not None:
        w0, w1 = load_vector(weight_ptr, LO, HI, D)
    if dscale_ptr is None:
        a0, a1, e0, e1 = a0 + d0 * n0, a1 + d1 * n1, e0 + d0, e1 + d1
    else:
        s0, s1 = n0 * w0, n1 * w1
        if bias_ptr is not None:
            b0, b1 = load_vector(bias_ptr, LO, HI, D)
            s0, s1 = s0 + b0, s1 + b1
        store_rows(dscale_ptr, d0 * s0, d1 * s1, rows, L, LO, HI, D)
    if scale_ptr is not None:
        s0, s1 = load_modulation(scale_ptr, scale_l, rows, L, LO, HI, D)
        d0, d1 = d0 * (1 + s0), d1 * (1 + s1)
    if dscale_ptr is not None:
        a0, a1, e0, e1 = a0 + d0 * n0, a1 + d1 * n1, e0 + d0, e1 + d1
    return d0 * w0, d1 * w1, (a0, a1), (e0, e1)


@triton.jit
def norm_bwd(d0, d1, n0, n1, rstd, D: tl.constexpr, LAYER: tl.constexpr):
    """Gradient of a norm's input: rstd * (d - mean(d) - n * mean(d * n)), d that of its output n;
    an RMS norm has no mean(d)."""
    along = row_sum(d0 * n0, d1 * n1) / D
    mean = row_sum(d0, d1) / D if LAYER else tl.zeros_like(along)
    return rstd * (d0 - mean - n0 * along), rstd * (d1 - mean - n1 * along)


@triton.jit
def store_sums(ptr, sums, LO: tl.constexpr, HI: tl.constexpr, D: tl.constexpr):
    """Partial sums of a program, (1, LO) and (1, HI), to D float32 values."""
    lo, hi = sums
    store_rows(ptr, lo, hi, tl.zeros((1, 1), tl.int64), 1, LO, HI, D)


@triton.jit
def sum_partials(
    ptr, count, step, columns, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Sum of `count` rows, `step` apart, in an order that does not depend on the run."""
    total = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for first in range(0, count, BLOCK):
        row = first + tl.arange(0, BLOCK)[:, None].to(tl.int64)
        there = (row < count) & (columns < D)[None, :]
        total += tl.load(ptr + row * step + columns[None, :], mask=there, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def modulation_grads_kernel(
    partial_ptr, weight_ptr, bias_ptr, scale_ptr, dweight_ptr, dbias_ptr, dscale_ptr, dshift_ptr,
    scale_b, B, chunks, sums, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of the sums A of f * d * n and E of f * d over a sample's rows: dscale = A * weight + E *
    bias, dshift = E, dweight = sum_b (1 + scale) * A, dbias = sum_b (1 + scale) * E."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    there = columns < D
    dweight, dbias = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    sample = tl.full((), chunks, tl.int64) * sums * D
    for b in range(B):
        first = partial_ptr + b * sample
        A = sum_partials(first, chunks, sums * D, columns, D, BLOCK, BLOCK_D)
        E = sum_partials(first + D, chunks, sums * D, columns, D, BLOCK, BLOCK_D)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + b * D + columns, E.to(dshift_ptr.dtype.element_ty), mask=there)
        if scale_ptr is not None:
            dscale = A
            if weight_ptr is not None:
                dscale *= tl.load(weight_ptr + columns, mask=there).to(tl.float32)
            if bias_ptr is not None:
                dscale += E * tl.load(bias_ptr + columns, mask=there).to(tl.float32)
            dtype = dscale_ptr.dtype.element_ty
            tl.store(dscale_ptr + b * D + columns, dscale.to(dtype), mask=there)
            scale = tl.load(scale_ptr + b * scale_b + columns, mask=there).to(tl.float32)
            A, E = A * (1 + scale), E * (1 + scale)
        dweight, dbias = dweight + A, dbias + E
    if dweight_ptr is not None:
        tl.store(dweight_ptr + columns, dweight.to(dweight_ptr.dtype.element_ty), mask=there)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + columns, dbias.to(dbias_ptr.dtype.element_ty), mask=there)


def modulation_grads(
    partial: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, dout: Tensor,
) -> list[Tensor | None]:  # fmt: skip
    """dweight, dbias, dscale and dshift, None where there is no such parameter, from the partial
    sums (B, chunks, sums, D), of which the first two are A and E, and from the gradient of y.

    Of a `scale` with a row per token the first stage wrote the gradient; here it is None."""
    B, chunks, sums, D = partial.shape
    per_sample = scale if scale is not None and scale.ndim == 2 else None
    grads = [None if p is None else p.new_empty(p.shape) for p in (weight, bias, per_sample, shift)]
    finish_shift = shift is not None and shift.ndim == 2
    if shift is not None and shift.ndim == 3:
        grads[3] = dout.to(shift.dtype, memory_format=torch.contiguous_format, copy=True)
    elif shift is not None and scale is not None and scale.ndim == 3:
        grads[3] = dout.sum(1, dtype=torch.float32).to(shift.dtype)  # E has a factor 1 + scale
        finish_shift = False
    if any(p is not None for p in (weight, bias, per_sample)) or finish_shift:
        rows, scale_b, _ = rows_of(per_sample)
        modulation_grads_kernel[(blocks(D, BLOCK_D),)](
            partial, contiguous(weight), contiguous(bias), rows,
            *grads[:3], grads[3] if finish_shift else None, scale_b, B, chunks, sums, D=D,
            BLOCK=BLOCK_SUMS, BLOCK_D=BLOCK_D, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return grads
