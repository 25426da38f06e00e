"""Triton kernels of context_drop: a program holds one window, all heads of k and of v."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._rotation import (
    add,
    cut,
    heads_of,
    in_units,
    keep_row,
    kept,
    launch_loop,
    load_row,
    scale,
    store_row,
    zeros,
)
from lumina_kernels.triton._tiles import blocks


@triton.jit
def program_window(T, grid_h, grid_w, factor):
    """The number of this program's window, its sample, its first token there, and its sides."""
    rows, columns = tl.cdiv(grid_h, factor), tl.cdiv(grid_w, factor)
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
def context_drop_kernel(
    k_ptr, v_ptr, mask_ptr, k_out_ptr, v_out_ptr, mask_out_ptr, counts_ptr,
    k_b, k_l, k_h, v_b, v_l, v_h, mask_b, mask_l, T, grid_h, grid_w, factor,
    UNIT: tl.constexpr, G: tl.constexpr, K: tl.constexpr, GS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """mean of k and of v over the valid tokens of a window, 0 where there is none; their number"""
    window, b, first, height, width = program_window(T, grid_h, grid_w, factor)
    k_sum, v_sum = zeros(GS, KS), zeros(GS, KS)
    count = 0.0
    for i in range(height):
        for j in range(width):
            at = first + i * grid_w + j
            keep = None if mask_ptr is None else kept(mask_ptr, mask_b, mask_l, b, at)
            k = k_ptr + (b * k_b + at * k_l) * UNIT
            v = v_ptr + (b * v_b + at * v_l) * UNIT
            k_sum = add(k_sum, load_row(k, k_h * UNIT, G, K, GS, KS, keep))
            v_sum = add(v_sum, load_row(v, v_h * UNIT, G, K, GS, KS, keep))
            count += 1.0 if keep is None else tl.where(keep, 1.0, 0.0)
    share = 1.0 / tl.maximum(count, 1.0)
    store_row(k_out_ptr + window * (G * K), scale(k_sum, share), K, G, K, GS, KS)
    store_row(v_out_ptr + window * (G * K), scale(v_sum, share), K, G, K, GS, KS)
    tl.store(mask_out_ptr + window, count > 0)
    tl.store(counts_ptr + window, count)


@triton.jit
def context_drop_bwd_kernel(
    dk_out_ptr, dv_out_ptr, mask_ptr, counts_ptr, dk_ptr, dv_ptr,
    dk_out_b, dk_out_l, dk_out_h, dv_out_b, dv_out_l, dv_out_h, mask_b, mask_l,
    T, grid_h, grid_w, factor,
    UNIT: tl.constexpr, G: tl.constexpr, K: tl.constexpr, GS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """dk = dk_out / count and dv = dv_out / count for every valid token of a window, else 0"""
    window, b, first, height, width = program_window(T, grid_h, grid_w, factor)
    l_out = window - b * T * tl.cdiv(grid_h, factor) * tl.cdiv(grid_w, factor)
    share = 1.0 / tl.maximum(tl.load(counts_ptr + window), 1.0)
    dv = dv_out_ptr + (b * dv_out_b + l_out * dv_out_l) * UNIT
    dv = scale(load_row(dv, dv_out_h * UNIT, G, K, GS, KS), share)
    if dk_ptr is not None:
        dk = dk_out_ptr + (b * dk_out_b + l_out * dk_out_l) * UNIT
        dk = scale(load_row(dk, dk_out_h * UNIT, G, K, GS, KS), share)
    for i in range(height):
        for j in range(width):
            at = first + i * grid_w + j
            token = (b * T * grid_h * grid_w + at) * (G * K)
            keep = None if mask_ptr is None else kept(mask_ptr, mask_b, mask_l, b, at)
            store_row(dv_ptr + token, keep_row(dv, keep), K, G, K, GS, KS)
            if dk_ptr is not None:
                store_row(dk_ptr + token, keep_row(dk, keep), K, G, K, GS, KS)


@triton.jit
def window_of(at, grid_h, grid_w, factor):
    """The window of token `at` of a sample."""
    rows, columns = tl.cdiv(grid_h, factor), tl.cdiv(grid_w, factor)
    line = at // grid_w
    frame = line // grid_h
    top, left = (line - frame * grid_h) // factor, (at - line * grid_w) // factor
    return (frame * rows + top) * columns + left


def windows_of(grid, factor: int) -> int:
    """Windows of one sample."""
    T, height, width = grid
    return T * blocks(height, factor) * blocks(width, factor)


def mask_of(key_mask: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A (B, L) mask or None, and its steps."""
    return (None, 0, 0) if key_mask is None else (key_mask, *key_mask.stride())


def context_drop_fwd(k, v, grid, factor, key_mask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k and v averaged over windows, (B, L', G, K), their mask and counts, (B, L')."""
    B, _, G, K = k.shape
    windows = windows_of(grid, factor)
    k_out, v_out = k.new_empty(B, windows, G, K), v.new_empty(B, windows, G, K)
    mask = k.new_empty(B, windows, dtype=torch.bool)
    counts = k.new_empty(B, windows, dtype=torch.float32)
    if B * windows == 0:
        return k_out, v_out, mask, counts
    k, k_steps = heads_of(k)
    v, v_steps = heads_of(v)
    unit, steps = in_units(*k_steps, *v_steps)
    key_mask, *mask_steps = mask_of(key_mask)
    context_drop_kernel[(B * windows,)](
        k, v, key_mask, k_out, v_out, mask, counts, *steps, *mask_steps, *grid, factor,
        UNIT=unit, G=G, K=K, GS=cut(G), KS=cut(K), **launch_loop(G * K, 48),
    )  # fmt: skip
    return k_out, v_out, mask, counts


def context_drop_bwd(dk_out, dv_out, counts, grid, factor, key_mask):
    """dk and dv, (B, L, G, K); without dk_out dv alone, and None for dk."""
    B, windows, G, K = dv_out.shape
    L = grid[0] * grid[1] * grid[2]
    dv = dv_out.new_empty(B, L, G, K)
    dk = None if dk_out is None else dk_out.new_empty(B, L, G, K)
    if B * windows == 0:
        return dk, dv
    dk_out, dk_steps = (None, (0, 0, 0)) if dk_out is None else heads_of(dk_out)
    dv_out, dv_steps = heads_of(dv_out)
    unit, steps = in_units(*dk_steps, *dv_steps)
    key_mask, *mask_steps = mask_of(key_mask)
    context_drop_bwd_kernel[(B * windows,)](
        dk_out, dv_out, key_mask, counts, dk, dv, *steps, *mask_steps, *grid, factor,
        UNIT=unit, G=G, K=K, GS=cut(G), KS=cut(K), **launch_loop(G * K, 48),
    )  # fmt: skip
    return dk, dv


def aot_calls(head_dim: int, dtype: torch.dtype):
    """Calls of the launchers at the model's shapes, 8 heads of keys and values."""
    k, small = (torch.zeros(1, length, 8, head_dim, dtype=dtype) for length in (256, 64))
    mask, counts = torch.ones(1, 256, dtype=torch.bool), torch.ones(1, 64)
    for name, key_mask in (("", None), (" mask", mask)):
        rest = (1, 16, 16), 2, key_mask
        yield f"fwd{name}", lambda rest=rest: context_drop_fwd(k, k, *rest)
        yield f"bwd{name}", lambda rest=rest: context_drop_bwd(small, small, counts, *rest)
