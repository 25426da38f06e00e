"""Triton launchers of gqa_attention and their table of configurations.

Keys and values come by pointers. On sm_90 tensor descriptors (TMA) would make the inner loop 570
instead of 556 instructions for 128 keys of 72, in 170 instead of 213 registers, which is one block
a processor all the same; warp_specialize does not compile there with 4 warps, and does nothing
with 8 (triton 3.9).
"""

import math
from functools import cache

import torch
from torch import Tensor
from triton.runtime import driver

from lumina_kernels.backend import INTERPRETED
from lumina_kernels.triton._tiles import blocks
from lumina_kernels.triton._tune import AUTOTUNE, fastest, magnitude
from lumina_kernels.triton.gqa_attention_bwd import (
    gqa_attention_dkv_kernel,
    gqa_attention_dq_kernel,
)
from lumina_kernels.triton.gqa_attention_fwd import gqa_attention_fwd_kernel

LOG2E = math.log2(math.e)


def gqa_attention_fwd(
    q, k, v, key_mask, scale, text_k, text_v, text_mask, text_gate, bias, with_error
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (B, L, H, K); its rounding error, int8; per row, log2 of the sum of exponentials of both
    branches, (B, G, L, R) float32. Empty: the error unless wanted and out has 16 bits; the second
    branch without text."""
    B, L, H, K = q.shape
    G = k.shape[2]
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, G, L, H // G), dtype=torch.float32)
    text_lse = lse.new_empty(0 if text_k is None else lse.shape)
    with_error = with_error and q.itemsize == 2
    error = q.new_empty(q.shape if with_error else 0, dtype=torch.int8)
    if out.numel() == 0:
        return out, error, lse, text_lse
    (q, k, v, text_k, text_v), align = _heads(q, k, v, text_k, text_v)
    config = _config("fwd", K, q[0].dtype, bias is not None, k[1:] != v[1:])
    L_kv = k[0].shape[1]

    def launch(config):
        grid = (blocks(L * H // G, config["BLOCK_M"]) * G * B,)
        gqa_attention_fwd_kernel[grid](
            q, k, _values(k, v), _mask(key_mask),
            text_k, _values(text_k, text_v), _mask(text_mask), text_gate,
            _bias(bias, (B, H, L, L_kv)), out, error if with_error else None, lse, text_lse,
            L, L_kv, 0 if text_k is None else text_k[0].shape[1], G,
            scale * LOG2E, K**-0.5 * LOG2E,
            R=H // G, ALIGN=align, POSITIVE=scale >= 0, **config,
        )  # fmt: skip

    launch(_searched("fwd", config, launch, out, L_kv) if AUTOTUNE else config)
    return out, error, lse, text_lse


def gqa_attention_bwd(
    dout, out, error, lse, text_lse, q, k, v, key_mask, scale, text_k, text_v, text_mask,
    text_gate, bias, with_dbias,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dv, dtext_k, dtext_v, dtext_gate, dbias; empty where there is nothing of the kind.

    Float32 work: one number per row and branch, and for the bias its gradient before it is summed
    over broadcast axes, (B, H, L, L_kv).
    """
    B, L, H, K = q.shape
    G, L_kv = k.shape[2], k.shape[1]
    T = 0 if text_k is None else text_k.shape[1]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dtext_k, dtext_v = (q.new_empty(0 if x is None else x.shape) for x in (text_k, text_v))
    delta, text_delta = (torch.empty_like(x) for x in (lse, text_lse))
    dbias = None
    if with_dbias:
        whole = bias.shape == (B, H, L, L_kv)
        dbias = bias.new_zeros((B, H, L, L_kv), dtype=bias.dtype if whole else torch.float32)
    if dq.numel() == 0:
        for grad in (dk, dv, dtext_k, dtext_v, text_delta):
            grad.zero_()
    else:
        (dout, q, k, v, text_k, text_v), align = _heads(dout, q, k, v, text_k, text_v)
        key_mask, text_mask = _mask(key_mask), _mask(text_mask)
        steps = _bias(bias, (B, H, L, L_kv))
        given = (
            dout, q, k, _values(k, v), key_mask,
            text_k, _values(text_k, text_v), text_mask, text_gate, steps,
        )  # fmt: skip
        sizes = (L, L_kv, T, G, scale, K**-0.5)
        config = _config("dq", K, q[0].dtype, bias is not None, k[1:] != v[1:])

        def launch_dq(config):
            grid = (blocks(L * H // G, config["BLOCK_M"]) * G * B,)
            gqa_attention_dq_kernel[grid](
                *given, out, error if error.numel() else None, lse, text_lse,
                dq, delta, text_delta, dbias, *sizes, R=H // G, ALIGN=align, **config,
            )  # fmt: skip

        launch_dq(_searched("dq", config, launch_dq, dq, L_kv) if AUTOTUNE else config)
        config = _config("dkv", K, q[0].dtype, bias is not None, T == 0)

        def launch_dkv(config):
            tiles = blocks(L_kv, config["BLOCK_N"]) + blocks(T, config["BLOCK_N"])
            gqa_attention_dkv_kernel[(tiles * G * B,)](
                *given, lse, text_lse, delta, text_delta, dk, dv, dtext_k, dtext_v, *sizes,
                R=H // G, ALIGN=align, **config,
            )  # fmt: skip

        if L_kv + T > 0:
            launch_dkv(_searched("dkv", config, launch_dkv, dq, L_kv) if AUTOTUNE else config)
    dgate = dq.new_empty(0) if text_gate is None else _dgate(text_gate, text_delta)
    dbias = dq.new_empty(0) if dbias is None else dbias.sum_to_size(bias.shape).to(bias.dtype)
    return dq, dk, dv, dtext_k, dtext_v, dgate, dbias


def _dgate(gate: Tensor, text_delta: Tensor) -> Tensor:
    """(1 - tanh²) times the sum over all rows of dout . (P v), text_delta (B, G, L, R)."""
    total = text_delta.sum((0, 2)).flatten()
    return ((1 - gate.float().tanh().square()) * total).to(gate.dtype)


def _heads(*tensors: Tensor | None) -> tuple[list, int]:
    """(tensor, steps in b, l, h divided by ALIGN) for each, and ALIGN, up to 16 bytes.

    Steps so long that the offsets within a tile would pass 2^31 are done away with by a copy."""
    found, align = [], 16 // tensors[0].itemsize
    for x in tensors:
        if x is None:
            found.append(None)
            continue
        B, L, H, _ = x.shape
        step_b, step_l, step_h, step_k = x.stride()
        if step_k != 1 or step_l >= 2**24 or H * step_h >= 2**31:
            x = x.contiguous()
            step_b, step_l, step_h, _ = x.stride()
        # The step along an axis of one element is never taken, whatever it says.
        step_b, step_l, step_h = step_b * (B > 1), step_l * (L > 1), step_h * (H > 1)
        align = math.gcd(align, step_b, step_l, step_h)
        found.append((x, step_b, step_l, step_h))
    return [x and (x[0], x[1] // align, x[2] // align, x[3] // align) for x in found], align


def _values(k: tuple | None, v: tuple | None) -> tuple | None:
    """v, without its steps if they are those of k."""
    return (v[0], None, None, None) if v is not None and v[1:] == k[1:] else v


def _mask(mask: Tensor | None) -> tuple | None:
    if mask is None:
        return None
    if mask.stride(1) != 1:
        mask = mask.contiguous()
    return mask.view(torch.int8), mask.stride(0)


def _bias(bias: Tensor | None, shape: tuple) -> tuple | None:
    if bias is None:
        return None
    return bias, *bias.expand(shape).stride()


def head_parts(K: int) -> tuple[int, int]:
    """72 = 64 + 8 gives (64, 16), since tensor cores take 16 columns at least."""
    low = max(16, 1 << K.bit_length() - 1)
    rest = K - low
    return low, 0 if rest <= 0 else max(16, 1 << (rest - 1).bit_length())


def _config(kind: str, K: int, dtype: torch.dtype, bias: bool, more: bool) -> dict:
    """Tile sizes and launch options of a kernel, "fwd", "dq" or "dkv": what compiles without a
    spilled register. BLOCK_M query rows, BLOCK_N keys; EDGE keys where there is masking; SCAN tiles
    of BLOCK_N keys to a word of bits. `more`: takes more registers, for another reason than a bias.
    """
    arch = 0 if INTERPRETED else driver.active.get_current_target().arch
    return _config_on(arch, kind, K, dtype, bias, more)


@cache
def _config_on(arch: int, kind: str, K: int, dtype: torch.dtype, bias: bool, more: bool) -> dict:
    LO, HI = head_parts(K)
    config = {"K": K, "LO": LO, "HI": HI, "enable_fp_fusion": True}
    if arch == 0:
        tiles = {"BLOCK_M": 16, "BLOCK_N": 32, "EDGE": 16, "SCAN": 2}
    else:
        if dtype == torch.float32:
            M, N, EDGE, warps, stages = _float32_blocks(kind, K, arch, bias)
        elif arch // 10 in (9, 10):
            M, N, EDGE, warps, stages = _group_blocks(kind, K, arch, bias, more)
        else:
            M, N, EDGE, warps, stages = _warp_blocks(kind, K, arch, bias, more)
        # Without maxnreg ptxas spills a few registers to fit a second block on the processor.
        tiles = {"BLOCK_M": M, "BLOCK_N": N, "EDGE": EDGE, "SCAN": 64}
        tiles |= {"num_warps": warps, "num_stages": stages, "maxnreg": 255}
    if kind == "dkv":
        del tiles["EDGE"], tiles["SCAN"]
    return config | tiles


def _searched(kind: str, config: dict, launch, like: Tensor, L_kv: int) -> dict:
    """The fastest of the table's configuration and its neighbours, for such sizes."""
    B, L, H, K = like.shape
    key = (kind, like.device, like.dtype, B * H, magnitude(L), magnitude(L_kv), *config.items())
    rows, keys = config["BLOCK_M"], config["BLOCK_N"]
    changes = [{"num_stages": stages} for stages in (1, 2, 3, 4)]
    changes += [change | {"num_warps": 4} for change in changes]
    changes += [{"BLOCK_N": max(16, keys // 2), "EDGE": 16}, {"BLOCK_N": 2 * keys}]
    changes += [{"BLOCK_M": max(16, rows // 2), "num_warps": 4}, {"BLOCK_M": 2 * rows}]
    if kind == "dkv":
        changes = [{k: v for k, v in change.items() if k != "EDGE"} for change in changes]
    return fastest(key, config, changes, launch)


def _float32_blocks(kind: str, K: int, arch: int, bias: bool) -> tuple[int, ...]:
    """BLOCK_M, BLOCK_N, EDGE, num_warps, num_stages without tensor cores, which would cut products
    to tf32."""
    if kind == "fwd":
        return (64 if arch >= 90 or K <= 64 else 32), 16, 16, 8, 2
    if kind == "dq":
        return 16, 16 if bias else 32, 16, 4, 2
    return 32, 16, 0, 8, 1


def _group_blocks(kind: str, K: int, arch: int, bias: bool, more: bool) -> tuple[int, ...]:
    """The same where products take 64 rows to 4 warps: wgmma (Hopper), tcgen05 (Blackwell)."""
    wide = K > 96 or bias or more
    if kind == "fwd" and arch < 100:
        return 128, 64 if wide else 128, 32, 8, 2
    if kind == "fwd":
        return 128, 32 if wide else 64, 32, 8, 2
    if kind == "dq":
        small = bias or more or arch >= 100 and K > 96
        return (128, 32, 16, 8, 2) if small else (128, 64, 32, 8, 2)
    rows = 16 if bias and K > 80 else 32 if K > 96 or bias or more and K > 80 else 64
    return rows, 128, 0, 8, 2


def _warp_blocks(kind: str, K: int, arch: int, bias: bool, more: bool) -> tuple[int, ...]:
    """The same where products take 16 rows to a warp: Ampere, Ada, consumer Blackwell."""
    wide = K > 96
    if kind == "fwd":
        return (128, 32, 16, 8, 2) if wide or bias or more else (128, 64, 32, 8, 2)
    if kind == "dq":
        if arch < 90 and not bias:
            return 128, 32, 32, 8, 2
        return (128, 32, 32, 8, 1) if K <= 80 or wide and bias else (128, 32, 16, 8, 2)
    if wide:
        return (64, 64, 0, 8, 2) if K == 128 else (32, 32, 0, 4, 2)
    if bias or more:
        return 16, 64, 0, 4, 1
    if arch < 90:
        return 32, 64, 0, 4, 2
    return (32, 64, 0, 4, 1) if K <= 80 else (16, 64, 0, 4, 1)


def aot_calls(head_dim: int, dtype: torch.dtype):
    """Calls of the launchers at the model's shapes: 32 query heads, 8 of keys and values, text."""
    B, L, T, H, G = 2, 256, 64, 32, 8
    q, out = (torch.zeros(B, L, H, head_dim, dtype=dtype) for _ in range(2))
    k, v = (torch.zeros(B, L, G, head_dim, dtype=dtype) for _ in range(2))
    text_k, text_v = (torch.zeros(B, T, G, head_dim, dtype=dtype) for _ in range(2))
    masks = [torch.ones(B, n, dtype=torch.bool) for n in (L, T)]
    gate, bias = torch.zeros(H, dtype=dtype), torch.zeros(B, 1, 1, L)
    error = torch.zeros(q.shape if dtype.itemsize == 2 else 0, dtype=torch.int8)
    lse = torch.zeros(B, G, L, H // G)
    model = (q, k, v, masks[0], 0.1, text_k, text_v, masks[1], gate, None)
    plain = (q, k, v, None, 0.1, None, None, None, None, None)
    biased = (q, k, v, None, 0.1, None, None, None, None, bias)
    yield "fwd", lambda: gqa_attention_fwd(*model, False)
    yield "fwd_training", lambda: gqa_attention_fwd(*model, True)
    yield "fwd_plain", lambda: gqa_attention_fwd(*plain, False)
    yield "fwd_bias", lambda: gqa_attention_fwd(*biased, False)
    yield "bwd", lambda: gqa_attention_bwd(out, out, error, lse, lse, *model, False)
    yield "bwd_bias", lambda: gqa_attention_bwd(out, out, error, lse, lse[:0], *biased, True)
