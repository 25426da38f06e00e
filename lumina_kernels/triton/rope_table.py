"""Triton kernel of rope_table: a program rotates all heads of one token of q and k.

The gradients of q and k are the same sums with the two sines exchanged and negated. The kernel
does not differentiate the tables; the op refuses those that ask for a gradient.
"""

import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._arguments import heads_of, in_units, table_of
from lumina_kernels.triton._rotation import token_options
from lumina_kernels.triton._tiles import cut, load_heads, load_vector, split_token, store_heads


@triton.jit
def _rotate_pairs(a, b, cos_a, sin_a, cos_b, sin_b, BACKWARD: tl.constexpr):
    """(a cos_a - b sin_a, b cos_b + a sin_b); BACKWARD: with (sin_a, sin_b) -> (-sin_b, -sin_a)."""
    if BACKWARD:
        first, second = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    return first, second


@triton.jit
def _rotate_interleaved(
    x_ptr, stride, cos_ptr, sin_ptr, out_ptr, BACKWARD: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """Pairs (2j, 2j + 1): a block is read as it lies in memory and split in registers."""
    x = load_heads(x_ptr, stride, H, K, HS, KS)
    cos, sin = load_vector(cos_ptr, K, KS), load_vector(sin_ptr, K, KS)
    out = ()
    for i in tl.static_range(len(HS)):
        for j in tl.static_range(len(KS)):
            a, b = tl.split(tl.reshape(x[i * len(KS) + j], (HS[i][1], KS[j][1] // 2, 2)))
            cos_a, cos_b = tl.split(tl.reshape(cos[j], (1, KS[j][1] // 2, 2)))
            sin_a, sin_b = tl.split(tl.reshape(sin[j], (1, KS[j][1] // 2, 2)))
            a, b = _rotate_pairs(a, b, cos_a, sin_a, cos_b, sin_b, BACKWARD)
            out = out + (tl.reshape(tl.join(a, b), (HS[i][1], KS[j][1])),)
    store_heads(out_ptr, out, K, H, K, HS, KS)


@triton.jit
def _rotate_halves(
    x_ptr, stride, cos_ptr, sin_ptr, out_ptr, BACKWARD: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """Pairs (j, j + K/2): the two halves of the heads are two tiles."""
    M: tl.constexpr = K // 2
    a, b = load_heads(x_ptr, stride, H, M, HS, KS), load_heads(x_ptr + M, stride, H, M, HS, KS)
    cos_a, cos_b = load_vector(cos_ptr, M, KS), load_vector(cos_ptr + M, M, KS)
    sin_a, sin_b = load_vector(sin_ptr, M, KS), load_vector(sin_ptr + M, M, KS)
    out_a = ()
    out_b = ()
    for i in tl.static_range(len(HS)):
        for j in tl.static_range(len(KS)):
            first, second = _rotate_pairs(
                a[i * len(KS) + j], b[i * len(KS) + j], cos_a[j], sin_a[j], cos_b[j], sin_b[j],
                BACKWARD,
            )  # fmt: skip
            out_a = out_a + (first,)
            out_b = out_b + (second,)
    store_heads(out_ptr, out_a, K, H, M, HS, KS)
    store_heads(out_ptr + M, out_b, K, H, M, HS, KS)


@triton.jit
def _rotate_token(
    x, cos_ptr, sin_ptr, out_ptr, number, b, index, UNIT: tl.constexpr, BACKWARD: tl.constexpr,
    HALF: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    ptr, stride_b, stride_l, stride_h = x
    ptr += (b * stride_b + index * stride_l) * UNIT
    out_ptr += number * (H * K)
    if HALF:
        _rotate_halves(ptr, stride_h * UNIT, cos_ptr, sin_ptr, out_ptr, BACKWARD, H, K, HS, KS)
    else:
        _rotate_interleaved(ptr, stride_h * UNIT, cos_ptr, sin_ptr, out_ptr, BACKWARD, H, K, HS, KS)


@triton.jit
def rope_table_kernel(
    q, k,  # heads: (pointer, stride of b, of l, of h), k or None
    cos, sin,  # the same, shared by the heads
    q_out_ptr, k_out_ptr, L,
    UNIT: tl.constexpr, BACKWARD: tl.constexpr, HALF: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    HS: tl.constexpr, GS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """x -> x * cos + rot(x) * sin for q and k; BACKWARD: from the gradient of that, x's gradient"""
    number, b, index = split_token(tl.program_id(0), L)
    cos_ptr, cos_b, cos_l, _ = cos
    cos_ptr += (b * cos_b + index * cos_l) * UNIT
    sin_ptr, sin_b, sin_l, _ = sin
    sin_ptr += (b * sin_b + index * sin_l) * UNIT
    _rotate_token(
        q, cos_ptr, sin_ptr, q_out_ptr, number, b, index, UNIT, BACKWARD, HALF, H, K, HS, KS
    )
    if k is not None:
        _rotate_token(
            k, cos_ptr, sin_ptr, k_out_ptr, number, b, index, UNIT, BACKWARD, HALF, G, K, GS, KS
        )


def rope_table_fwd(q, k, cos, sin, pairing, backward: bool = False) -> tuple[Tensor, Tensor | None]:
    """q (B, L, H, K) and k (B, L, G, K) or None, rotated; `backward`: the gradients of q and k."""
    B, L, H, K = q.shape
    G = 1 if k is None else k.shape[2]
    q_out, k_out = q.new_empty(q.shape), None if k is None else k.new_empty(k.shape)
    if q.numel() == 0:
        return q_out, k_out
    (q, k, cos, sin), unit = in_units(heads_of(q), heads_of(k), table_of(cos), table_of(sin))
    half = pairing == "half"
    rope_table_kernel[(B * L,)](
        q, k, cos, sin, q_out, k_out, L, UNIT=unit, BACKWARD=backward, HALF=half, H=H, G=G, K=K,
        HS=cut(H), GS=cut(G), KS=cut(K // 2 if half else K), **token_options(max(H, G) * K, 80),
    )  # fmt: skip
    return q_out, k_out


def rope_table_bwd(dq_out, dk_out, cos, sin, pairing) -> tuple[Tensor, Tensor | None]:
    """dq and dk, None for None."""
    return rope_table_fwd(dq_out, dk_out, cos, sin, pairing, backward=True)
