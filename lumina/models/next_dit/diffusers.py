"""Next-DiT as diffusers stores it: LuminaNextDiT2DModel, checked against diffusers 0.42.

Self- and text attention are two modules there, so the query and its norm are stored twice.
"""

from __future__ import annotations

import re
from pathlib import Path

from lumina.checkpoints.files import Place, Places, check_alternating, check_released
from lumina.models.next_dit.config import NextDiTConfig

CLASS = "LuminaNextDiT2DModel"

# Prefixes of names, relative to the layer where there is one; others are the same in both.
NAMES = {
    "x_embedder.": ("patch_embedder.proj.",),
    "t_embedder.mlp.0.": ("time_caption_embed.timestep_embedder.linear_1.",),
    "t_embedder.mlp.2.": ("time_caption_embed.timestep_embedder.linear_2.",),
    "cap_embedder.": ("time_caption_embed.caption_embedder.",),
    "final_layer.adaLN_modulation.1.": ("norm_out.linear_1.",),
    "final_layer.linear.": ("norm_out.linear_2.",),
    "attention.gate": ("gate",),
    "attention.wq.": ("attn1.to_q.", "attn2.to_q."),
    "attention.wk.": ("attn1.to_k.",),
    "attention.wv.": ("attn1.to_v.",),
    "attention.wk_y.": ("attn2.to_k.",),
    "attention.wv_y.": ("attn2.to_v.",),
    "attention.wo.": ("attn2.to_out.0.",),
    "attention.q_norm.": ("attn1.norm_q.", "attn2.norm_q."),
    "attention.k_norm.": ("attn1.norm_k.",),
    "attention.ky_norm.": ("attn2.norm_k.",),
    "adaLN_modulation.1.": ("norm1.linear.",),
    "attention_norm1.": ("norm1.norm.",),
    "attention_norm2.": ("norm2.",),
    "attention_y_norm.": ("norm1_context.",),
    "feed_forward.w1.": ("feed_forward.linear_1.",),
    "feed_forward.w2.": ("feed_forward.linear_2.",),
    "feed_forward.w3.": ("feed_forward.linear_3.",),
}

# Field of config.json -> field of NextDiTConfig, default of the class in diffusers.
CONFIG = {
    "patch_size": ("patch_size", 2),
    "in_channels": ("in_channels", 4),
    "hidden_size": ("dim", 2304),
    "num_layers": ("n_layers", 32),
    "num_attention_heads": ("n_heads", 32),
    "num_kv_heads": ("n_kv_heads", None),
    "multiple_of": ("multiple_of", 256),
    "ffn_dim_multiplier": ("ffn_dim_multiplier", None),
    "norm_eps": ("norm_eps", 1e-5),
    "learn_sigma": ("learn_sigma", True),
    "qk_norm": ("qk_norm", True),
    "cross_attention_dim": ("cap_feat_dim", 2048),
}


def names(name: str) -> tuple[str, ...]:
    """The names in diffusers of a tensor of the original release: one, or two for the query's."""
    layer, rest = re.fullmatch(r"(layers\.\d+\.)?(.*)", name).groups(default="")
    for ours, theirs in NAMES.items():
        if rest.startswith(ours):
            return tuple(layer + there + rest.removeprefix(ours) for there in theirs)
    return (name,)


def places(config: NextDiTConfig) -> Places:
    """Where diffusers stores a tensor."""
    return lambda name: tuple(map(Place, names(name)))


def config_from(stored: dict) -> dict:
    """The fields of a NextDiTConfig out of those of config.json."""
    fields = {ours: stored.get(name, default) for name, (ours, default) in CONFIG.items()}
    if fields["n_kv_heads"] is None:
        fields["n_kv_heads"] = fields["n_heads"]
    return fields


def config_to(config: NextDiTConfig) -> dict:
    """The fields of config.json."""
    return {name: getattr(config, ours) for name, (ours, _) in CONFIG.items()}


def check(where: Path | str, config: NextDiTConfig) -> None:
    """Refuse what diffusers would run as another network."""
    # The norms of q and k have this epsilon in diffusers whatever norm_eps says.
    check_released(where, config, **({"norm_eps": 1e-5} if config.qk_norm else {}))
    check_alternating(where, config)
