"""Triton kernels of swiglu, elementwise over rows that may have gaps between them."""

import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._arguments import empty_as
from lumina_kernels.triton._flat import OPTIONS, flat_rows, load_flat, store_flat
from lumina_kernels.triton._launch import launch
from lumina_kernels.triton._tiles import blocks, program_chunk
from lumina_kernels.triton._tune import tuned


@triton.jit
def swiglu_fwd_kernel(a, b, out_ptr, F, BLOCK: tl.constexpr):
    """out = a / (1 + exp(-a)) * b"""
    row, first = program_chunk(F, BLOCK)
    columns = first + tl.arange(0, BLOCK)
    mask = columns < F
    a = load_flat(a, row, columns, mask)
    b = load_flat(b, row, columns, mask)
    store_flat(out_ptr + row * F, a / (1 + tl.exp(-a)) * b, columns, mask)


@triton.jit
def swiglu_bwd_kernel(dout, a, b, da_ptr, db_ptr, F, BLOCK: tl.constexpr):
    """With s = 1 / (1 + exp(-a)): da = dout * b * s * (1 + a * (1 - s)),  db = dout * a * s"""
    row, first = program_chunk(F, BLOCK)
    columns = first + tl.arange(0, BLOCK)
    mask = columns < F
    dout = load_flat(dout, row, columns, mask)
    a = load_flat(a, row, columns, mask)
    b = load_flat(b, row, columns, mask)
    s = 1 / (1 + tl.exp(-a))
    store_flat(da_ptr + row * F, dout * b * s * (1 + a * (1 - s)), columns, mask)
    store_flat(db_ptr + row * F, dout * a * s, columns, mask)


def swiglu_fwd(a, b) -> Tensor:
    """out, shaped as a."""
    out = empty_as(a)
    if out.numel() > 0:
        (a, b), rows, F = flat_rows(a, b)
        options = tuned("swiglu_fwd", 1, out, OPTIONS)
        programs = rows * blocks(F, options["BLOCK"])
        launch(swiglu_fwd_kernel, programs, (a, b, out, F), options)
    return out


def swiglu_bwd(dout, a, b) -> tuple[Tensor, Tensor]:
    """da and db."""
    da, db = empty_as(a), b.new_empty(a.shape)
    if da.numel() > 0:
        (dout, a, b), rows, F = flat_rows(dout, a, b)
        options = tuned("swiglu_bwd", 1, da, OPTIONS)
        programs = rows * blocks(F, options["BLOCK"])
        launch(swiglu_bwd_kernel, programs, (dout, a, b, da, db, F), options)
    return da, db
