"""Next-DiT as diffusers stores it: LuminaNextDiT2DModel, checked against diffusers 0.42.

Self- and text attention are two modules there, so the query and its norm are stored twice.
"""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path

from torch import nn

from lumina.checkpoints.files import (
    Stored,
    check_released,
    construct,
    read_json,
    read_safetensors,
    replace_folder,
    shown,
)
from lumina.checkpoints.state import expected_shapes, network_in, one_writer, plain_state
from lumina.models.next_dit.config import NextDiTConfig

CLASS = "LuminaNextDiT2DModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"

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


def open_diffusers(folder: Path, root: Path) -> Stored:
    """Open a folder of `config.json` and the weights, in one file or in shards with an index.

    root: the folder that was asked for: the pipeline's, or the same.
    """
    where = folder / "config.json"
    stored = read_json(where, root)
    if stored.get("_class_name") != CLASS:
        got = reprlib.repr(stored.get("_class_name"))
        raise ValueError(f"{where} must be of a {CLASS}, got {got}")
    fields = {ours: stored.get(name, default) for name, (ours, default) in CONFIG.items()}
    if fields["n_kv_heads"] is None:
        fields["n_kv_heads"] = fields["n_heads"]
    config = construct(where, NextDiTConfig, fields)
    _check(where, config)
    index = folder / f"{WEIGHTS}.index.json"
    if not index.exists():
        return Stored(folder / WEIGHTS, config, read_safetensors(folder / WEIGHTS)[0], names)
    places = read_json(index, root).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in places.values()
    ):
        raise ValueError(f"{index} must map tensors to files beside it, under 'weight_map'")
    tensors = {}
    for file in sorted(set(places.values())):
        shard, _ = read_safetensors(folder / file)
        for name, place in places.items():
            if place == file and name not in shard:
                raise ValueError(
                    f"{folder / file} must hold {shown(name)}, as {index.name} says, and does not"
                )
        tensors.update(shard)
    return Stored(index, config, tensors, names)


def save_diffusers(model: nn.Module, folder: Path) -> None:
    """Write a folder that `LuminaNextDiT2DModel.from_pretrained` reads."""
    network = network_in(model)
    _check("diffusers", network.config)
    config = {name: getattr(network.config, ours) for name, (ours, _) in CONFIG.items()}
    text = json.dumps({"_class_name": CLASS, **config}, indent=2) + "\n"
    with one_writer(model) as writes:
        plain, state = plain_state(model, network, expected_shapes(network.config), writes), {}
        for name, tensor in plain.items():
            first, *copies = names(name)
            state[first] = tensor
            state.update((copy, tensor.clone()) for copy in copies)  # no shared memory
        if writes:
            replace_folder(
                folder, WEIGHTS, state, "config.json", lambda file: file.write_text(text)
            )


def _check(where: Path | str, config: NextDiTConfig) -> None:
    # The norms of q and k have this epsilon in diffusers whatever norm_eps says.
    check_released(where, config, **({"norm_eps": 1e-5} if config.qk_norm else {}))
