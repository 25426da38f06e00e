"""Next-DiT as the original release stores it.

Its `model_args.pth` names a preset (`NextDiT_2B_GQA_patch2`) and says qk_norm, but has no sizes:
those come from the shapes of the tensors. norm_eps is 1e-5 and rope_theta 10000 in that code.
Tensor parallelism (fairscale) leaves several files, which are merged.
"""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lumina.checkpoints.files import (
    check_alternating,
    check_released,
    construct,
    ffn_rounding,
    length_of,
    patch_side,
    same,
    shape_of,
    shown,
)
from lumina.models.next_dit.config import NextDiTConfig

# Linear layers cut by output rows, and the heads that follow them; by input columns; the rest is
# whole in every file.
CUT_ROWS = re.compile(
    r"(x_embedder|mlp\.0|cap_embedder\.1|adaLN_modulation\.1|final_layer\.linear|\.w[qkv]|\.w[kv]_y"
    r"|\.w[13]|\.(q|k|ky)_norm)\.(weight|bias)$|attention\.gate$"
)
CUT_COLUMNS = re.compile(r"(\.wo|\.w2|mlp\.2)\.weight$")


def check(config: NextDiTConfig) -> None:
    """Refuse what the original code would run as another network."""
    check_released("original", config, norm_eps=1e-5)
    check_alternating("original", config)


def model_args(config: NextDiTConfig) -> Namespace:
    """What the released scripts read of it; vae and image_size are the released model's."""
    sizes = (config.dim, config.n_layers, config.n_heads, config.ffn_dim)
    released = sizes == (2304, 24, 32, 6144)
    preset = {32: "2B_", 8: "2B_GQA_"}.get(config.n_kv_heads, "") if released else ""
    return Namespace(
        model=f"NextDiT_{preset}patch{config.patch_size}", qk_norm=config.qk_norm,
        model_parallel_size=1, vae="sdxl", image_size=1024,
    )  # fmt: skip


def merge(files: list[Path], shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all ranks."""
    for file, shard in zip(files, shards, strict=True):
        if odd := sorted(shard.keys() ^ shards[0].keys()):
            raise ValueError(f"{files[0]} and {file.name}: only one of them has {shown(odd[0])}")
    if "layers.0.attention.q_norm.weight" in shards[0]:
        warnings.warn(
            f"{files[0].parent}: the original code normalises q and k over the heads of one shard, "
            "the merged network over all heads; if it was trained in shards, outputs will differ",
            stacklevel=5,
        )
    merged = {}
    for name in shards[0]:
        parts = [shard[name] for shard in shards]
        shapes = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in parts)
        axis = 0 if CUT_ROWS.search(name) else 1 if CUT_COLUMNS.search(name) else None
        if axis is None:
            for file, part in zip(files, parts, strict=True):
                if not same(part, parts[0]):
                    raise ValueError(f"{name} must be the same in {files[0]} and {file.name}")
            merged[name] = parts[0]
        elif parts[0].ndim <= axis or len({(part.shape, part.dtype) for part in parts}) > 1:
            raise ValueError(
                f"{files[0]}: shards of {name} must have one shape and dtype, got {shapes}"
            )
        else:
            merged[name] = torch.cat(parts, dim=axis)
    return merged


def config_from_shapes(where: Path, tensors: dict[str, Tensor], preset: str) -> NextDiTConfig:
    """The config that these tensors imply; the preset's name gives the patch size."""
    shape = partial(shape_of, where, tensors)
    dim, patch = shape("x_embedder.weight", 2)
    (heads,) = shape("layers.0.attention.gate", 1)
    kv, _ = shape("layers.0.attention.wk.weight", 2)
    hidden, _ = shape("layers.0.feed_forward.w1.weight", 2)
    out, _ = shape("final_layer.linear.weight", 2)
    side = patch_side(preset)
    if patch % side**2 or out not in (patch, 2 * patch) or kv * heads % dim:
        raise ValueError(
            f"{where} is no Next-DiT with {side}x{side} patches: x_embedder.weight is "
            f"{dim, patch}, final_layer.linear.weight {out, dim}, wk.weight {kv, dim}, "
            f"{heads} heads"
        )
    multiple_of, multiplier = ffn_rounding(int(8 * dim / 3), hidden)
    fields = dict(
        patch_size=side, in_channels=patch // side**2, dim=dim,
        n_layers=length_of("layers", tensors), n_heads=heads, n_kv_heads=kv * heads // dim,
        multiple_of=multiple_of, ffn_dim_multiplier=multiplier, learn_sigma=out != patch,
        qk_norm="layers.0.attention.q_norm.weight" in tensors,
        cap_feat_dim=shape("cap_embedder.0.weight", 1)[0],
    )  # fmt: skip
    return construct(where, NextDiTConfig, fields)
