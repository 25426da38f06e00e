"""Backward kernels of gqa_attention: one over query rows, one over keys; nothing is atomic.

Per branch, with P = exp2(s - lse) and w = 1 (self) or tanh(gate) (text):

    dP = dout vᵀ,  e = sum P dP = dout . (P v),  dS = w P (dP - e),
    dq += scale dS k,  dk = scale dSᵀ q,  dv = w Pᵀ dout,  dgate = (1 - tanh²) sum e_text

A row's e is that of its own branch, and out is the sum of both. The text is short, so e_text is
summed over its keys once more, and e_self = dout . out - tanh(gate) e_text: no second output is
kept for the backward. But out is rounded, and an error of e, times the mean of the keys, is an
error of dq that does not shrink as the keys become more, while dq itself does: 7 % of dq in
bfloat16 at 4096 keys whose mean is as large as their deviation, 0.2 % with 8 bits more of out.
So the forward keeps those bits where there will be a backward.

Kept besides inputs and output: those 8 bits a value (16-bit dtypes only) and two lse a row.
"""

import triton
import triton.language as tl

from lumina_kernels.triton.gqa_attention_walk import (
    LOG2E,
    add_product,
    bias_tile,
    dot_rows,
    keys_of,
    load_keys,
    load_lse,
    load_parts,
    packed_rows,
    program_block,
    row_numbers,
    scale_parts,
    select_parts,
    store_parts,
    sum_products,
    tanh_gate,
    valid_keys,
    walk_tiles,
    with_error,
    zero_parts,
)


@triton.jit
def gqa_attention_dq_kernel(
    dout, q, k, v, key_mask, text_k, text_v, text_mask, text_gate_ptr, bias,  # as in the forward
    out_ptr, error_ptr, lse_ptr, text_lse_ptr,
    dq_ptr, delta_ptr, text_delta_ptr,  # (B, L, H, K); e of both branches, (B, G, L, R)
    dbias_ptr,  # (B, H, L, L_kv) zeros, or None
    L, L_kv, T, G, scale, text_scale,
    K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, R: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """dq = scale dS k + scale_text dS_text k_text, dbias = dS, and e of both branches."""
    n_rows = L * R
    block, g, b = program_block(tl.cdiv(n_rows, BLOCK_M), G)
    rows, there = row_numbers(block, n_rows, 0, BLOCK_M)
    stats = (b * G + g) * n_rows + rows
    out_rows = (b * L + rows // R) * G * R + g * R + rows % R

    ptr, offsets = packed_rows(dout, block * BLOCK_M, b, g, R, ALIGN, BLOCK_M)
    dout_parts = load_parts(ptr, offsets, there, K, LO, HI)
    out = load_parts(out_ptr, out_rows * K, there, K, LO, HI)
    if error_ptr is not None:
        error = load_parts(error_ptr, out_rows * K, there, K, LO, HI)
        delta = sum_products(dout_parts, with_error(out, error))
    else:
        delta = sum_products(dout_parts, out)
    ptr, offsets = packed_rows(q, block * BLOCK_M, b, g, R, ALIGN, BLOCK_M)
    q_parts = load_parts(ptr, offsets, there, K, LO, HI)
    where = (b, g, rows, n_rows)
    ours = (q_parts, dout_parts)

    if text_k is not None:
        keys = keys_of(text_k, text_v, b, g, ALIGN)
        t_lse = load_lse(text_lse_ptr, stats, there)
        text = (ours, keys, t_lse, text_scale * LOG2E, None, where)
        e = walk_tiles(
            _add_delta, tl.zeros((BLOCK_M,), tl.float32), text,
            text_mask, b, T, K, LO, HI, R, EDGE, EDGE, SCAN,
        )  # fmt: skip
        tl.store(text_delta_ptr + stats, e, mask=there)
        gate = tanh_gate(text_gate_ptr, g * R + rows % R)
        delta -= gate * e

    tl.store(delta_ptr + stats, delta, mask=there)
    lse = load_lse(lse_ptr, stats, there)
    keys = keys_of(k, v, b, g, ALIGN)
    branch = (ours, keys, lse, scale * LOG2E, bias, where)
    acc = walk_tiles(
        _add_dq, zero_parts(BLOCK_M, LO, HI), (branch, delta, None, dbias_ptr, G),
        key_mask, b, L_kv, K, LO, HI, R, BLOCK_N, EDGE, SCAN,
    )  # fmt: skip
    acc = scale_parts(acc, tl.full((BLOCK_M,), 1.0, tl.float32) * scale)
    if text_k is not None:
        acc = walk_tiles(
            _add_dq, acc, (text, e, gate * text_scale, None, G),
            text_mask, b, T, K, LO, HI, R, EDGE, EDGE, SCAN,
        )  # fmt: skip
    rows, there = row_numbers(block, n_rows, 1, BLOCK_M)
    out_rows = (b * L + rows // R) * G * R + g * R + rows % R
    store_parts(dq_ptr, acc, out_rows, there, K, LO, HI)


@triton.jit
def _weights(
    branch, tile,
    K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """P and dP of one tile of keys, and the keys."""
    columns = tile[1] + tl.arange(0, BLOCK)
    inside = None
    if MASKED:
        inside = columns < tile[2]
    ours, keys, lse, scale_log2, bias, where = branch
    q, dout = ours
    k, v = keys
    k = load_keys(k, tile[1], inside, BLOCK, K, LO, HI)
    s = dot_rows(q, k) * scale_log2
    if bias is not None:
        b, g, rows, n_rows = where
        there = (rows < n_rows)[:, None] & (columns < tile[2])[None, :]
        s += bias_tile(bias, b, g, rows[:, None], columns[None, :], there, R)
    p = tl.exp2(s - lse[:, None])
    return p, dot_rows(dout, load_keys(v, tile[1], inside, BLOCK, K, LO, HI)), k


@triton.jit
def _add_delta(
    e, branch, tile,
    K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """e + sum P dP over one tile."""
    p, dp, _ = _weights(branch, tile, K, LO, HI, R, BLOCK, MASKED)
    columns = tile[1] + tl.arange(0, BLOCK)
    inside = None
    if MASKED:
        inside = columns < tile[2]
    valid = valid_keys(tile, columns, inside)
    return e + tl.sum(tl.where(valid[None, :], p * dp, 0.0), 1)


@triton.jit
def _add_dq(
    acc, context, tile,
    K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq + dS k over one tile; dS itself is the gradient of the bias."""
    columns = tile[1] + tl.arange(0, BLOCK)
    inside = None
    if MASKED:
        inside = columns < tile[2]
    branch, delta, weight, dbias_ptr, G = context
    p, dp, k = _weights(branch, tile, K, LO, HI, R, BLOCK, MASKED)
    ds = p * (dp - delta[:, None])
    if MASKED:  # masked keys may be anything, P inf or NaN
        valid = valid_keys(tile, columns, inside)
        ds = tl.where(valid[None, :], ds, 0.0)
    if weight is not None:
        ds *= weight[:, None]
    if dbias_ptr is not None:
        b, g, rows, n_rows = branch[5]
        there = (rows < n_rows)[:, None] & (columns < tile[2])[None, :]
        at = ((b * G + g) * R + rows % R) * (n_rows // R) + rows // R
        ptrs = dbias_ptr + at[:, None] * tile[2] + columns[None, :]
        tl.store(ptrs, ds.to(dbias_ptr.dtype.element_ty), mask=there)
    return add_product(acc, ds, k)


@triton.jit
def gqa_attention_dkv_kernel(
    dout, q, k, v, key_mask, text_k, text_v, text_mask, text_gate_ptr, bias,  # as in the forward
    lse_ptr, text_lse_ptr, delta_ptr, text_delta_ptr,
    dk_ptr, dv_ptr, dtext_k_ptr, dtext_v_ptr,  # (B, L_kv, G, K), (B, T, G, K)
    L, L_kv, T, G, scale, text_scale,
    K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, R: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, of the text (first) or of the tokens."""
    text_blocks = tl.cdiv(T, BLOCK_N)
    block, g, b = program_block(text_blocks + tl.cdiv(L_kv, BLOCK_N), G)
    if block < text_blocks:
        if text_k is not None:
            _dkv(
                dout, q, text_k, text_v, text_mask, None, text_gate_ptr, text_lse_ptr,
                text_delta_ptr, dtext_k_ptr, dtext_v_ptr, block, b, g, G, L * R, T, text_scale,
                K, LO, HI, R, ALIGN, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        _dkv(
            dout, q, k, v, key_mask, bias, None, lse_ptr,
            delta_ptr, dk_ptr, dv_ptr, block - text_blocks, b, g, G, L * R, L_kv, scale,
            K, LO, HI, R, ALIGN, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _dkv(
    dout, q, k, v, mask, bias, gate_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    block, b, g, G, n_rows, n_keys, scale,
    K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, R: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The loop over all rows that read these keys, turned: scores are (keys, rows).

    What a masked key gets stays within its own row of dk and dv, so the loop does no masking: the
    result is replaced by 0 at the end. A tile without a valid key skips the loop."""
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n_keys
    valid = inside
    end = n_rows
    if mask is not None:
        mask_ptr, mask_step = mask
        valid = tl.load(mask_ptr + b * mask_step + columns, mask=inside, other=0) != 0
        end = tl.where(tl.max(valid.to(tl.int32), 0) > 0, n_rows, 0)
    k, v = keys_of(k, v, b, g, ALIGN)
    k_parts = load_keys(k, block * BLOCK_N, inside, BLOCK_N, K, LO, HI)
    v_parts = load_keys(v, block * BLOCK_N, inside, BLOCK_N, K, LO, HI)
    dk = zero_parts(BLOCK_N, LO, HI)
    dv = zero_parts(BLOCK_N, LO, HI)
    stats = (b * G + g) * n_rows
    for start in range(0, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        there = rows < n_rows
        ptr, offsets = packed_rows(q, start, b, g, R, ALIGN, BLOCK_M)
        q_parts = load_parts(ptr, offsets, there, K, LO, HI)
        lse = load_lse(lse_ptr, stats + rows, there)
        s = dot_rows(k_parts, q_parts) * (scale * LOG2E)
        if bias is not None:
            both = inside[:, None] & there[None, :]
            s += bias_tile(bias, b, g, rows[None, :], columns[:, None], both, R)
        p = tl.exp2(s - lse[None, :])
        if gate_ptr is not None:
            p *= tanh_gate(gate_ptr, g * R + rows % R)[None, :]
        ptr, offsets = packed_rows(dout, start, b, g, R, ALIGN, BLOCK_M)
        dout_parts = load_parts(ptr, offsets, there, K, LO, HI)
        dv = add_product(dv, p, dout_parts)
        delta = tl.load(delta_ptr + stats + rows, mask=there, other=0.0)
        ds = p * (dot_rows(v_parts, dout_parts) - delta[None, :])
        dk = add_product(dk, ds, q_parts)
    out_rows = (b * n_keys + columns) * G + g
    dk = scale_parts(dk, tl.full((BLOCK_N,), 1.0, tl.float32) * scale)
    store_parts(dk_ptr, select_parts(dk, valid), out_rows, inside, K, LO, HI)
    store_parts(dv_ptr, select_parts(dv, valid), out_rows, inside, K, LO, HI)
