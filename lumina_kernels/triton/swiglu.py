"""Triton kernels of swiglu, elementwise over rows that may have gaps between them."""

import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._arguments import rows_of
from lumina_kernels.triton._tiles import blocks, program_chunk

BLOCK = 1024  # 8 values a lane: 16 bytes in 16 bits


@triton.jit
def _load(x, row, columns, mask):
    """Values of a row in float32, of rows (pointer, stride)."""
    ptr, stride = x
    return tl.load(ptr + row * stride + columns, mask=mask).to(tl.float32)


@triton.jit
def _store(ptr, values, columns, mask):
    """The reverse, of a row that starts at `ptr`."""
    tl.store(ptr + columns, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_fwd_kernel(a, b, out_ptr, F, BLOCK: tl.constexpr):
    """out = a / (1 + exp(-a)) * b"""
    row, first = program_chunk(F, BLOCK)
    columns = first + tl.arange(0, BLOCK)
    mask = columns < F
    a = _load(a, row, columns, mask)
    b = _load(b, row, columns, mask)
    _store(out_ptr + row * F, a / (1 + tl.exp(-a)) * b, columns, mask)


@triton.jit
def swiglu_bwd_kernel(dout, a, b, da_ptr, db_ptr, F, BLOCK: tl.constexpr):
    """With s = 1 / (1 + exp(-a)): da = dout * b * s * (1 + a * (1 - s)),  db = dout * a * s"""
    row, first = program_chunk(F, BLOCK)
    columns = first + tl.arange(0, BLOCK)
    mask = columns < F
    dout = _load(dout, row, columns, mask)
    a = _load(a, row, columns, mask)
    b = _load(b, row, columns, mask)
    s = 1 / (1 + tl.exp(-a))
    _store(da_ptr + row * F, dout * b * s * (1 + a * (1 - s)), columns, mask)
    _store(db_ptr + row * F, dout * a * s, columns, mask)


def swiglu_fwd(a, b) -> Tensor:
    """out, shaped as a."""
    out = a.new_empty(a.shape)
    if out.numel() > 0:
        (a, b), rows, F = _as_rows(a, b)
        swiglu_fwd_kernel[(rows * blocks(F, BLOCK),)](
            a, b, out, F, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return out


def swiglu_bwd(dout, a, b) -> tuple[Tensor, Tensor]:
    """da and db."""
    da, db = a.new_empty(a.shape), b.new_empty(a.shape)
    if da.numel() > 0:
        (dout, a, b), rows, F = _as_rows(dout, a, b)
        swiglu_bwd_kernel[(rows * blocks(F, BLOCK),)](
            dout, a, b, da, db, F, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return da, db


def _as_rows(*tensors: Tensor) -> tuple[list[tuple[Tensor, int]], int, int]:
    """(tensor, stride) of each as rows (rows, F), and both sizes. Tensors without gaps are a single
    row; others keep their last dimension, and are copied if that has gaps itself."""
    if all(tensor.is_contiguous() for tensor in tensors):
        F = tensors[0].numel()
        return [(tensor, F) for tensor in tensors], 1, F
    F = tensors[0].shape[-1]
    rows = [rows_of(tensor.reshape(-1, F))[:2] for tensor in tensors]
    return rows, len(rows[0][0]), F
