"""What the forward and the backward kernels of gqa_attention share: rows, tiles, masks.

Rows. The R = H / G query heads of one key/value head are packed with the tokens: row m is token
m // R, head g*R + m % R. One tile of keys and values serves them all.

head_dim. A tile is held as two parts of LO and HI columns, powers of two that tensor cores take
(72 = 64 + 16, 96 = 64 + 32), where the next power of two would waste up to half of the products.
Columns from K on are zeros and are never read. HI = 0: K is a power of two, there is one part.
The parts are a tuple, (lo, hi) or (lo,).

Strides come divided by ALIGN, so that the compiler knows what they are multiples of: a head of 72
values starts at a multiple of 16 bytes, but Triton by itself sees a stride that is not a multiple
of 16 values and would read value by value.

A tensor of heads comes as a tuple (pointer, step in b, in l, in h). Offsets within a tile are
int32, which the launcher sees to; those of tiles are int64.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def program_block(blocks, G):
    """Block, key/value head and sample of this program; blocks of one head are neighbours."""
    program = tl.program_id(0).to(tl.int64)
    head = program // blocks
    return (program - head * blocks).to(tl.int32), head % G, head // G


@triton.jit
def row_numbers(block, n_rows, axis: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of this block's rows, (BLOCK,), and which of them there are.

    Grids have one axis, so that program_id(1) and (2) are 0. That the compiler does not know: with
    another `axis` it computes the numbers anew where they are needed again after a loop, and does
    not keep them, and all that follows from them, in registers meanwhile.
    """
    rows = block * BLOCK + tl.arange(0, BLOCK)
    if axis:
        rows += tl.program_id(axis)
    return rows, rows < n_rows


@triton.jit
def packed_rows(x, start, b, g, R: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Pointer and offsets (BLOCK,) of the rows from `start` on of a tensor of query heads."""
    ptr, step_b, step_l, step_h = x
    first = start // R
    ptr += (b * step_b + g * R * step_h + first.to(tl.int64) * step_l) * ALIGN
    rows = start + tl.arange(0, BLOCK)
    return ptr, (rows // R - first) * (step_l * ALIGN) + rows % R * (step_h * ALIGN)


@triton.jit
def _keys_of(x, b, g, ALIGN: tl.constexpr):
    """Pointer to the first key of one head, and the step from key to key."""
    ptr, step_b, step_l, step_h = x
    return ptr + (b * step_b + g * step_h) * ALIGN, step_l * ALIGN


@triton.jit
def keys_of(k, v, b, g, ALIGN: tl.constexpr):
    """Keys and values of one head for load_keys. Values that lie as the keys do come without steps
    and share the registers of the offsets."""
    v_ptr, step_b, step_l, step_h = v
    if step_l is None:
        v = (v_ptr, k[1], k[2], k[3])
    return _keys_of(k, b, g, ALIGN), _keys_of(v, b, g, ALIGN)


@triton.jit
def _part(ptr, rows, there, START: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr):
    columns = START + tl.arange(0, WIDTH)[None, :]
    ptrs = ptr + (rows[:, None] + columns)
    if START + WIDTH > K:
        if there is None:
            return tl.load(ptrs, mask=columns < K, other=0.0)
        else:
            return tl.load(ptrs, mask=there[:, None] & (columns < K), other=0.0)
    elif there is None:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=there[:, None], other=0.0)


@triton.jit
def load_parts(ptr, rows, there, K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    """Both parts of some rows, (BLOCK, LO) and (BLOCK, HI); zeros in rows that are not there."""
    lo = _part(ptr, rows, there, 0, LO, K)
    if HI:
        return lo, _part(ptr, rows, there, LO, HI, K)
    else:
        return (lo,)


@triton.jit
def load_keys(
    keys, start, there, BLOCK: tl.constexpr, K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr
):
    """Both parts of BLOCK keys from `start` on; all of them are there, or `there` says which."""
    ptr, step = keys
    ptr += tl.cast(start, tl.int64) * step
    return load_parts(ptr, tl.arange(0, BLOCK) * step, there, K, LO, HI)


@triton.jit
def store_parts(ptr, parts, rows, there, K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    """The parts to rows of K values each, rounded to the dtype of `ptr`."""
    columns = tl.arange(0, LO)[None, :]
    ptrs = ptr + rows[:, None] * K + columns
    tl.store(ptrs, parts[0].to(ptr.dtype.element_ty), mask=there[:, None] & (columns < K))
    if HI:
        columns = LO + tl.arange(0, HI)[None, :]
        ptrs = ptr + rows[:, None] * K + columns
        tl.store(ptrs, parts[1].to(ptr.dtype.element_ty), mask=there[:, None] & (columns < K))


@triton.jit
def _error(x, dtype: tl.constexpr):
    rounded = x.to(dtype).to(tl.float32)
    half: tl.constexpr = 2**-8 if dtype == tl.bfloat16 else 2**-11
    most = tl.abs(rounded) * half
    part = tl.where(most > 0, (x - rounded) / most, 0.0)
    return tl.floor(tl.minimum(tl.maximum(part, -1.0), 1.0) * 127 + 0.5).to(tl.int8)


@triton.jit
def rounding_error(parts, dtype: tl.constexpr):
    """What the parts lose when they are rounded to 16 bits, in 127ths of the most they can lose."""
    if len(parts) == 2:
        return _error(parts[0], dtype), _error(parts[1], dtype)
    else:
        return (_error(parts[0], dtype),)


@triton.jit
def _with_error(rounded, error):
    half: tl.constexpr = 2**-8 if rounded.dtype == tl.bfloat16 else 2**-11
    x = rounded.to(tl.float32)
    return x + error.to(tl.float32) * (tl.abs(x) * (half / 127))


@triton.jit
def with_error(parts, error):
    """The parts before they were rounded, about 7 bits more of them."""
    lo = _with_error(parts[0], error[0])
    if len(parts) == 2:
        return lo, _with_error(parts[1], error[1])
    else:
        return (lo,)


@triton.jit
def sum_products(a, b):
    """sum a b of each row, over all of K."""
    out = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) == 2:
        out += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return out


@triton.jit
def dot_rows(a, b):
    """a bᵀ over all of K, (rows of a, rows of b). ieee: float32 is not cut to tf32."""
    out = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) == 2:
        out = tl.dot(a[1], tl.trans(b[1]), out, input_precision="ieee")
    return out


@triton.jit
def add_product(acc, p, b):
    """acc + p b, p rounded to the dtype of b."""
    p = p.to(b[0].dtype)
    lo = tl.dot(p, b[0], acc[0], input_precision="ieee")
    if len(acc) == 2:
        return lo, tl.dot(p, b[1], acc[1], input_precision="ieee")
    else:
        return (lo,)


@triton.jit
def add_parts(a, b):
    if len(a) == 2:
        return a[0] + b[0], a[1] + b[1]
    else:
        return (a[0] + b[0],)


@triton.jit
def zero_parts(BLOCK: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    lo = tl.zeros((BLOCK, LO), tl.float32)
    if HI:
        return lo, tl.zeros((BLOCK, HI), tl.float32)
    else:
        return (lo,)


@triton.jit
def scale_parts(parts, by):
    """The parts times one factor per row."""
    if len(parts) == 2:
        return parts[0] * by[:, None], parts[1] * by[:, None]
    else:
        return (parts[0] * by[:, None],)


@triton.jit
def select_parts(parts, valid):
    """The parts, 0 in the rows that are not valid."""
    lo = tl.where(valid[:, None], parts[0], 0.0)
    if len(parts) == 2:
        return lo, tl.where(valid[:, None], parts[1], 0.0)
    else:
        return (lo,)


@triton.jit
def walk_tiles(
    STEP: tl.constexpr, state, context, mask, b, n_keys,
    K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, EDGE: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """state = STEP(state, context, tile, ...) for all tiles of BLOCK keys that have a valid one.

    Those that are wholly valid come first, without any masking; then the others, in steps of EDGE
    keys, so that masking takes no more registers than the large tiles do. Tiles without a valid
    key are not touched. EDGE = BLOCK, for few keys: all tiles take the masked loop, to have one
    loop less.
    """
    if mask is None:
        first = 0
        if EDGE < BLOCK:
            n_full = n_keys // BLOCK
            state = _loop(STEP, state, context, None, n_keys, 0, n_full, 0,
                          K, LO, HI, R, BLOCK, BLOCK, False)  # fmt: skip
            first = n_full * BLOCK
        state = _loop(STEP, state, context, None, n_keys, first, tl.cdiv(n_keys - first, EDGE), 0,
                      K, LO, HI, R, EDGE, EDGE, True)  # fmt: skip
    else:
        ptr, step = mask
        ptr += b * step
        for first in range(0, n_keys, SCAN * BLOCK):
            full, some, n_full, n_some = _scan_mask(ptr, first, n_keys, BLOCK, SCAN)
            if EDGE < BLOCK:
                state = _loop(STEP, state, context, ptr, n_keys, first, n_full, full,
                              K, LO, HI, R, BLOCK, BLOCK, False)  # fmt: skip
            else:
                some |= full
                n_some += n_full
            state = _loop(STEP, state, context, ptr, n_keys, first, n_some * (BLOCK // EDGE), some,
                          K, LO, HI, R, BLOCK, EDGE, True)  # fmt: skip
    return state


@triton.jit
def _loop(
    STEP: tl.constexpr, state, context, mask_ptr, n_keys, first, count, bits,
    K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`count` steps of PART keys: those of the tiles that `bits` names or, without a mask, all."""
    for i in range(count):
        if mask_ptr is None:
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
        state = STEP(state, context, (mask_ptr, start, n_keys), K, LO, HI, R, PART, MASKED)
    return state


@triton.jit
def valid_keys(tile, columns, inside):
    """Which keys of a tile with masked ones count."""
    if tile[0] is None:
        return inside
    else:
        return tl.load(tile[0] + columns, mask=inside, other=0) != 0


@triton.jit
def _scan_mask(mask_ptr, first, n_keys, BLOCK: tl.constexpr, SCAN: tl.constexpr):
    """Which of the next SCAN tiles of keys are wholly valid (bits), which partly, and the counts.

    Words of bits in registers: no list in memory, no kernel of its own, nothing waits for the
    host. Keys beyond the last count as masked.
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
def bias_tile(bias, b, g, rows, keys, there, R: tl.constexpr):
    """Bias times log2(e) of some rows and keys, which may be given as (M, 1) and (1, N) or turned.
    0 where there is nothing."""
    ptr, step_b, step_h, step_l, step_key = bias
    ptr += b * step_b + g * R * step_h
    ptrs = ptr + (rows // R).to(tl.int64) * step_l + (rows % R).to(tl.int64) * step_h
    values = tl.load(ptrs + keys.to(tl.int64) * step_key, mask=there, other=0.0)
    return values.to(tl.float32) * LOG2E


@triton.jit
def load_lse(lse_ptr, at, there):
    """lse of some rows; +inf for one without a key and for what is no row: its P is 0."""
    lse = tl.load(lse_ptr + at, mask=there, other=float("inf"))
    return tl.where(lse == -float("inf"), float("inf"), lse)


@triton.jit
def tanh_gate(ptr, heads):
    """tanh(gate) of some heads. Near 0, where 1 - e cancels, by its series."""
    x = tl.load(ptr + heads).to(tl.float32)
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    far = tl.where(x < 0, -far, far)
    s = x * x
    near = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, far)
