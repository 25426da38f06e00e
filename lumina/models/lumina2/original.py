"""Lumina-Image 2.0 as the original release stores it.

Its `model_args.pth` names a preset (`NextDiT_2B_GQA_patch2_Adaln_Refiner`), but has no sizes: those
come from the shapes of the tensors. A head is rotated by three axes in equal parts, norm_eps is
1e-5 and rope_theta 10000 in that code.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from lumina.checkpoints.files import check_released, construct, ffn_rounding, patch_side
from lumina.models.lumina2.config import Lumina2Config
from lumina.models.parts.joint_shapes import joint_sizes

MARK = "noise_refiner.0.attention.qkv.weight"  # no other network of a release has it
UNUSED = "norm_final.weight"  # of a norm that the code makes and never calls


def used(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without those of a layer that is never called."""
    return {name: tensor for name, tensor in tensors.items() if name != UNUSED}


def unused(config: Lumina2Config) -> dict[str, Tensor]:
    """What the released code wants to load besides."""
    return {UNUSED: torch.ones(config.dim)}


def config_from_shapes(where: Path, tensors: dict[str, Tensor], preset: str = "") -> Lumina2Config:
    """The config that these tensors imply; the preset's name gives the patch size."""
    sizes = joint_sizes(where, tensors, patch_side(preset))
    hidden, dim, axis = sizes.pop("ffn_dim"), sizes["dim"], sizes["dim"] // sizes["n_heads"] // 3
    multiple_of, multiplier = ffn_rounding(4 * dim, hidden)
    fields = dict(axes_dims=(axis,) * 3, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
    return construct(where, Lumina2Config, {**sizes, **fields})


def model_args(config: Lumina2Config) -> Namespace:
    """What the released scripts read of it; vae and image_size are the released model's."""
    presets = {2304: "2B", 2592: "3B", 2880: "4B", 3840: "7B"}
    return Namespace(
        model=f"NextDiT_{presets.get(config.dim, '2B')}_GQA_patch{config.patch_size}_Adaln_Refiner",
        qk_norm=True, model_parallel_size=1, vae="flux", image_size=1024,
    )  # fmt: skip


def check(config: Lumina2Config) -> None:
    """Refuse what the original code would run as another network."""
    axes = (config.head_dim // 3,) * 3
    check_released("original", config, norm_eps=1e-5, axes_dims=axes)
