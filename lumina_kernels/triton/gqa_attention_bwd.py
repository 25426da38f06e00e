"""Backward kernels of gqa_attention: one over query rows, one over keys; nothing is atomic.

Per branch, with the weights P of the softmax and w = 1 (self) or tanh(gate) (text):

    dP = dout vᵀ,  e = sum P dP = dout . (P v),  dS = w P (dP - e),
    dq += scale dS k,  dk = scale dSᵀ q,  dv = w Pᵀ dout,  dgate = (1 - tanh²) sum e_text

Each branch has its own e, but out is the sum of both. The text is short, so e_text is summed over
its keys again, and e_self = dout . out - tanh(gate) e_text: no second output is kept for the
backward. But out is rounded. An error of e, times the mean of the keys, is an error of dq that does
not shrink with the number of keys, while dq itself does: 7 % of dq in bfloat16 at 4096 keys whose
mean is as large as their deviation, 0.2 % with 8 more bits of out. So the forward keeps those bits
where there will be a backward.

Kept besides inputs and output: those 8 bits a value (16-bit dtypes only) and four numbers a row.
"""

import triton
import triton.language as tl

from lumina_kernels.triton._arguments import COUNTS
from lumina_kernels.triton._tiles import (
    add_dot,
    dot_rows,
    load_tile,
    multiply,
    scale_by,
    select,
    store_tile,
    sum_columns,
    to_float32,
    zeros,
)
from lumina_kernels.triton.gqa_attention_walk import (
    bias_tile,
    keys_of,
    load_keys,
    load_queries,
    load_stats,
    own_keys,
    program_block,
    row_numbers,
    tanh_gate,
    valid_keys,
    walk_tiles,
    weights_of,
)


@triton.jit(do_not_specialize=COUNTS)
def gqa_attention_dq_kernel(
    dout, q, tokens, text, text_gate_ptr, bias,  # as in the forward, but with the sign of the scale
    out_ptr, error_ptr, stats_ptr, text_stats_ptr,
    dlse_ptr,  # (B, L, H) or None
    dq_ptr, delta_ptr,  # (B, L, H, K); e, (B, G, L, R)
    text_terms,  # e of the text, and tanh(gate) over the total of its weights, (B, G, L, R)
    dbias_ptr,  # (B, H, L, L_kv) zeros, or None
    L, G, K: tl.constexpr, KS: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """dq = scale dS k + scale_text dS_text k_text, dbias = dS, and for dkv e of both branches."""
    n_rows = L * R
    block, g, b = program_block(tl.cdiv(n_rows, BLOCK_M), G)
    rows, exist = row_numbers(block, n_rows, 0, BLOCK_M)
    stats = (b * G + g) * n_rows + rows
    out_rows = ((b * L + rows // R) * G * R + g * R + rows % R)[:, None] * K

    dout_tile = load_queries(dout, block * BLOCK_M, exist, b, g, R, UNIT, BLOCK_M, K, KS)
    out = load_tile(out_ptr, out_rows, exist[:, None], K, KS)
    if error_ptr is not None:
        error = load_tile(error_ptr, out_rows, exist[:, None], K, KS)
        out = _add_error(out, error)
    delta = sum_columns(multiply(to_float32(dout_tile), to_float32(out)))
    if dlse_ptr is not None:  # of a score it is P dlse
        lse_rows = (b * L + rows // R) * G * R + g * R + rows % R
        delta -= tl.load(dlse_ptr + lse_rows, mask=exist, other=0.0)
    q_tile = load_queries(q, block * BLOCK_M, exist, b, g, R, UNIT, BLOCK_M, K, KS)
    where = (b, g, rows, n_rows)

    if text_gate_ptr is not None:
        keys = keys_of(text, b, g, UNIT)
        text_stats = load_stats(text_stats_ptr, stats, exist)
        text_context = (q_tile, dout_tile, keys, text_stats, text[4], None, where)
        e = walk_tiles(
            _add_delta, tl.zeros((BLOCK_M,), tl.float32), text_context,
            text[2], b, text[3], K, KS, R, EDGE, EDGE, SCAN,
        )  # fmt: skip
        tl.store(text_terms[0] + stats, e, mask=exist)
        gate = tanh_gate(text_gate_ptr, g * R + rows % R)
        tl.store(text_terms[1] + stats, gate * tl.exp2(-text_stats[1]), mask=exist)
        delta -= gate * e

    tl.store(delta_ptr + stats, delta, mask=exist)
    keys = keys_of(tokens, b, g, UNIT)
    context = (
        q_tile, dout_tile, keys, load_stats(stats_ptr, stats, exist), tokens[4], bias, where,
    )  # fmt: skip
    scale, _, _, before = tokens[4]
    if dbias_ptr is None:
        context = (context, delta * before, before, None, None, G)
    else:
        context = (context, delta, None, before, dbias_ptr, G)
    acc = walk_tiles(
        _add_dq, zeros(((0, BLOCK_M),), KS), context,
        tokens[2], b, tokens[3], K, KS, R, BLOCK_N, EDGE, SCAN,
    )  # fmt: skip
    acc = scale_by(acc, scale / before)
    if text_gate_ptr is not None:
        acc = walk_tiles(
            _add_dq, acc, (text_context, e, None, (gate * text[4][0])[:, None], None, G),
            text[2], b, text[3], K, KS, R, EDGE, EDGE, SCAN,
        )  # fmt: skip
    rows, exist = row_numbers(block, n_rows, 1, BLOCK_M)
    out_rows = ((b * L + rows // R) * G * R + g * R + rows % R)[:, None] * K
    store_tile(dq_ptr, acc, out_rows, exist[:, None], K, KS)


@triton.jit
def _add_error(out, error):
    """The output before it was rounded, to about 7 more bits."""
    half: tl.constexpr = 2**-8 if out[0].dtype == tl.bfloat16 else 2**-11
    exact = ()
    for j in tl.static_range(len(out)):
        x = out[j].to(tl.float32)
        exact = exact + (x + error[j].to(tl.float32) * (tl.abs(x) * (half / 127)),)
    return exact


@triton.jit
def _weights(
    context, tile, K: tl.constexpr, KS: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """P and dP of one tile of keys, and the keys."""
    columns = tile[1] + tl.arange(0, BLOCK)
    inside = None
    if MASKED:
        inside = columns < tile[2]
    q, dout, keys, stats, scales, bias, where = context
    k, v = keys
    k = load_keys(k, tile[1], inside, BLOCK, K, KS)
    added = None
    if bias is not None:
        b, g, rows, n_rows = where
        exist, there = (rows < n_rows)[:, None], (columns < tile[2])[None, :]
        added = bias_tile(bias, b, g, rows[:, None], columns[None, :], exist, there, R)
    p = weights_of(dot_rows(q, k), stats[0][:, None], stats[1][:, None], scales, added)
    return p, dot_rows(dout, load_keys(v, tile[1], inside, BLOCK, K, KS)), k


@triton.jit
def _add_delta(
    e, context, tile, K: tl.constexpr, KS: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """e + sum P dP over one tile."""
    p, dp, _ = _weights(context, tile, K, KS, R, BLOCK, MASKED)
    columns = tile[1] + tl.arange(0, BLOCK)
    inside = None
    if MASKED:
        inside = columns < tile[2]
    valid = valid_keys(tile, columns, inside, context[6], R)
    return e + tl.sum(tl.where(valid, p * dp, 0.0), 1)


@triton.jit
def _add_dq(
    acc, context, tile, K: tl.constexpr, KS: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq + weight dS k over one tile; dS itself is the gradient of the bias. The weight multiplies
    dS after that or, for one multiplication less, dP before it, and then delta has it."""
    columns = tile[1] + tl.arange(0, BLOCK)
    inside = None
    if MASKED:
        inside = columns < tile[2]
    branch, delta, before, after, dbias_ptr, G = context
    p, dp, k = _weights(branch, tile, K, KS, R, BLOCK, MASKED)
    if before is not None:
        dp *= before
    ds = p * (dp - delta[:, None])
    if MASKED:  # masked keys may be anything, P inf or NaN
        ds = tl.where(valid_keys(tile, columns, inside, branch[6], R), ds, 0.0)
    if dbias_ptr is not None:
        b, g, rows, n_rows = branch[6]
        exist = (rows < n_rows)[:, None] & (columns < tile[2])[None, :]
        dbias_rows = ((b * G + g) * R + rows % R) * (n_rows // R) + rows // R
        ptrs = dbias_ptr + dbias_rows[:, None] * tile[2] + columns[None, :]
        tl.store(ptrs, ds.to(dbias_ptr.dtype.element_ty), mask=exist)
    if after is not None:
        ds *= after
    return add_dot(acc, ds, k)


@triton.jit  # with COUNTS, too: 5 % faster on Hopper where 16 divides the number of rows
def gqa_attention_dkv_kernel(
    dout, q, branch, bias,  # as for dq; of one branch
    stats_ptr, delta_ptr, weight_ptr,  # that branch's; the weight of the text or None
    dk_ptr, dv_ptr,  # (B, keys, G, K)
    L, G, K: tl.constexpr, KS: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of the tokens or of the text, in a loop over all rows that read
    them. Both branches in one kernel would make ptxas wait for every product.

    Scores are transposed here, (keys, rows). What a masked key gets stays within its own row of dk
    and dv, so the loop does no masking: the result is replaced by 0 at the end. A tile without a
    valid key skips the loop. The masks that tokens have of their own are read in the loop."""
    _, _, mask, n_keys, scales = branch
    n_rows = L * R
    block, g, b = program_block(tl.cdiv(n_keys, BLOCK_N), G)
    before = scales[3]
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n_keys
    valid = inside
    end = n_rows
    own = None
    if mask is not None:
        if len(mask) > 2:
            own = (mask[0] + b * mask[1], mask[2], mask[3])
        else:
            mask_ptr, stride_b = mask
            valid = tl.load(mask_ptr + b * stride_b + columns, mask=inside, other=0) != 0
            end = tl.where(tl.max(valid.to(tl.int32), 0) > 0, n_rows, 0)
    k, v = keys_of(branch, b, g, UNIT)
    k_tile = load_keys(k, block * BLOCK_N, inside, BLOCK_N, K, KS)
    v_tile = load_keys(v, block * BLOCK_N, inside, BLOCK_N, K, KS)
    dk = zeros(((0, BLOCK_N),), KS)
    dv = zeros(((0, BLOCK_N),), KS)
    stats = (b * G + g) * n_rows
    if end > 0:  # as in `_loop`
        for start in range(0, end, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            exist = rows < n_rows
            q_tile = load_queries(q, start, exist, b, g, R, UNIT, BLOCK_M, K, KS)
            top, total = load_stats(stats_ptr, stats + rows, exist)
            if weight_ptr is not None:  # the total is in the weight
                total = tl.zeros_like(total)
            added = None
            if bias is not None:
                there, those = inside[:, None], exist[None, :]
                added = bias_tile(bias, b, g, rows[None, :], columns[:, None], those, there, R)
            p = weights_of(dot_rows(k_tile, q_tile), top[None, :], total[None, :], scales, added)
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + stats + rows, mask=exist, other=0.0)
                p *= weight[None, :]
            if own is not None:
                seen = own_keys(own, rows[None, :], n_rows, columns[:, None], inside[:, None], R)
                p = tl.where(seen, p, 0.0)
            dout_tile = load_queries(dout, start, exist, b, g, R, UNIT, BLOCK_M, K, KS)
            dv = add_dot(dv, p, dout_tile)
            delta = tl.load(delta_ptr + stats + rows, mask=exist, other=0.0) * before
            ds = p * (dot_rows(v_tile, dout_tile) * before - delta[None, :])
            if own is not None:  # the other factor may be infinite
                ds = tl.where(p == 0, 0.0, ds)
            dk = add_dot(dk, ds, q_tile)
    out_rows = ((b * n_keys + columns) * G + g)[:, None] * K
    dk = scale_by(dk, scales[0] / before)
    store_tile(dk_ptr, select(dk, valid[:, None]), out_rows, inside[:, None], K, KS)
    store_tile(dv_ptr, select(dv, valid[:, None]), out_rows, inside[:, None], K, KS)
