"""The modulated norm y = (n * weight + bias) * (1 + scale) + shift, n = norm(x), over rows of D
values: what the kernels of four ops share, and the second stage of the parameters' gradients.

A program of a forward holds ROWS rows as a tile, one of a backward a row at a time. An RMS norm is
one whose mean is None.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._arguments import COUNTS, contiguous, empty_as, rows_of
from lumina_kernels.triton._launch import launch
from lumina_kernels.triton._tiles import (
    add,
    blocks,
    clear_padding,
    load_row_values,
    load_rows,
    load_vector,
    multiply,
    scale_by,
    shift_by,
    store_row_values,
    store_rows,
    store_tile,
    subtract,
    sum_columns,
)
from lumina_kernels.triton._tune import loop_stages, programs_at_once

# Columns that a program of the second stage adds up, and partial sums it reads at once.
BLOCK_D, BLOCK_SUMS = 16, 128
SUM_OPTIONS = {
    "BLOCK": BLOCK_SUMS, "BLOCK_D": BLOCK_D, "num_warps": 4, "enable_fp_fusion": True
}  # fmt: skip
# Rows of a backward's program at least.
LEAST_ROWS = 4


@cache
def forward_options(D: int) -> dict:
    """Sizes of a forward's tile and its warps: up to 80 values a lane with 4 warps, 40 with more.

    Several rows share the modulation that a program loads, and keep its lanes at 16-byte reads
    where a block of one row is too narrow for that. 8 warps come where both cuts fill their lanes.
    """
    cuts = _cut_in_two(D)
    width = sum(cut[1] for cut in cuts)
    num_warps, ROWS = 8 if cuts[1][1] >= 2048 else 4, 1
    while width > 80 * 32 * num_warps and num_warps < 16:
        num_warps *= 2
    most = 40 * 32 * max(8, num_warps)
    while 2 * ROWS * width <= most and ROWS < 64:
        ROWS *= 2
    return {"D": D, "DS": cuts, "ROWS": ROWS, "num_warps": num_warps, "enable_fp_fusion": True}


@cache
def backward_options(D: int, most: int = 20, few: int = 16) -> dict:
    """The same for a backward, up to `most` values a lane: sums over rows and four to six tensors
    share the registers. Up to `few` values a lane go into 128 registers, and 16 warps run on a
    processor, more into 168, and 12 do; nothing is spilled."""
    cuts = _cut_in_two(D)
    width, num_warps = sum(cut[1] for cut in cuts), 1
    while width > most * 32 * num_warps and num_warps < 16:
        num_warps *= 2
    maxnreg = 128 if num_warps == 16 or width <= few * 32 * num_warps else 168
    options = {"num_warps": num_warps, "maxnreg": maxnreg, "enable_fp_fusion": True}
    return {"D": D, "DS": cuts} | options


def _cut_in_two(D: int) -> tuple[tuple[int, int], ...]:
    """The largest power of two below D, and one for the rest: 2304 is 2048 + 256."""
    low = 1 << max(D - 1, 1).bit_length() - 1
    return (0, low), (low, 1 << max(D - low - 1, 0).bit_length())


def rows_per_program(B: int, L: int, options: dict) -> int:
    """Rows that a program of a backward adds up before it writes its sums: so many that all of the
    programs run at once, or fewer where samples are too many for that, and at least LEAST_ROWS, so
    that the sums are a small part of the traffic."""
    slots = programs_at_once(options)
    programs = slots // B  # of a sample
    if 20 * B * programs < 17 * slots:
        programs = 4 * slots // B
    return max(LEAST_ROWS, blocks(L, max(1, programs)))


def row_stages(loads: int, options: dict, x: Tensor) -> int:
    """`loop_stages` of a backward that loads so many rows like x for each of its rows."""
    width = sum(cut[1] for cut in options["DS"])
    return loop_stages(loads * width * x.itemsize)


def rstd_and_mean(statistics: Tensor) -> tuple[Tensor, Tensor | None]:
    """Both statistics, of (1 or 2, B, L); None for the mean of an RMS norm."""
    return statistics, statistics[1] if statistics.shape[0] == 2 else None


@triton.jit
def rstd_of(x, eps, D: tl.constexpr):
    """1 / sqrt(mean(x²) + eps) of the rows, (ROWS, 1)."""
    return tl.rsqrt(sum_columns(multiply(x, x))[:, None] / D + eps)


@triton.jit
def _centre(x, mean, D: tl.constexpr, DS: tl.constexpr):
    """x - mean, 0 from column D on."""
    return clear_padding(shift_by(x, -mean), 1, D, ((0, 1),), DS)


@triton.jit
def normalise(x, eps, rstd_ptr, mean_ptr, b, rows, L, D: tl.constexpr, DS: tl.constexpr):
    """norm(x); stores its statistics. `mean_ptr` None: an RMS norm."""
    if mean_ptr is not None:
        mean = sum_columns(x)[:, None] / D
        store_row_values(mean_ptr, mean, b, rows, L)
        x = _centre(x, mean, D, DS)
    rstd = rstd_of(x, eps, D)
    store_row_values(rstd_ptr, rstd, b, rows, L)
    return scale_by(x, rstd)


@triton.jit
def normalise_from_statistics(x, rstd_ptr, mean_ptr, b, rows, L, D: tl.constexpr, DS: tl.constexpr):
    """norm(x) from the stored statistics, and rstd."""
    rstd = load_row_values(rstd_ptr, b, rows, L)
    if mean_ptr is not None:
        x = _centre(x, load_row_values(mean_ptr, b, rows, L), D, DS)
    return scale_by(x, rstd), rstd


@triton.jit
def norm_bwd(d, n, rstd, D: tl.constexpr, LAYER: tl.constexpr):
    """Gradient of a norm's input, rstd * (d - mean(d) - n * mean(d * n)), from that of its output
    n, d; an RMS norm has no mean(d)."""
    along = sum_columns(multiply(d, n))[:, None] / D
    if LAYER:
        d = shift_by(d, -(sum_columns(d)[:, None] / D))
    return scale_by(subtract(d, scale_by(n, along)), rstd)


@triton.jit
def modulate(n, weight_ptr, bias_ptr, scale, shift, b, rows, L, D: tl.constexpr, DS: tl.constexpr):
    """(n * weight + bias) * (1 + scale) + shift, without the terms that are None."""
    if weight_ptr is not None:
        n = multiply(n, load_vector(weight_ptr, D, DS))
    if bias_ptr is not None:
        n = add(n, load_vector(bias_ptr, D, DS))
    if scale is not None:
        n = multiply(n, shift_by(load_rows(scale, b, rows, L, D, DS), 1))
    if shift is not None:
        n = add(n, load_rows(shift, b, rows, L, D, DS))
    return n


@triton.jit
def modulate_bwd(
    d, n, dn_sum, d_sum, weight_ptr, bias_ptr, scale, dscale_ptr, b, rows, L,
    D: tl.constexpr, DS: tl.constexpr,
):  # fmt: skip
    """Gradient of n from that of y, d, and the sums over rows of f * d * n and f * d.

    Where `scale` has a row per token, f is 1 + scale, and the gradient of `scale`, d * (n * weight
    + bias), is stored. Otherwise f is 1: the second stage multiplies by 1 + scale.
    """
    if dscale_ptr is None:
        dn_sum, d_sum = add(dn_sum, multiply(d, n)), add(d_sum, d)
    else:
        store_rows(
            dscale_ptr,
            multiply(d, modulate(n, weight_ptr, bias_ptr, None, None, b, rows, L, D, DS)),
            b, rows, L, D, DS,
        )  # fmt: skip
    if scale is not None:
        d = multiply(d, shift_by(load_rows(scale, b, rows, L, D, DS), 1))
    if dscale_ptr is not None:
        dn_sum, d_sum = add(dn_sum, multiply(d, n)), add(d_sum, d)
    if weight_ptr is not None:
        d = multiply(d, load_vector(weight_ptr, D, DS))
    return d, dn_sum, d_sum


@triton.jit
def store_sums(ptr, number, sums, D: tl.constexpr, DS: tl.constexpr):
    """This program's partial sums, a tuple of `number` rows, in float32."""
    ptr += tl.program_id(0).to(tl.int64) * number * D
    for n in tl.static_range(number):
        store_tile(ptr + n * D, sums[n], 0, None, D, DS)


@triton.jit
def sum_partials(
    ptr, count, stride, columns, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Sum of `count` rows, `stride` apart, in an order that does not depend on the run."""
    total = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for first in range(0, count, BLOCK):
        row = first + tl.arange(0, BLOCK)[:, None].to(tl.int64)
        mask = (row < count) & (columns < D)[None, :]
        total += tl.load(ptr + row * stride + columns[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=COUNTS)
def modulation_grads_kernel(
    partial_ptr, weight_ptr, bias_ptr, scale, dweight_ptr, dbias_ptr, dscale_ptr, dshift_ptr,
    B, chunks, sums, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From the sums A of f * d * n and E of f * d over a sample's rows: dscale = A * weight + E *
    bias, dshift = E, dweight = sum_b (1 + scale) * A, dbias = sum_b (1 + scale) * E."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = columns < D
    dweight, dbias = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    sample = tl.full((), chunks, tl.int64) * sums * D
    for number in range(B):
        b = tl.cast(number, tl.int64)
        first = partial_ptr + b * sample
        A = sum_partials(first, chunks, sums * D, columns, D, BLOCK, BLOCK_D)
        E = sum_partials(first + D, chunks, sums * D, columns, D, BLOCK, BLOCK_D)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + b * D + columns, E.to(dshift_ptr.dtype.element_ty), mask=mask)
        if scale is not None:
            scale_ptr, stride_b = scale
            dscale = A
            if weight_ptr is not None:
                dscale *= tl.load(weight_ptr + columns, mask=mask).to(tl.float32)
            if bias_ptr is not None:
                dscale += E * tl.load(bias_ptr + columns, mask=mask).to(tl.float32)
            dtype = dscale_ptr.dtype.element_ty
            tl.store(dscale_ptr + b * D + columns, dscale.to(dtype), mask=mask)
            factor = 1 + tl.load(scale_ptr + b * stride_b + columns, mask=mask).to(tl.float32)
            A, E = A * factor, E * factor
        dweight, dbias = dweight + A, dbias + E
    if dweight_ptr is not None:
        tl.store(dweight_ptr + columns, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + columns, dbias.to(dbias_ptr.dtype.element_ty), mask=mask)


def modulation_grads(
    partial: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, dout: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dweight, dbias, dscale and dshift, None where there is no such parameter, from the gradient
    of y and the partial sums (B, chunks, sums, D), the first two of which are A and E.

    None for a `scale` with a row per token, too: the first stage stored its gradient."""
    B, chunks, sums, D = partial.shape
    per_sample = scale if scale is not None and scale.ndim == 2 else None
    dweight, dbias, dscale, dshift = (
        None if p is None else empty_as(p) for p in (weight, bias, per_sample, shift)
    )
    sums_are_dshift = shift is not None and shift.ndim == 2
    if shift is not None and shift.ndim == 3:
        dshift = dout.to(shift.dtype, memory_format=torch.contiguous_format, copy=True)
    elif shift is not None and scale is not None and scale.ndim == 3:
        dshift = dout.sum(1, dtype=torch.float32).to(shift.dtype)  # E has a factor 1 + scale
        sums_are_dshift = False
    if any(p is not None for p in (weight, bias, per_sample)) or sums_are_dshift:
        arguments = (
            partial, contiguous(weight), contiguous(bias), rows_of(per_sample),
            dweight, dbias, dscale, dshift if sums_are_dshift else None, B, chunks, sums,
        )  # fmt: skip
        launch(modulation_grads_kernel, blocks(D, BLOCK_D), arguments, SUM_OPTIONS, D=D)
    return dweight, dbias, dscale, dshift


def zeros_of(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of parameters where there are no rows."""
    return tuple(None if p is None else p.new_zeros(p.shape) for p in parameters)
