"""Forward kernel of gqa_attention: flash attention over the keys, then over the text."""

import triton
import triton.language as tl

from lumina_kernels.triton.gqa_attention_walk import (
    add_parts,
    add_product,
    bias_tile,
    dot_rows,
    keys_of,
    load_keys,
    load_parts,
    packed_rows,
    program_block,
    rounding_error,
    row_numbers,
    scale_parts,
    store_parts,
    tanh_gate,
    valid_keys,
    walk_tiles,
    zero_parts,
)


@triton.jit
def gqa_attention_fwd_kernel(
    q, k, v,  # heads: (pointer, step in b, in l, in h)
    key_mask,  # (pointer, step in b) or None: int8, the keys of a sample are neighbours
    text_k, text_v, text_mask,  # the same for the text, or None
    text_gate_ptr,  # (H,) or None
    bias,  # (pointer, step in b, in h, in l, in key) or None
    out_ptr, error_ptr, lse_ptr, text_lse_ptr,  # (B, L, H, K), the same or None; (B, G, L, R)
    L, L_kv, T, G,
    scale_log2, text_scale_log2,  # scale * log2(e)
    K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, R: tl.constexpr,
    ALIGN: tl.constexpr, POSITIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """out = P v + tanh(gate) P_t v_t,  P = exp2(s - lse),  lse = log2 sum exp2(s),
    s = (scale q kᵀ + bias) log2(e) over the valid keys. Without any, lse is -inf and P is 0."""
    n_rows = L * R
    block, g, b = program_block(tl.cdiv(n_rows, BLOCK_M), G)
    rows, there = row_numbers(block, n_rows, 0, BLOCK_M)
    q_ptr, q_rows = packed_rows(q, block * BLOCK_M, b, g, R, ALIGN, BLOCK_M)
    q_parts = load_parts(q_ptr, q_rows, there, K, LO, HI)
    where = (b, g, rows, n_rows)
    keys = keys_of(k, v, b, g, ALIGN)
    step: tl.constexpr = _step if POSITIVE else _any_scale
    acc, m, total = walk_tiles(
        step, _nothing(BLOCK_M, LO, HI), (q_parts, keys, scale_log2, bias, where),
        key_mask, b, L_kv, K, LO, HI, R, BLOCK_N, EDGE, SCAN,
    )  # fmt: skip
    acc = scale_parts(acc, tl.where(total > 0, 1 / total, 0.0))
    rows, there = row_numbers(block, n_rows, 1, BLOCK_M)
    stats = (b * G + g) * n_rows + rows
    tl.store(lse_ptr + stats, m + tl.log2(total), mask=there)

    if text_k is not None:
        keys = keys_of(text_k, text_v, b, g, ALIGN)
        text, m, total = walk_tiles(
            _step, _nothing(BLOCK_M, LO, HI), (q_parts, keys, text_scale_log2, None, where),
            text_mask, b, T, K, LO, HI, R, EDGE, EDGE, SCAN,
        )  # fmt: skip
        gate = tanh_gate(text_gate_ptr, g * R + rows % R)
        text = scale_parts(text, tl.where(total > 0, gate / total, 0.0))
        tl.store(text_lse_ptr + stats, m + tl.log2(total), mask=there)
        acc = add_parts(acc, text)

    rows, there = row_numbers(block, n_rows, 2, BLOCK_M)
    out_rows = (b * L + rows // R) * G * R + g * R + rows % R
    store_parts(out_ptr, acc, out_rows, there, K, LO, HI)
    if error_ptr is not None:
        error = rounding_error(acc, out_ptr.dtype.element_ty)
        store_parts(error_ptr, error, out_rows, there, K, LO, HI)


@triton.jit
def _nothing(BLOCK_M: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    """Weighted sum of no values, maximum m of no scores (base 2), total of their exp2(s - m)."""
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    return zero_parts(BLOCK_M, LO, HI), m, tl.zeros((BLOCK_M,), tl.float32)


@triton.jit
def _step(
    state, context, tile,
    K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
    POSITIVE: tl.constexpr = True,
):  # fmt: skip
    """Online softmax: one more tile of keys and values."""
    acc, m, total = state
    q, keys, scale_log2, bias, where = context
    k, v = keys
    columns = tile[1] + tl.arange(0, BLOCK)
    inside = None
    if MASKED:
        inside = columns < tile[2]
    s = dot_rows(q, load_keys(k, tile[1], inside, BLOCK, K, LO, HI))
    if not MASKED and bias is None and POSITIVE:
        # max(scale * s) = scale * max(s): the scale joins the subtraction in one instruction.
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        top = m_new
        p = tl.exp2(s * scale_log2 - top[:, None])
    else:
        s *= scale_log2
        if bias is not None:
            b, g, rows, n_rows = where
            there = (rows < n_rows)[:, None] & (columns < tile[2])[None, :]
            s += bias_tile(bias, b, g, rows[:, None], columns[None, :], there, R)
        if MASKED:
            valid = valid_keys(tile, columns, inside)
            s = tl.where(valid[None, :], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        top = tl.where(m_new == -float("inf"), 0.0, m_new)  # no valid key so far
        p = tl.exp2(s - top[:, None])
    alpha = tl.exp2(m - top)
    total = total * alpha + tl.sum(p, 1)
    v = load_keys(v, tile[1], inside, BLOCK, K, LO, HI)
    return add_product(scale_parts(acc, alpha), p, v), m_new, total


@triton.jit
def _any_scale(
    state, context, tile,
    K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The same where the scale may be negative."""
    return _step(state, context, tile, K, LO, HI, R, BLOCK, MASKED, False)
