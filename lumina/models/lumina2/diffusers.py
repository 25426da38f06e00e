"""Lumina-Image 2.0 as diffusers stores it: Lumina2Transformer2DModel, checked against 0.42."""

from __future__ import annotations

import re
from pathlib import Path

from lumina.checkpoints.files import Place, Places, check_released, split_qkv
from lumina.models.lumina2.config import Lumina2Config

CLASS = "Lumina2Transformer2DModel"

# Prefixes of names, relative to the block where there is one; others are the same in both.
NAMES = {
    "t_embedder.mlp.0.": "time_caption_embed.timestep_embedder.linear_1.",
    "t_embedder.mlp.2.": "time_caption_embed.timestep_embedder.linear_2.",
    "cap_embedder.": "time_caption_embed.caption_embedder.",
    "final_layer.adaLN_modulation.1.": "norm_out.linear_1.",
    "final_layer.linear.": "norm_out.linear_2.",
    "attention.out.": "attn.to_out.0.",
    "attention.qkv.": "attn.qkv.",
    "attention.q_norm.": "attn.norm_q.",
    "attention.k_norm.": "attn.norm_k.",
    "adaLN_modulation.1.": "norm1.linear.",
    "attention_norm1.": "norm1.norm.",
    "attention_norm2.": "norm2.",
    "feed_forward.w1.": "feed_forward.linear_1.",
    "feed_forward.w2.": "feed_forward.linear_2.",
    "feed_forward.w3.": "feed_forward.linear_3.",
}

# Field of config.json -> field of Lumina2Config, default of the class in diffusers.
CONFIG = {
    "patch_size": ("patch_size", 2),
    "in_channels": ("in_channels", 16),
    "hidden_size": ("dim", 2304),
    "num_layers": ("n_layers", 26),
    "num_refiner_layers": ("n_refiner_layers", 2),
    "num_attention_heads": ("n_heads", 24),
    "num_kv_heads": ("n_kv_heads", 8),
    "multiple_of": ("multiple_of", 256),
    "ffn_dim_multiplier": ("ffn_dim_multiplier", None),
    "norm_eps": ("norm_eps", 1e-5),
    "axes_dim_rope": ("axes_dims", (32, 32, 32)),
    "axes_lens": ("axes_lens", (300, 512, 512)),
    "cap_feat_dim": ("cap_feat_dim", 1024),
}


def places(config: Lumina2Config) -> Places:
    """Where diffusers stores a tensor."""
    heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)

    def place(name: str) -> tuple[Place, ...]:
        block, rest = re.fullmatch(r"((?:\w+_refiner|layers)\.\d+\.)?(.*)", name).groups("")
        if block.startswith("context_refiner") and rest.startswith("attention_norm1."):
            return (Place(f"{block}norm1.weight"),)  # a norm without modulation
        for ours, theirs in NAMES.items():
            if rest.startswith(ours):
                name = block + theirs + rest.removeprefix(ours)
                break
        if ".qkv." in name:
            return split_qkv(name, heads, config.head_dim, ("to_q", "to_k", "to_v"))
        return (Place(name),)

    return place


def config_from(stored: dict) -> dict:
    """The fields of a Lumina2Config out of those of config.json."""
    fields = {ours: stored.get(name, default) for name, (ours, default) in CONFIG.items()}
    if fields["n_kv_heads"] is None:
        fields["n_kv_heads"] = fields["n_heads"]
    out = stored.get("out_channels")
    if out is not None and out != fields["in_channels"]:
        raise ValueError(f"out_channels must be null or equal in_channels, got {out!r}")
    return fields


def config_to(config: Lumina2Config) -> dict:
    """The fields of config.json."""
    return {name: getattr(config, ours) for name, (ours, _) in CONFIG.items()}


def check(where: Path | str, config: Lumina2Config) -> None:
    """Refuse what diffusers would run as another network."""
    check_released(where, config)
