"""Forward kernel of gqa_attention: flash attention over the keys, then over the text."""

import triton
import triton.language as tl

from lumina_kernels.ops.gqa_attention import LSE_FLOOR
from lumina_kernels.triton._arguments import COUNTS
from lumina_kernels.triton._tiles import (
    add,
    add_dot,
    dot_rows,
    negate,
    scale_by,
    store_tile,
    zeros,
)
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

LN2, FLOOR = tl.constexpr(0.6931471805599453), tl.constexpr(LSE_FLOOR)


@triton.jit(do_not_specialize=COUNTS)
def gqa_attention_fwd_kernel(
    q,  # heads: (pointer, stride of b, of l, of h)
    tokens, text,  # branches, see gqa_attention_walk, with |scale|; text or None
    text_gate_ptr,  # (H,) or None
    bias,  # see bias_tile, or None
    out_ptr, error_ptr,  # (B, L, H, K), the second may be None
    stats_ptr, text_stats_ptr,  # (B, G, L, R, 2)
    lse_ptr,  # (B, L, H) or None
    L, G,
    K: tl.constexpr, KS: tl.constexpr, R: tl.constexpr,
    UNIT: tl.constexpr, NEGATIVE: tl.constexpr,  # the sign of the scale
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """out = P v + tanh(gate) P_t v_t,  P = softmax(scale q kᵀ + bias) over the valid keys, or 0
    without any."""
    n_rows = L * R
    block, g, b = program_block(tl.cdiv(n_rows, BLOCK_M), G)
    rows, exist = row_numbers(block, n_rows, 0, BLOCK_M)
    q_tile = load_queries(q, block * BLOCK_M, exist, b, g, R, UNIT, BLOCK_M, K, KS)
    where = (b, g, rows, n_rows)
    keys = keys_of(tokens, b, g, UNIT)
    image_q = q_tile
    if NEGATIVE:
        image_q = negate(q_tile)
    acc, m, total = walk_tiles(
        _step, _no_keys(BLOCK_M, KS), (image_q, keys, tokens[4], bias, where),
        tokens[2], b, tokens[3], K, KS, R, BLOCK_N, EDGE, SCAN,
    )  # fmt: skip
    acc = scale_by(acc, tl.where(total > 0, 1 / total, 0.0)[:, None])
    rows, exist = row_numbers(block, n_rows, 1, BLOCK_M)
    stats = (b * G + g) * n_rows + rows
    _store_stats(stats_ptr, stats, exist, m, total)
    if lse_ptr is not None:
        lse = (m * tokens[4][2] + tl.log2(total)) * LN2
        lse_rows = (b * L + rows // R) * G * R + g * R + rows % R
        tl.store(lse_ptr + lse_rows, tl.where(total == 0, FLOOR, lse), mask=exist)

    if text_gate_ptr is not None:
        keys = keys_of(text, b, g, UNIT)
        text_acc, m, total = walk_tiles(
            _step, _no_keys(BLOCK_M, KS), (q_tile, keys, text[4], None, where),
            text[2], b, text[3], K, KS, R, EDGE, EDGE, SCAN,
        )  # fmt: skip
        gate = tanh_gate(text_gate_ptr, g * R + rows % R)
        text_acc = scale_by(text_acc, tl.where(total > 0, gate / total, 0.0)[:, None])
        _store_stats(text_stats_ptr, stats, exist, m, total)
        acc = add(acc, text_acc)

    rows, exist = row_numbers(block, n_rows, 2, BLOCK_M)
    out_rows = ((b * L + rows // R) * G * R + g * R + rows % R)[:, None] * K
    store_tile(out_ptr, acc, out_rows, exist[:, None], K, KS)
    if error_ptr is not None:
        error = _rounding_error(acc, out_ptr.dtype.element_ty)
        store_tile(error_ptr, error, out_rows, exist[:, None], K, KS)


@triton.jit
def _no_keys(BLOCK_M: tl.constexpr, KS: tl.constexpr):
    """Weighted sum of no values, maximum m of no scores, total of their weights."""
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    return zeros(((0, BLOCK_M),), KS), m, tl.zeros((BLOCK_M,), tl.float32)


@triton.jit
def _store_stats(ptr, rows, mask, m, total):
    """The largest score, and log2 of the total of the weights. Without a valid key they make
    P = 0."""
    any_key = total > 0
    tl.store(ptr + 2 * rows, tl.where(any_key, m, 0.0), mask=mask)
    tl.store(ptr + 2 * rows + 1, tl.where(any_key, tl.log2(total), float("inf")), mask=mask)


@triton.jit
def _step(
    state, context, tile, K: tl.constexpr, KS: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax: one more tile of keys and values."""
    acc, m, total = state
    q, keys, scales, bias, where = context
    scale, inner, outer, _ = scales
    k, v = keys
    columns = tile[1] + tl.arange(0, BLOCK)
    inside = None
    if MASKED:
        inside = columns < tile[2]
    s = dot_rows(q, load_keys(k, tile[1], inside, BLOCK, K, KS))
    if bias is not None:
        b, g, rows, n_rows = where
        exist, there = (rows < n_rows)[:, None], (columns < tile[2])[None, :]
        s = s * scale + bias_tile(bias, b, g, rows[:, None], columns[None, :], exist, there, R)
    if MASKED:
        s = tl.where(valid_keys(tile, columns, inside, where, R), s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * inner)
    top = m_new
    if MASKED or bias is not None:
        top = tl.where(m_new == -float("inf"), 0.0, m_new)  # no valid key so far
    p = tl.exp2((s * inner - top[:, None]) * outer)
    alpha = tl.exp2((m - top) * outer)
    total = total * alpha + tl.sum(p, 1)
    v = load_keys(v, tile[1], inside, BLOCK, K, KS)
    return add_dot(scale_by(acc, alpha[:, None]), p, v), m_new, total


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
