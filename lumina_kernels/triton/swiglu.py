"""Triton kernels of swiglu, elementwise over rows that may have gaps between them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._tiles import blocks, program_chunk, rows_of

BLOCK = 1024  # 8 values a lane: 16 bytes in 16 bits


@triton.jit
def swiglu_fwd_kernel(a_ptr, b_ptr, out_ptr, a_row, b_row, F, BLOCK: tl.constexpr):
    """out = a / (1 + exp(-a)) * b"""
    row, first = program_chunk(F, BLOCK)
    columns = first + tl.arange(0, BLOCK)
    there = columns < F
    a = tl.load(a_ptr + row * a_row + columns, mask=there).to(tl.float32)
    b = tl.load(b_ptr + row * b_row + columns, mask=there).to(tl.float32)
    out = a / (1 + tl.exp(-a)) * b
    tl.store(out_ptr + row * F + columns, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def swiglu_bwd_kernel(
    dout_ptr, a_ptr, b_ptr, da_ptr, db_ptr, dout_row, a_row, b_row, F, BLOCK: tl.constexpr
):
    """With s = 1 / (1 + exp(-a)): da = dout * b * s * (1 + a * (1 - s)),  db = dout * a * s"""
    row, first = program_chunk(F, BLOCK)
    columns = first + tl.arange(0, BLOCK)
    there = columns < F
    dout = tl.load(dout_ptr + row * dout_row + columns, mask=there).to(tl.float32)
    a = tl.load(a_ptr + row * a_row + columns, mask=there).to(tl.float32)
    b = tl.load(b_ptr + row * b_row + columns, mask=there).to(tl.float32)
    s = 1 / (1 + tl.exp(-a))
    da = dout * b * s * (1 + a * (1 - s))
    tl.store(da_ptr + row * F + columns, da.to(da_ptr.dtype.element_ty), mask=there)
    tl.store(db_ptr + row * F + columns, (dout * a * s).to(db_ptr.dtype.element_ty), mask=there)


def swiglu_fwd(a, b) -> Tensor:
    """Shaped as a."""
    out = a.new_empty(a.shape)
    if out.numel() > 0:
        (a, b), steps, rows, F = _as_rows(a, b)
        swiglu_fwd_kernel[(rows * blocks(F, BLOCK),)](
            a, b, out, *steps, F, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return out


def swiglu_bwd(dout, a, b) -> tuple[Tensor, Tensor]:
    """da and db."""
    da, db = a.new_empty(a.shape), b.new_empty(a.shape)
    if da.numel() > 0:
        (dout, a, b), steps, rows, F = _as_rows(dout, a, b)
        swiglu_bwd_kernel[(rows * blocks(F, BLOCK),)](
            dout, a, b, da, db, *steps, F, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return da, db


def _as_rows(*tensors) -> tuple[list[Tensor], list[int], int, int]:
    """The tensors as (rows, F), their steps from row to row, rows and F: a single row where none
    has gaps, else the rows of the last dimension, copied only where those have gaps themselves."""
    if all(tensor.is_contiguous() for tensor in tensors):
        shape = (1, tensors[0].numel())
    else:
        shape = (-1, tensors[0].shape[-1])
    tensors, steps, _ = zip(*(rows_of(tensor.reshape(shape)) for tensor in tensors), strict=True)
    return list(tensors), list(steps), *tensors[0].shape


def aot_calls(head_dim, dtype):
    """Launches at a model's shapes, for `lumina_kernels.aot`: two tensors, and halves of one."""
    F = 96 * head_dim
    a = torch.empty(2, 64, F, dtype=dtype)
    halves = torch.empty(2, 64, 2 * F, dtype=dtype).chunk(2, -1)
    yield "fwd", lambda: swiglu_fwd(a, a)
    yield "bwd", lambda: swiglu_bwd(a, a, a)
    yield "halves fwd", lambda: swiglu_fwd(*halves)
    yield "halves bwd", lambda: swiglu_bwd(a, *halves)
