"""Triton kernels of context_drop: a program holds one window, all heads of k and of v."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._arguments import COUNTS, heads_of, in_units, mask_of
from lumina_kernels.triton._launch import launch
from lumina_kernels.triton._rotation import loop_options
from lumina_kernels.triton._tiles import (
    add,
    blocks,
    ceil_div,
    cut,
    load_token,
    load_valid,
    scale_by,
    select,
    store_token,
    zeros,
)
from lumina_kernels.triton._tune import tuned


@triton.jit
def program_window(grid, factor):
    """The number of this program's window, its sample, its first token there, and its sides."""
    T, grid_h, grid_w = grid
    rows, columns = ceil_div(grid_h, factor), ceil_div(grid_w, factor)
    window = tl.program_id(0)
    line = window // columns
    left = (window - line * columns) * factor
    frame = line // rows
    top = (line - frame * rows) * factor
    b = frame // T
    first = ((frame - b * T).to(tl.int64) * grid_h + top) * grid_w + left
    height, width = tl.minimum(factor, grid_h - top), tl.minimum(factor, grid_w - left)
    return window.to(tl.int64), b.to(tl.int64), first, height, width


@triton.jit
def window_of(index, grid, factor):
    """The window of token `index` of a sample."""
    _, grid_h, grid_w = grid
    rows, columns = ceil_div(grid_h, factor), ceil_div(grid_w, factor)
    line = index // grid_w
    frame = line // grid_h
    top, left = (line - frame * grid_h) // factor, (index - line * grid_w) // factor
    return (frame * rows + top) * columns + left


@triton.jit(do_not_specialize=COUNTS)
def context_drop_kernel(
    k, v,  # heads: (pointer, stride of b, of l, of h)
    key_mask,  # (pointer, stride of b, of l) or None
    k_out_ptr, v_out_ptr, mask_ptr, counts_ptr,
    grid, factor,  # grid: (T, height, width)
    UNIT: tl.constexpr, G: tl.constexpr, K: tl.constexpr, GS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """mean of k and of v over the valid tokens of a window, 0 where there is none; their number"""
    window, b, first, height, width = program_window(grid, factor)
    k_sum, v_sum = zeros(GS, KS), zeros(GS, KS)
    count = 0.0
    for i in range(height):
        for j in range(width):
            index = first + i * grid[2] + j
            valid = None if key_mask is None else load_valid(key_mask, b, index)
            k_sum = add(k_sum, load_token(k, b, index, UNIT, G, K, GS, KS, valid))
            v_sum = add(v_sum, load_token(v, b, index, UNIT, G, K, GS, KS, valid))
            count += 1.0 if valid is None else tl.where(valid, 1.0, 0.0)
    share = 1.0 / tl.maximum(count, 1.0)
    store_token(k_out_ptr, scale_by(k_sum, share), window, G, K, GS, KS)
    store_token(v_out_ptr, scale_by(v_sum, share), window, G, K, GS, KS)
    tl.store(mask_ptr + window, count > 0)
    tl.store(counts_ptr + window, count)


@triton.jit(do_not_specialize=COUNTS)
def context_drop_bwd_kernel(
    dk_out, dv_out, key_mask, counts_ptr, dk_ptr, dv_ptr, grid, factor,  # dk_out, dk_ptr or None
    UNIT: tl.constexpr, G: tl.constexpr, K: tl.constexpr, GS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """dk = dk_out / count and dv = dv_out / count for every valid token of a window, else 0"""
    window, b, first, height, width = program_window(grid, factor)
    T, grid_h, grid_w = grid
    l_out = window - b * T * ceil_div(grid_h, factor) * ceil_div(grid_w, factor)
    share = 1.0 / tl.maximum(tl.load(counts_ptr + window), 1.0)
    dv = scale_by(load_token(dv_out, b, l_out, UNIT, G, K, GS, KS), share)
    if dk_out is not None:
        dk = scale_by(load_token(dk_out, b, l_out, UNIT, G, K, GS, KS), share)
    for i in range(height):
        for j in range(width):
            index = first + i * grid_w + j
            number = b * T * grid_h * grid_w + index
            valid = None if key_mask is None else load_valid(key_mask, b, index)
            store_token(dv_ptr, select(dv, valid), number, G, K, GS, KS)
            if dk_out is not None:
                store_token(dk_ptr, select(dk, valid), number, G, K, GS, KS)


def windows_of(grid, factor: int) -> int:
    """Windows of one sample."""
    T, height, width = grid
    return T * blocks(height, factor) * blocks(width, factor)


def context_drop_fwd(k, v, grid, factor, key_mask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k and v averaged over windows, (B, L', G, K), their mask and counts, (B, L')."""
    B, _, G, K = k.shape
    windows = windows_of(grid, factor)
    k_out, v_out = k.new_empty(B, windows, G, K), v.new_empty(B, windows, G, K)
    mask = k.new_empty(B, windows, dtype=torch.bool)
    counts = k.new_empty(B, windows, dtype=torch.float32)
    if B * windows == 0:
        return k_out, v_out, mask, counts
    (k, v), unit = in_units(heads_of(k), heads_of(v))
    arguments = k, v, mask_of(key_mask), k_out, v_out, mask, counts, tuple(grid), factor
    launch(
        context_drop_kernel, B * windows, arguments,
        tuned("context_drop_fwd", G * K, k_out, loop_options(G * K, 48)),
        UNIT=unit, G=G, K=K, GS=cut(G), KS=cut(K),
    )  # fmt: skip
    return k_out, v_out, mask, counts


def context_drop_bwd(
    dk_out, dv_out, counts, grid, factor, key_mask
) -> tuple[Tensor | None, Tensor]:
    """dk and dv, (B, L, G, K); None for dk where dk_out is None."""
    B, windows, G, K = dv_out.shape
    L = grid[0] * grid[1] * grid[2]
    dv = dv_out.new_empty(B, L, G, K)
    dk = None if dk_out is None else dk_out.new_empty(B, L, G, K)
    if B * windows == 0:
        return dk, dv
    (dk_out, dv_out), unit = in_units(heads_of(dk_out), heads_of(dv_out))
    arguments = dk_out, dv_out, mask_of(key_mask), counts, dk, dv, tuple(grid), factor
    launch(
        context_drop_bwd_kernel, B * windows, arguments,
        tuned("context_drop_bwd", G * K, dv, loop_options(G * K, 48)),
        UNIT=unit, G=G, K=K, GS=cut(G), KS=cut(K),
    )  # fmt: skip
    return dk, dv
