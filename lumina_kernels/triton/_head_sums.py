"""Sums over tokens of the gradients of what qk_norm_rope3d and qk_norm_rope_table normalise q and k
with: of a program of their backward, and their second stage over the programs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._arguments import COUNTS, empty_as
from lumina_kernels.triton._launch import launch
from lumina_kernels.triton._norm import sum_partials
from lumina_kernels.triton._tiles import blocks, clear_padding, store_tile, store_token
from lumina_kernels.triton._tune import programs_at_once

# Tokens of a backward's program at least, so that its sums are a small part of the traffic.
LEAST_TOKENS = 8
# Block of sums that the second stage adds at a time.
ROWS, COLUMNS = 128, 16
SUM_OPTIONS = {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def store_parameter_sums(
    partial_ptr, dweight, dbias, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr,
    KS: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """This program's sums of the terms in dweight and dbias, in float32; where the heads share a
    weight, over the heads, too."""
    number = tl.program_id(0).to(tl.int64) * SUMS
    if NORM == "rms_per_head":
        if SUMS > 0:
            dweight = clear_padding(dweight, H, K, HS, KS)
            total = ()
            for j in tl.static_range(len(KS)):
                column = tl.sum(dweight[j], 0)
                for i in tl.static_range(1, len(HS)):
                    column += tl.sum(dweight[i * len(KS) + j], 0)
                total = total + (column[None, :],)
            store_tile(partial_ptr + number * K, total, 0, None, K, KS)
    else:
        if SUMS > 0:
            store_token(partial_ptr, dweight, number, H, K, HS, KS)
        if SUMS > 1:
            store_token(partial_ptr, dbias, number + 1, H, K, HS, KS)


@triton.jit
def _sum(
    partial_ptr, out_ptr, block, stride, count, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of columns of the sum of `count` rows of WIDTH values, `stride` apart."""
    if out_ptr is not None:
        columns = block * COLUMNS + tl.arange(0, COLUMNS)
        if block * COLUMNS < WIDTH:
            total = sum_partials(partial_ptr, count, stride, columns, WIDTH, ROWS, COLUMNS)
            tl.store(out_ptr + columns, total.to(out_ptr.dtype.element_ty), mask=columns < WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def qk_norm_rope3d_parameters_kernel(
    q_partial, k_partial,  # (pointer, stride of the programs)
    dq_weight_ptr, dq_bias_ptr, dk_weight_ptr, dk_bias_ptr, programs, k_programs,
    WIDTH: tl.constexpr, K_WIDTH: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """dweight and dbias of q and of k, (WIDTH,) and (K_WIDTH,): sums over the programs. Of PARTS
    programs in a row each adds up the same columns of another one; 2 where there is no bias."""
    q_ptr, q_stride = q_partial
    k_ptr, k_stride = k_partial
    part, block = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    if part == 0:
        _sum(q_ptr, dq_weight_ptr, block, q_stride, programs, WIDTH, ROWS, COLUMNS)
    elif part == 1:
        _sum(k_ptr, dk_weight_ptr, block, k_stride, k_programs, K_WIDTH, ROWS, COLUMNS)
    elif part == 2:
        _sum(q_ptr + WIDTH, dq_bias_ptr, block, q_stride, programs, WIDTH, ROWS, COLUMNS)
    else:
        _sum(k_ptr + K_WIDTH, dk_bias_ptr, block, k_stride, k_programs, K_WIDTH, ROWS, COLUMNS)


def partial_sums(x, weight, bias, norm, options) -> tuple[Tensor, int, int]:
    """The partial sums of dweight and dbias, (programs, values), the tokens of a program, and how
    many of the two parameters there are."""
    B, L, H, K = x.shape
    chunk = max(LEAST_TOKENS, blocks(B * L, programs_at_once(options)))
    sums = 0 if weight is None and bias is None else 1 if bias is None else 2
    width = sums * (K if norm == "rms_per_head" else H * K)
    return x.new_empty(blocks(B * L, chunk), width, dtype=torch.float32), chunk, sums


def parameter_grads(q_partial, k_partial, parameters, H, G, K, norm) -> tuple[Tensor | None, ...]:
    """Gradients of the weights and biases of q and of k from their `partial_sums`, None for None;
    k_partial None: there is no k."""
    grads = tuple(None if p is None else empty_as(p) for p in parameters)
    if any(grad is not None for grad in grads):
        if k_partial is None:
            k_partial = q_partial  # a pointer that is not read
        widths = (K, K) if norm == "rms_per_head" else (H * K, G * K)
        parts = 2 if grads[1] is None and grads[3] is None else 4
        arguments = (
            (q_partial, q_partial.stride(0)), (k_partial, k_partial.stride(0)), *grads,
            q_partial.shape[0], k_partial.shape[0],
        )  # fmt: skip
        launch(
            qk_norm_rope3d_parameters_kernel, parts * blocks(max(widths), COLUMNS), arguments,
            SUM_OPTIONS, WIDTH=widths[0], K_WIDTH=widths[1], PARTS=parts,
        )  # fmt: skip
    return grads
