"""Triton launchers of gqa_attention.

Keys and values come by pointers. With tensor descriptors (TMA) on sm_90 the inner loop for 128 keys
of 72 is 570 instructions instead of 556, in 170 registers instead of 213, which is still one block
a processor. warp_specialize does not compile there with 4 warps and does nothing with 8 (triton
3.9).
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lumina_kernels.triton._arguments import empty_as, heads_of, in_units
from lumina_kernels.triton._launch import launch
from lumina_kernels.triton._tiles import blocks
from lumina_kernels.triton._tune import AUTOTUNE, current_arch, fastest, magnitude
from lumina_kernels.triton.gqa_attention_bwd import (
    gqa_attention_dkv_kernel,
    gqa_attention_dq_kernel,
)
from lumina_kernels.triton.gqa_attention_fwd import gqa_attention_fwd_kernel
from lumina_kernels.triton.gqa_attention_tiles import options_on
from lumina_kernels.triton.gqa_attention_trial import prove

LOG2E = 1.4426950408889634


def gqa_attention_fwd(
    q, k, v, key_mask, scale, text_k, text_v, text_mask, text_gate, bias, with_error, lse=None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (B, L, H, K); its rounding error, int8; and for each branch and row the largest score, as
    in gqa_attention_walk, and log2 of the total of the weights, (B, G, L, R, 2) float32.

    Empty: the error unless it is wanted and out has 16 bits; the second branch without text. The
    log-sum-exp goes to `lse`, (B, L, H), where one is given."""
    (B, L, H, K), (_, L_kv, G, _) = q.shape, k.shape
    out = empty_as(q)
    stats = q.new_empty((B, G, L, H // G, 2), dtype=torch.float32)
    text_stats = stats.new_empty(0) if text_k is None else empty_as(stats)
    with_error = with_error and q.itemsize == 2
    error = q.new_empty(q.shape if with_error else 0, dtype=torch.int8)
    if out.numel() == 0:
        return out, error, stats, text_stats
    added = _bias(bias, (B, H, L, L_kv))
    if _is_on_trial(q):
        prove(gqa_attention_fwd, None, q, key_mask, text_k, text_mask, added)
    heads, unit = in_units(*map(heads_of, (q, k, v, text_k, text_v)))
    q, k, v, text_k, text_v = heads
    tokens = _branch(k, v, key_mask, abs(scale), bias)
    text = _branch(text_k, text_v, text_mask, K**-0.5)
    more = _has_two_layouts(tokens)
    options = _options("fwd", K, out.dtype, bias is not None, more, text is not None)
    arguments = (
        q, tokens, text, text_gate, added, out, error if with_error else None, stats, text_stats,
        lse, L, G,
    )  # fmt: skip
    _launch(
        "fwd", gqa_attention_fwd_kernel, L * H // G, arguments, options, out, L_kv,
        R=H // G, UNIT=unit, NEGATIVE=_is_negative(scale),
    )  # fmt: skip
    return out, error, stats, text_stats


def gqa_attention_bwd(
    dout, out, error, stats, text_stats, q, k, v, key_mask, scale, text_k, text_v, text_mask,
    text_gate, bias, with_dbias, dlse=None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dq, dk, dv, dtext_k, dtext_v, dtext_gate, dbias; None for None and for dbias unless wanted.

    Float32 work: one number per row and branch, and for the bias its gradient before it is summed
    over broadcast axes, (B, H, L, L_kv).
    """
    B, L, H, K = q.shape
    G, L_kv = k.shape[2], k.shape[1]
    dq, dk, dv, dtext_k, dtext_v = (
        None if x is None else empty_as(x) for x in (q, k, v, text_k, text_v)
    )
    delta = stats.new_empty(stats.shape[:-1])
    text_delta, text_weight = (
        delta.new_empty(0 if text_k is None else delta.shape) for _ in range(2)
    )
    dbias = None
    if with_dbias:
        whole = bias.shape == (B, H, L, L_kv)
        dbias = bias.new_zeros((B, H, L, L_kv), dtype=bias.dtype if whole else torch.float32)
    if dq.numel() == 0:
        for grad in (dk, dv, dtext_k, dtext_v, text_delta):
            if grad is not None:
                grad.zero_()
    else:
        added = _bias(bias, (B, H, L, L_kv))
        if _is_on_trial(q):
            prove(gqa_attention_fwd, gqa_attention_bwd, q, key_mask, text_k, text_mask, added)
        heads, unit = in_units(*map(heads_of, (dout, q, k, v, text_k, text_v)))
        dout, q, k, v, text_k, text_v = heads
        tokens = _branch(k, v, key_mask, scale, bias)
        text = _branch(text_k, text_v, text_mask, K**-0.5)
        constants = {"R": H // G, "UNIT": unit}
        options = _options("dq", K, dq.dtype, bias is not None, _has_two_layouts(tokens))
        arguments = (
            dout, q, tokens, text, text_gate, added,
            out, error if error.numel() else None, stats, text_stats, dlse,
            dq, delta, (text_delta, text_weight), dbias, L, G,
        )  # fmt: skip
        rows = L * H // G
        _launch("dq", gqa_attention_dq_kernel, rows, arguments, options, dq, L_kv, **constants)
        branches = [(tokens, added, stats, delta, None, dk, dv)]
        if text is not None:
            rest = text_stats, text_delta, text_weight, dtext_k, dtext_v
            branches.append((text, None, *rest))
        for branch, *rest in branches:
            keys = branch[3]
            if keys > 0:
                options = _options("dkv", K, dq.dtype, rest[0] is not None)
                arguments = dout, q, branch, *rest, L, G
                kernel = gqa_attention_dkv_kernel
                _launch("dkv", kernel, keys, arguments, options, dq, keys, **constants)
    dgate = None if text_gate is None else _dgate(text_gate, text_delta)
    if dbias is not None:
        dbias = dbias.sum_to_size(bias.shape).to(bias.dtype)
    return dq, dk, dv, dtext_k, dtext_v, dgate, dbias


def gqa_attention_lse_fwd(q, k, v, key_mask, scale, bias, with_error) -> tuple[Tensor, ...]:
    inputs = q, k, v, key_mask, scale, None, None, None, None, bias, with_error
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    out, *kept, _ = gqa_attention_fwd(*inputs, lse)
    return out, lse, *kept


def gqa_attention_lse_bwd(dout, dlse, out, error, stats, *inputs) -> tuple[Tensor | None, ...]:
    *inputs, bias, with_dbias = inputs
    inputs = *inputs, None, None, None, None, bias, with_dbias
    grads = gqa_attention_bwd(dout, out, error, stats, None, *inputs, dlse.contiguous())
    return *grads[:3], grads[-1]


def _dgate(gate: Tensor, text_delta: Tensor) -> Tensor:
    """(1 - tanh²) times the sum over all rows of dout . (P v), text_delta (B, G, L, R)."""
    total = text_delta.sum((0, 2), dtype=torch.float64).flatten()
    return ((1 - gate.float().tanh().square()) * total).to(gate.dtype)


def _branch(
    k: tuple | None, v: tuple | None, mask: Tensor | None, scale: float, bias: Tensor | None = None
) -> tuple | None:
    """Keys for the kernels, see gqa_attention_walk. v comes without its strides if they are those
    of k. A biased score has the scale in it."""
    if k is None:
        return None
    if v[1:] == k[1:]:
        v = v[:1]
    scales = _scales(scale, k[0].dtype == torch.float16, bias is not None)
    return k, v, _mask(mask), k[0].shape[1], scales


@lru_cache(maxsize=256)
def _scales(scale: float, half: bool, biased: bool) -> tuple[float, float, float, float]:
    inner, outer = split_scale(scale)
    before = 1.0 if half else inner  # the range of float16 is small, no sum overflows
    if biased:
        inner, outer = 1.0, LOG2E
    return scale, inner, outer, before


def split_scale(scale: float) -> tuple[float, float]:
    """log2(e) * scale as the product of a power of 2, with the sign and about half of the exponent,
    and a positive number. Neither a product nor the difference of two of opposite signs is then
    infinite where the scores are not: for that the power of 2 is half as large as it might be.
    What float32 rounds to -0 has no sign."""
    if not abs(scale) <= torch.finfo(torch.float32).max:
        return math.nan, math.nan
    # A scale of 0 makes all scores equal. So does a number this small, and it keeps -inf.
    size = max(abs(scale), 2.0**-149)
    inner = 2.0 ** ((math.frexp(size)[1] - 1) // 2 - 1)
    return -inner if _is_negative(scale) else inner, size / inner * LOG2E


def _is_negative(scale: float) -> bool:
    """As a float32, of which the least is 2^-149."""
    return scale < -(2.0**-150)


def _has_two_layouts(branch: tuple) -> bool:
    """Whether the strides of v are not those of k."""
    return len(branch[1]) > 1


def _mask(mask: Tensor | None) -> tuple | None:
    """(mask as int8, stride of b), the keys of a sample next to each other; or, where every token
    has a mask of its own, (mask, stride of b, of l, of the key)."""
    if mask is None:
        return None
    if mask.ndim == 3:
        if mask.stride(1) != 0:
            return mask.view(torch.int8), *mask.stride()
        mask = mask[:, 0]  # it is the same for all tokens
    if mask.stride(1) != 1:
        mask = mask.contiguous()
    # 16 divides 0: one sample is one variant of the kernel, whatever the number of keys.
    return mask.view(torch.int8), mask.stride(0) if mask.shape[0] > 1 else 0


def _bias(bias: Tensor | None, shape: tuple) -> tuple | None:
    """(bias, stride of b, of h, of l, of the key), or, if all queries share it, (bias, stride of b,
    of the key)."""
    if bias is None:
        return None
    stride_b, stride_h, stride_l, stride_key = bias.expand(shape).stride()
    if stride_h == stride_l == 0:
        return bias, stride_b, stride_key
    return bias, stride_b, stride_h, stride_l, stride_key


def _options(
    kind: str, K: int, dtype: torch.dtype, bias: bool, more: bool = False, text: bool = False
) -> dict:
    """Tile sizes and launch options of a kernel, "fwd", "dq" or "dkv": those that were
    measured, elsewhere such that no register is spilled. `more`: it takes more registers, for
    another reason than a bias or the text."""
    return options_on(current_arch(), kind, K, dtype, bias, more, text)


def _is_on_trial(q: Tensor) -> bool:
    """Whether q is on a GPU whose attention is tried before its first use; in aot none is."""
    return q.is_cuda and current_arch() // 10 == 10


def _launch(
    kind: str, kernel, count: int, arguments: tuple, options: dict, like: Tensor, L_kv: int,
    **constants,
) -> None:  # fmt: skip
    """Launch a kernel that has `count` rows, or keys, for each group of heads, with the table's
    options or, where there is a search, with what it found."""
    groups, side = like.shape[0] * arguments[-1], "BLOCK_N" if kind == "dkv" else "BLOCK_M"

    def run(options):
        programs = blocks(count, options[side]) * groups
        launch(kernel, programs, arguments, options, **constants)

    try:
        run(_searched(kind, options, run, like, L_kv) if AUTOTUNE else options)
    except OutOfResources as error:
        raise NotImplementedError(
            f"backend 'triton' has no tiles of gqa_attention for a head_dim of {like.shape[-1]} in "
            f"{like.dtype} on sm_{current_arch()}: {error.name} {error.required} of {error.limit}"
        ) from error


def _searched(kind: str, options: dict, run, like: Tensor, L_kv: int) -> dict:
    """The fastest of the table's configuration and its neighbours, for such sizes."""
    B, L, H, K = like.shape
    key = (kind, like.device, like.dtype, B * H, magnitude(L), magnitude(L_kv), *options.items())
    rows, keys = options["BLOCK_M"], options["BLOCK_N"]
    changes = [{"num_stages": stages} for stages in (1, 2, 3, 4)]
    changes += [change | {"num_warps": 4} for change in changes]
    changes += [{"BLOCK_N": max(16, keys // 2), "EDGE": 16}, {"BLOCK_N": 2 * keys}]
    changes += [{"BLOCK_M": max(16, rows // 2), "num_warps": 4}, {"BLOCK_M": 2 * rows}]
    if kind == "dkv":
        changes = [{k: v for k, v in change.items() if k != "EDGE"} for change in changes]
    return fastest(key, options, changes, run)
