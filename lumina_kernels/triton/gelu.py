"""Triton kernels of gelu, elementwise over rows that may have gaps between them."""

import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._arguments import empty_as
from lumina_kernels.triton._flat import OPTIONS, flat_rows, load_flat, store_flat
from lumina_kernels.triton._launch import launch
from lumina_kernels.triton._tiles import blocks, program_chunk
from lumina_kernels.triton._tune import tuned


@triton.jit
def _gate(x, TANH: tl.constexpr):
    """gelu(x) is x times this number; and its derivative."""
    square = x * x
    if TANH:
        # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2z)), and that of -z is exp(-2z) times as much.
        e = tl.exp(-tl.abs(x) * (1.5957691216057308 + 0.07135481627260025 * square))
        most = 1 / (1 + e)
        # Beyond 100 the slope is 0, of which an infinite square would make NaN.
        steep = 1.5957691216057308 + 0.21406444881780076 * tl.minimum(square, 1e4)
        return tl.where(x < 0, e * most, most), e * most * most * steep
    else:
        gate = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return gate, 0.3989422804014327 * tl.exp(-0.5 * square)


@triton.jit
def gelu_fwd_kernel(x, out_ptr, F, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """out = x * gate(x)"""
    row, first = program_chunk(F, BLOCK)
    columns = first + tl.arange(0, BLOCK)
    mask = columns < F
    x = load_flat(x, row, columns, mask)
    gate, _ = _gate(x, TANH)
    store_flat(out_ptr + row * F, x * gate, columns, mask)


@triton.jit
def gelu_bwd_kernel(dout, x, dx_ptr, F, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """dx = dout * (gate(x) + x * gate'(x))"""
    row, first = program_chunk(F, BLOCK)
    columns = first + tl.arange(0, BLOCK)
    mask = columns < F
    dout = load_flat(dout, row, columns, mask)
    x = load_flat(x, row, columns, mask)
    gate, slope = _gate(x, TANH)
    store_flat(dx_ptr + row * F, dout * (gate + x * slope), columns, mask)


def gelu_fwd(x, tanh) -> Tensor:
    """out, shaped as x."""
    out = empty_as(x)
    if out.numel() > 0:
        (x,), rows, F = flat_rows(x)
        options = tuned("gelu_fwd", 1, out, OPTIONS)
        programs = rows * blocks(F, options["BLOCK"])
        launch(gelu_fwd_kernel, programs, (x, out, F), options, TANH=tanh)
    return out


def gelu_bwd(dout, x, tanh) -> Tensor:
    """dx, shaped as x."""
    dx = empty_as(x)
    if dx.numel() > 0:
        (dout, x), rows, F = flat_rows(dout, x)
        options = tuned("gelu_bwd", 1, dx, OPTIONS)
        programs = rows * blocks(F, options["BLOCK"])
        launch(gelu_bwd_kernel, programs, (dout, x, dx, F), options, TANH=tanh)
    return dx
