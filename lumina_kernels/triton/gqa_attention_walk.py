"""What the forward and the backward kernels of gqa_attention share: query rows, keys, and the walk
over the tiles of keys that have a valid one.

Rows. The R = H / G query heads of one key/value head are packed with the tokens: row m is token
m // R, head g*R + m % R. One tile of keys and values serves them all.

Branches. The keys of the tokens and those of the text come as tuples (k, v, mask, number of keys,
scales): k and v are heads (pointer, stride of b, of l, of h). The mask is int8: None, or (pointer,
stride of b), with the keys of a sample next to each other, or, where every token has a mask of its
own, (pointer, stride of b, of l, of the key). The scales are (scale, inner, outer, before): the
next two are for weights, the last is a power of 2 that score gradients are multiplied by before the
sums over queries or keys, which might else be infinite where these are large and the scale is
small.

Weights. That of a product s = q kᵀ is 2^((inner * s - top) * outer), top being the row's largest
inner * s; with a bias s is the biased score. The difference comes before the product with the
scale: it is exact next to the largest score, where rounded scores would differ by more than
exponents can.

Strides come in units of UNIT, see `_arguments.in_units`. Offsets within a tile are int32 (the
launcher makes sure they fit); offsets of tiles are int64.
"""

import triton
import triton.language as tl

from lumina_kernels.triton._tiles import load_tile


@triton.jit
def program_block(blocks, G):
    """Block, key/value head and sample of this program; blocks of one head are neighbours."""
    program = tl.program_id(0).to(tl.int64)
    head = program // blocks
    return (program - head * blocks).to(tl.int32), head % G, head // G


@triton.jit
def row_numbers(block, n_rows, axis: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of this block's rows, (BLOCK,), and which of them exist.

    Grids have one axis, so program_id(1) and (2) are 0, but the compiler does not know that. With
    another `axis` after a loop it computes the numbers a second time there, instead of keeping
    them, and all that follows from them, in registers through the loop.
    """
    rows = block * BLOCK + tl.arange(0, BLOCK)
    if axis:
        rows += tl.program_id(axis)
    return rows, rows < n_rows


@triton.jit
def load_queries(
    x, start, mask, b, g, R: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    K: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """BLOCK rows from `start` on of a tensor of query heads, zeros outside `mask`, (BLOCK,)."""
    ptr, stride_b, stride_l, stride_h = x
    first = start // R
    ptr += (b * stride_b + g * R * stride_h + first.to(tl.int64) * stride_l) * UNIT
    rows = start + tl.arange(0, BLOCK)
    offsets = (rows // R - first) * (stride_l * UNIT) + rows % R * (stride_h * UNIT)
    return load_tile(ptr, offsets[:, None], mask[:, None], K, KS)


@triton.jit
def _first_key(x, b, g, UNIT: tl.constexpr):
    ptr, stride_b, stride_l, stride_h = x
    return ptr + (b * stride_b + g * stride_h) * UNIT, stride_l * UNIT


@triton.jit
def keys_of(branch, b, g, UNIT: tl.constexpr):
    """Keys and values of one head for `load_keys`: (pointer to the first, stride) of each. Values
    laid out as the keys come without strides and share the registers of the offsets."""
    k, v = branch[0], branch[1]
    if len(v) == 1:
        v = (v[0], k[1], k[2], k[3])
    return _first_key(k, b, g, UNIT), _first_key(v, b, g, UNIT)


@triton.jit
def load_keys(
    keys, start, inside, BLOCK: tl.constexpr, K: tl.constexpr, KS: tl.constexpr
):  # fmt: skip
    """BLOCK keys from `start` on, zeros for those not `inside`; None: all of them exist."""
    ptr, stride = keys
    ptr += tl.cast(start, tl.int64) * stride
    offsets = tl.arange(0, BLOCK)[:, None] * stride
    if inside is None:
        return load_tile(ptr, offsets, None, K, KS)
    else:
        return load_tile(ptr, offsets, inside[:, None], K, KS)


@triton.jit
def walk_tiles(
    STEP: tl.constexpr, state, context, mask, b, n_keys, K: tl.constexpr, KS: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """state = STEP(state, context, tile, ...) for all tiles of BLOCK keys that have a valid one.

    Wholly valid tiles come first, without any masking; then the others, in steps of EDGE keys, so
    that masking takes no more registers than the large tiles do. Tiles without a valid key are not
    touched. EDGE = BLOCK, for few keys: all tiles take the masked loop, which saves the other one,
    and is where tokens may have masks of their own; these are read pair by pair.
    """
    if mask is None:
        first = 0
        if EDGE < BLOCK:
            n_full = n_keys // BLOCK
            state = _loop(STEP, state, context, None, n_keys, 0, n_full, 0,
                          K, KS, R, BLOCK, BLOCK, False)  # fmt: skip
            first = n_full * BLOCK
        state = _loop(STEP, state, context, None, n_keys, first, tl.cdiv(n_keys - first, EDGE), 0,
                      K, KS, R, EDGE, EDGE, True)  # fmt: skip
    elif len(mask) > 2:
        tl.static_assert(EDGE == BLOCK)
        ptr, stride_b, stride_l, stride_key = mask
        own = (ptr + b * stride_b, stride_l, stride_key)
        state = _loop(STEP, state, context, own, n_keys, 0, tl.cdiv(n_keys, EDGE), 0,
                      K, KS, R, EDGE, EDGE, True)  # fmt: skip
    else:
        ptr, stride_b = mask
        ptr += b * stride_b
        for first in range(0, n_keys, SCAN * BLOCK):
            full, some, n_full, n_some = _scan_mask(ptr, first, n_keys, BLOCK, SCAN)
            if EDGE < BLOCK:
                state = _loop(STEP, state, context, (ptr,), n_keys, first, n_full, full,
                              K, KS, R, BLOCK, BLOCK, False)  # fmt: skip
            else:
                some |= full
                n_some += n_full
            state = _loop(STEP, state, context, (ptr,), n_keys, first,
                          n_some * (BLOCK // EDGE), some,
                          K, KS, R, BLOCK, EDGE, True)  # fmt: skip
    return state


@triton.jit
def _loop(
    STEP: tl.constexpr, state, context, mask, n_keys, first, count, bits,
    K: tl.constexpr, KS: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`count` steps of PART keys: those of the tiles named by `bits`, or of all without a mask of
    keys.

    STEP takes a tile as (mask, its first key, number of all keys). The mask is that of the sample:
    None, or (pointer,), or (pointer, stride of l, of the key).

    The `if` keeps state that no product has written away from the wait that Hopper's asynchronous
    products need after the loop. Else ptxas may make each product wait for the one before (C7515).
    It does not where tiles are named by bits, in whose loop the `if` has Triton compute the weights
    three times, for three layouts.
    """
    if mask is not None and len(mask) == 1:
        state = _steps(STEP, state, context, mask, n_keys, first, count, bits,
                       K, KS, R, BLOCK, PART, MASKED)  # fmt: skip
    elif count > 0:
        state = _steps(STEP, state, context, mask, n_keys, first, count, bits,
                       K, KS, R, BLOCK, PART, MASKED)  # fmt: skip
    return state


@triton.jit
def _steps(
    STEP: tl.constexpr, state, context, mask, n_keys, first, count, bits,
    K: tl.constexpr, KS: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for i in range(count):
        if mask is None:
            start = first + i * PART
        elif len(mask) > 1:
            start = first + i * PART
        else:
            # The lowest bit's index is the exponent of a float32.
            low = bits & -bits
            index = ((low.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
            start = first + index * BLOCK
            if PART < BLOCK:
                part = i % (BLOCK // PART)
                start += part * PART
                low = tl.where(part == BLOCK // PART - 1, low, 0)
            bits ^= low
        state = STEP(state, context, (mask, start, n_keys), K, KS, R, PART, MASKED)
    return state


@triton.jit
def valid_keys(tile, columns, inside, where, R: tl.constexpr):
    """Which keys of a tile with masked ones are valid, as one row for all rows or as one for each;
    these are at `where`: (b, g, rows, number of all rows)."""
    mask, _, _ = tile
    if mask is None:
        return inside[None, :]
    elif len(mask) > 1:
        _, _, rows, n_rows = where
        return own_keys(mask, rows[:, None], n_rows, columns[None, :], inside[None, :], R)
    else:
        valid = tl.load(mask[0] + columns, mask=inside, other=0) != 0
        return valid[None, :]


@triton.jit
def own_keys(mask, rows, n_rows, keys, inside, R: tl.constexpr):
    """Which keys, none outside `inside`, are valid for the tokens of some rows, all given as (M, 1)
    and (1, N) or transposed, by a sample's mask (pointer, stride of l, of the key). For rows that
    do not exist it is what it is for the last one."""
    ptr, stride_l, stride_key = mask
    tokens = tl.minimum(rows, n_rows - 1) // R
    ptrs = ptr + tokens.to(tl.int64) * stride_l + keys.to(tl.int64) * stride_key
    return tl.load(ptrs, mask=inside, other=0) != 0


@triton.jit
def _scan_mask(mask_ptr, first, n_keys, BLOCK: tl.constexpr, SCAN: tl.constexpr):
    """Which of the next SCAN tiles of keys are wholly valid and which partly, as bits of a word,
    and how many are.

    Words in registers need no list in memory, no kernel that makes it, and no wait for the host.
    Keys beyond the last count as masked.
    """
    tiles = tl.arange(0, SCAN)
    keys = first + tiles[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    valid = tl.load(mask_ptr + keys, mask=keys < n_keys, other=0).to(tl.int32)
    full = tl.min(valid, 1)
    some = tl.max(valid, 1) - full
    shifts = tiles.to(tl.int64)
    full_bits = tl.sum(full.to(tl.int64) << shifts, 0)
    some_bits = tl.sum(some.to(tl.int64) << shifts, 0)
    return full_bits, some_bits, tl.sum(full, 0), tl.sum(some, 0)


@triton.jit
def bias_tile(bias, b, g, rows, keys, row_mask, key_mask, R: tl.constexpr):
    """Bias of some rows and keys, given as (M, 1) and (1, N) or transposed, as are their masks,
    outside of which it is zero. bias: (pointer, stride of b, of h, of l, of the key) or, if all
    rows share it, (pointer, stride of b, of the key), which gives a tile of one row."""
    ptr = bias[0] + b * bias[1]
    if len(bias) == 3:
        values = tl.load(ptr + keys.to(tl.int64) * bias[2], mask=key_mask, other=0.0)
    else:
        _, _, stride_h, stride_l, stride_key = bias
        ptr += g * R * stride_h
        ptrs = ptr + (rows // R).to(tl.int64) * stride_l + (rows % R).to(tl.int64) * stride_h
        mask = row_mask & key_mask
        values = tl.load(ptrs + keys.to(tl.int64) * stride_key, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def load_stats(ptr, rows, mask):
    """What the forward kept of some rows; outside `mask` a total that makes P = 0."""
    top = tl.load(ptr + 2 * rows, mask=mask, other=0.0)
    return top, tl.load(ptr + 2 * rows + 1, mask=mask, other=float("inf"))


@triton.jit
def weights_of(s, top, total, scales, bias):
    """Softmax of products s = q kᵀ by the statistics of their rows; bias: a tile, or None.

    Here a product may be a little larger than the largest one was in the forward, where tensor
    cores added it up in another order."""
    scale, inner, outer, _ = scales
    if bias is not None:
        s = s * scale + bias
    return tl.exp2(tl.minimum((s * inner - top) * outer - total, 0.0))


@triton.jit
def tanh_gate(ptr, heads):
    """tanh(gate) of some heads. Near 0, where 1 - e cancels, it is its series."""
    x = tl.load(ptr + heads).to(tl.float32)
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    far = tl.where(x < 0, -far, far)
    s = x * x
    near = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, far)
