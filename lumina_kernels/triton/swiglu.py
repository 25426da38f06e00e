"""Triton kernels of swiglu, elementwise over rows that may have gaps between them."""

import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._flat import BLOCK, flat_rows, load_flat, store_flat
from lumina_kernels.triton._tiles import blocks, program_chunk


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
    out = a.new_empty(a.shape)
    if out.numel() > 0:
        (a, b), rows, F = flat_rows(a, b)
        swiglu_fwd_kernel[(rows * blocks(F, BLOCK),)](
            a, b, out, F, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return out


def swiglu_bwd(dout, a, b) -> tuple[Tensor, Tensor]:
    """da and db."""
    da, db = a.new_empty(a.shape), b.new_empty(a.shape)
    if da.numel() > 0:
        (dout, a, b), rows, F = flat_rows(dout, a, b)
        swiglu_bwd_kernel[(rows * blocks(F, BLOCK),)](
            dout, a, b, da, db, F, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return da, db
