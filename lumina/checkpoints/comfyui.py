"""Files of ComfyUI: the tensors of a joint network under the names of Lumina-Image 2.0.

There is no config; the sizes come from the shapes. A file may hold a text encoder and a VAE as
well, the network's names then begin with `model.diffusion_model.`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lumina.checkpoints.files import Stored, construct
from lumina.checkpoints.state import expected_shapes, network_in, one_writer, plain_state
from lumina.models.families import FAMILIES, Config, name_of
from lumina.models.lumina2 import original as lumina2
from lumina.models.parts.joint_shapes import joint_sizes
from lumina.models.z_image.config import ZImageConfig
from lumina_kernels.output import replace

PREFIX = "model.diffusion_model."


def open_comfyui(path: Path, tensors: dict[str, Tensor]) -> Stored:
    """Open a file of these tensors."""
    inside = {n.removeprefix(PREFIX): z for n, z in tensors.items() if n.startswith(PREFIX)}
    tensors = lumina2.used(inside or tensors)
    if lumina2.MARK not in tensors:
        raise ValueError(
            f"{path} has neither a config in its metadata nor the names of a Lumina-Image 2.0 or "
            "a Z-Image in ComfyUI; of a checkpoint of diffusers or of the original release, give "
            "the folder"
        )
    if "cap_pad_token" not in tensors:
        return Stored(path, lumina2.config_from_shapes(path, tensors), tensors)
    sizes = joint_sizes(path, tensors)
    del sizes["ffn_dim"]  # follows from the width
    K = sizes["dim"] // sizes["n_heads"]
    axes = {"axes_dims": (K // 4, K // 8 * 3, K // 8 * 3)}
    return Stored(path, construct(path, ZImageConfig, {**sizes, **axes}), tensors)


def save_comfyui(model: nn.Module, path: Path) -> None:
    """Write a file that ComfyUI reads."""
    network = network_in(model)
    config = network.config
    if name_of(config) == "next_dit":
        raise ValueError("format 'comfyui' is for Lumina2 and ZImage, ComfyUI has no NextDiT")
    _check(path, config)
    with one_writer(model) as writes:
        state = plain_state(model, network, expected_shapes(config), writes)
        if writes:
            named = {PREFIX + name: tensor for name, tensor in state.items()}
            replace(path, lambda file: save_file(named, file, {"format": "pt"}))


def _check(path: Path, config: Config) -> None:
    """Refuse a config that is not what a reader takes the shapes for."""
    with torch.device("meta"):
        tensors = FAMILIES[name_of(config)].network(config).state_dict()
    read = asdict(open_comfyui(path, tensors).config)
    for name, value in asdict(config).items():
        # The first two say the width of the FFN, which the shapes say too; the last one nothing.
        if name in ("multiple_of", "ffn_dim_multiplier", "axes_lens"):
            continue
        if value != read[name]:
            raise ValueError(
                f"comfyui: {name} can only be {read[name]} in this format, got {value}"
            )
