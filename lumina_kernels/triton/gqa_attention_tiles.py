"""Tile sizes and launch options of the Triton kernels of gqa_attention, by architecture."""

from functools import cache
from typing import NamedTuple

import torch

from lumina_kernels.measured import configuration
from lumina_kernels.ops.gqa_attention import MAX_HEAD_DIM


class Tiles(NamedTuple):
    """Sizes of a kernel's tiles and its launch options."""

    rows: int  # of queries
    keys: int
    warps: int
    stages: int
    edge: int = 0  # keys of a step where there is masking, in the kernels that walk over keys


def head_cuts(K: int) -> tuple[tuple[int, int], ...]:
    """(start, width) of the one or two blocks of a head: tensor cores take 16 columns at least, so
    72 = 64 + 8 is 64 + 16."""
    low = max(16, 1 << K.bit_length() - 1)
    high = max(16, 1 << (K - low - 1).bit_length()) if K > low else 0
    if high in (0, low):  # two products in a row would wait for each other
        return ((0, low + high),)
    return (0, low), (low, high)


@cache
def options_on(
    arch: int, kind: str, K: int, dtype: torch.dtype, bias: bool, more: bool, text: bool = False
) -> dict:
    if arch == 0:  # the interpreter: small tiles, so that small inputs have several
        tiles, scan = Tiles(rows=16, keys=32, warps=4, stages=1, edge=16), 2
    else:
        scan = 64
        if dtype == torch.float32:
            tiles = _float32_tiles(kind, K, arch, bias)
        elif arch // 10 in (9, 10):
            tiles = _group_tiles(kind, K, arch, bias, more)
        else:
            tiles = _warp_tiles(kind, K, arch, bias, more)
    options = {"K": K, "KS": head_cuts(K), "BLOCK_M": tiles.rows, "BLOCK_N": tiles.keys}
    if kind != "dkv":
        options |= {"EDGE": tiles.edge, "SCAN": scan}  # SCAN: tiles of keys to a word of bits
    options |= {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
    kernel = f"gqa_attention_{kind}" + " with bias" * (bias or more)
    options |= configuration(arch, kernel, head_class(K), dtype.itemsize)
    if kind == "fwd" and text and not (bias or more) and arch // 10 == 9 and 80 < K <= 96:
        # It was measured without text; with it, at 4 warps, products wait for each other.
        options["num_warps"] = 8
    # Without maxnreg ptxas spills a few registers to fit a second block on the processor.
    return options | {"maxnreg": 255}


def head_class(K: int) -> int:
    """Head_dims up to the same one share what was measured."""
    return next(most for most in (64, 96, 128, MAX_HEAD_DIM) if K <= most)


def _float32_tiles(kind: str, K: int, arch: int, bias: bool) -> Tiles:
    """Without tensor cores, which would cut products to tf32."""
    if K > 128:  # within the shared memory of the smallest GPUs, 99 KiB
        rows, warps = (32, 8) if kind == "fwd" else (16, 4)
        return Tiles(rows, 16, warps, stages=1, edge=16)
    if kind == "fwd":
        return Tiles(64 if arch >= 90 or K <= 64 else 32, 16, warps=8, stages=2, edge=16)
    if kind == "dq":
        return Tiles(16, 16 if bias else 32, warps=4, stages=2, edge=16)
    return Tiles(32, 16, warps=8, stages=1)


def _group_tiles(kind: str, K: int, arch: int, bias: bool, more: bool) -> Tiles:
    """Where products take 64 rows to 4 warps: tcgen05 (Blackwell), and wgmma (Hopper) beyond
    what was measured."""
    if kind == "fwd":
        small = arch >= 100 and (K > 96 or bias or more)
        return Tiles(128, 32 if small else 64, warps=8, stages=2, edge=32)
    if kind == "dq":
        small = bias or more or K > 128 or arch >= 100 and K > 96
        keys, edge = (32, 16) if small else (64, 32)
        return Tiles(128, keys, warps=8, stages=2, edge=edge)
    if K > 128 and arch >= 100:  # dk and dv of 128 keys do not fit into tensor memory
        return Tiles(32, 64, warps=4, stages=2)
    rows = 16 if K > 128 or bias and K > 80 else 32 if K > 80 or bias else 64
    return Tiles(rows, 128, warps=8, stages=2)


def _warp_tiles(kind: str, K: int, arch: int, bias: bool, more: bool) -> Tiles:
    """Where products take 16 rows to a warp: Ampere, Ada, consumer Blackwell."""
    if K > 128:  # within the shared memory of the smallest GPUs, 99 KiB
        return Tiles(32 if kind == "dkv" else 64, 16 if kind == "dq" else 32, 4, stages=1, edge=16)
    wide = K > 96
    if kind == "fwd":
        keys, edge = (32, 16) if wide or bias or more else (64, 32)
        return Tiles(128, keys, warps=8, stages=2, edge=edge)
    if kind == "dq":
        if arch < 90 and not bias:
            return Tiles(128, 32, warps=8, stages=2, edge=32)
        if K <= 80 or wide and bias:
            return Tiles(128, 32, warps=8, stages=1, edge=32)
        return Tiles(128, 32, warps=8, stages=2, edge=16)
    if wide:
        return Tiles(64, 64, warps=8, stages=2) if K == 128 else Tiles(32, 32, warps=4, stages=2)
    return Tiles(16, 64, warps=4, stages=1)
