"""Forward kernel of gqa_attention: flash attention over the keys, then over the text."""

import triton
import triton.language as tl

from lumina_kernels.triton._tiles import add, add_dot, dot_rows, scale_by, store_tile, zeros
from lumina_kernels.triton.gqa_attention_walk import (
    bias_tile,
    keys_of,
    load_keys,
    load_queries,
    program_block,
    row_numbers,
    tanh_gate,
    valid_keys,
    walk_tiles,
)


@triton.jit
def gqa_attention_fwd_kernel(
    q,  # heads: (pointer, stride of b, of l, of h)
    tokens, text,  # branches: (k, v, mask, number of keys, scale * log2(e)); text or None
    text_gate_ptr,  # (H,) or None
    bias,  # (pointer, stride of b, of h, of l, of the key) or None
    out_ptr, error_ptr, lse_ptr, text_lse_ptr,  # (B, L, H, K), the same or None; (B, G, L, R)
    L, G,
    K: tl.constexpr, KS: tl.constexpr, R: tl.constexpr,
    UNIT: tl.constexpr, POSITIVE: tl.constexpr,  # whether the scale is not negative
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """out = P v + tanh(gate) P_t v_t,  P = exp2(s - lse),  lse = log2 sum exp2(s),
    s = (scale q kᵀ + bias) log2(e) over the valid keys. Without any, lse is -inf and P is 0."""
    n_rows = L * R
    block, g, b = program_block(tl.cdiv(n_rows, BLOCK_M), G)
    rows, exist = row_numbers(block, n_rows, 0, BLOCK_M)
    q_tile = load_queries(q, block * BLOCK_M, exist, b, g, R, UNIT, BLOCK_M, K, KS)
    where = (b, g, rows, n_rows)
    keys = keys_of(tokens, b, g, UNIT)
    step: tl.constexpr = _step if POSITIVE else _step_any_scale
    acc, m, total = walk_tiles(
        step, _no_keys(BLOCK_M, KS), (q_tile, keys, tokens[4], bias, where),
        tokens[2], b, tokens[3], K, KS, R, BLOCK_N, EDGE, SCAN,
    )  # fmt: skip
    acc = scale_by(acc, tl.where(total > 0, 1 / total, 0.0)[:, None])
    rows, exist = row_numbers(block, n_rows, 1, BLOCK_M)
    stats = (b * G + g) * n_rows + rows
    tl.store(lse_ptr + stats, m + tl.log2(total), mask=exist)

    if text_gate_ptr is not None:
        keys = keys_of(text, b, g, UNIT)
        text_acc, m, total = walk_tiles(
            _step, _no_keys(BLOCK_M, KS), (q_tile, keys, text[4], None, where),
            text[2], b, text[3], K, KS, R, EDGE, EDGE, SCAN,
        )  # fmt: skip
        gate = tanh_gate(text_gate_ptr, g * R + rows % R)
        text_acc = scale_by(text_acc, tl.where(total > 0, gate / total, 0.0)[:, None])
        tl.store(text_lse_ptr + stats, m + tl.log2(total), mask=exist)
        acc = add(acc, text_acc)

    rows, exist = row_numbers(block, n_rows, 2, BLOCK_M)
    out_rows = ((b * L + rows // R) * G * R + g * R + rows % R)[:, None] * K
    store_tile(out_ptr, acc, out_rows, exist[:, None], K, KS)
    if error_ptr is not None:
        error = _rounding_error(acc, out_ptr.dtype.element_ty)
        store_tile(error_ptr, error, out_rows, exist[:, None], K, KS)


@triton.jit
def _no_keys(BLOCK_M: tl.constexpr, KS: tl.constexpr):
    """Weighted sum of no values, maximum m of no scores (base 2), total of their exp2(s - m)."""
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    return zeros(((0, BLOCK_M),), KS), m, tl.zeros((BLOCK_M,), tl.float32)


@triton.jit
def _step(
    state, context, tile, K: tl.constexpr, KS: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, POSITIVE: tl.constexpr = True,
):  # fmt: skip
    """Online softmax: one more tile of keys and values."""
    acc, m, total = state
    q, keys, scale_log2, bias, where = context
    k, v = keys
    columns = tile[1] + tl.arange(0, BLOCK)
    inside = None
    if MASKED:
        inside = columns < tile[2]
    s = dot_rows(q, load_keys(k, tile[1], inside, BLOCK, K, KS))
    if not MASKED and bias is None and POSITIVE:
        # max(scale * s) = scale * max(s): the scale joins the subtraction in one instruction.
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        top = m_new
        p = tl.exp2(s * scale_log2 - top[:, None])
    else:
        s *= scale_log2
        if bias is not None:
            b, g, rows, n_rows = where
            exist = (rows < n_rows)[:, None] & (columns < tile[2])[None, :]
            s += bias_tile(bias, b, g, rows[:, None], columns[None, :], exist, R)
        if MASKED:
            valid = valid_keys(tile, columns, inside)
            s = tl.where(valid[None, :], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        top = tl.where(m_new == -float("inf"), 0.0, m_new)  # no valid key so far
        p = tl.exp2(s - top[:, None])
    alpha = tl.exp2(m - top)
    total = total * alpha + tl.sum(p, 1)
    v = load_keys(v, tile[1], inside, BLOCK, K, KS)
    return add_dot(scale_by(acc, alpha[:, None]), p, v), m_new, total


@triton.jit
def _step_any_scale(
    state, context, tile, K: tl.constexpr, KS: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The same where the scale may be negative."""
    return _step(state, context, tile, K, KS, R, BLOCK, MASKED, False)


@triton.jit
def _rounding_error(tile, dtype: tl.constexpr):
    """What the tile loses when it is rounded to 16 bits, in 127ths of the most it can lose."""
    half: tl.constexpr = 2**-8 if dtype == tl.bfloat16 else 2**-11
    error = ()
    for j in tl.static_range(len(tile)):
        rounded = tile[j].to(dtype).to(tl.float32)
        most = tl.abs(rounded) * half
        part = tl.where(most > 0, (tile[j] - rounded) / most, 0.0)
        part = tl.floor(tl.minimum(tl.maximum(part, -1.0), 1.0) * 127 + 0.5)
        error = error + (part.to(tl.int8),)
    return error
