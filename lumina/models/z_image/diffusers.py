"""Z-Image as its authors and diffusers store it: ZImageTransformer2DModel, checked against 0.42."""

from __future__ import annotations

from pathlib import Path

from lumina.checkpoints.files import Place, Places, check_released, split_qkv
from lumina.models.z_image.config import ZImageConfig

CLASS = "ZImageTransformer2DModel"

# Parts of names; others are the same in both. There is an embedder for every size of a patch.
NAMES = {
    "attention.out.": "attention.to_out.0.",
    "attention.q_norm.": "attention.norm_q.",
    "attention.k_norm.": "attention.norm_k.",
}

# Field of config.json -> field of ZImageConfig, default of the class in diffusers.
CONFIG = {
    "in_channels": ("in_channels", 16),
    "dim": ("dim", 3840),
    "n_layers": ("n_layers", 30),
    "n_refiner_layers": ("n_refiner_layers", 2),
    "n_heads": ("n_heads", 30),
    "n_kv_heads": ("n_kv_heads", 30),
    "norm_eps": ("norm_eps", 1e-5),
    "cap_feat_dim": ("cap_feat_dim", 2560),
    "rope_theta": ("rope_theta", 256.0),
    "t_scale": ("t_scale", 1000.0),
    "axes_dims": ("axes_dims", (32, 48, 48)),
    "axes_lens": ("axes_lens", (1024, 512, 512)),
}
FIXED = {"all_f_patch_size": [1], "qk_norm": True, "siglip_feat_dim": None}


def places(config: ZImageConfig) -> Places:
    """Where diffusers stores a tensor."""
    heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)

    def place(name: str) -> tuple[Place, ...]:
        for layer in ("x_embedder.", "final_layer."):
            if name.startswith(layer):
                size = f"all_{layer}{config.patch_size}-1."
                return (Place(size + name.removeprefix(layer)),)
        if ".qkv." in name:
            return split_qkv(name, heads, config.head_dim, ("to_q", "to_k", "to_v"))
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        return (Place(name),)

    return place


def config_from(stored: dict) -> dict:
    """The fields of a ZImageConfig out of those of config.json."""
    for name, value in FIXED.items():
        got = stored.get(name, value)
        if got != value:
            raise ValueError(f"{name} can only be {value} in a ZImage, got {got!r}")
    sides = stored.get("all_patch_size", [2])
    if not isinstance(sides, list) or len(sides) != 1:
        raise ValueError(f"all_patch_size must be a list of one size, got {sides!r}")
    fields = {ours: stored.get(name, default) for name, (ours, default) in CONFIG.items()}
    return {"patch_size": sides[0], **fields}


def config_to(config: ZImageConfig) -> dict:
    """The fields of config.json."""
    sizes = {name: getattr(config, ours) for name, (ours, _) in CONFIG.items()}
    return {"all_patch_size": [config.patch_size], **FIXED, **sizes}


def check(where: Path | str, config: ZImageConfig) -> None:
    """Refuse what diffusers would run as another network."""
    # Its attention has as many key heads as query heads, whatever the config says.
    check_released(where, config, rope_theta=config.rope_theta, n_kv_heads=config.n_heads)
