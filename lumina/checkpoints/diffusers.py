"""Folders of diffusers: `config.json` and the weights, in one file or in shards with an index."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path

from torch import nn

from lumina.checkpoints.files import (
    Stored,
    construct,
    read_json,
    read_safetensors,
    replace_folder,
    shown,
    spread,
)
from lumina.checkpoints.state import expected_shapes, network_in, one_writer, plain_state
from lumina.models.families import FAMILIES, name_of
from lumina.models.lumina2 import diffusers as lumina2
from lumina.models.next_dit import diffusers as next_dit
from lumina.models.z_image import diffusers as z_image

WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMATS = {"next_dit": next_dit, "lumina2": lumina2, "z_image": z_image}


def open_diffusers(folder: Path, root: Path) -> Stored:
    """Open the folder of a network.

    root: the folder that was asked for: the pipeline's, or the same.
    """
    where = folder / "config.json"
    stored = read_json(where, root)
    families = {form.CLASS: name for name, form in FORMATS.items()}
    family = families.get(stored.get("_class_name")) if _is_name(stored) else None
    if family is None:
        got = reprlib.repr(stored.get("_class_name"))
        raise ValueError(f"{where} must be of a {' or '.join(families)}, got {got}")
    form = FORMATS[family]
    config = construct(
        where, FAMILIES[family].config, construct(where, form.config_from, {"stored": stored})
    )
    form.check(where, config)
    places = form.places(config)
    index = folder / f"{WEIGHTS}.index.json"
    if not index.exists():
        return Stored(folder / WEIGHTS, config, read_safetensors(folder / WEIGHTS)[0], places)
    files = read_json(index, root).get("weight_map")
    if not isinstance(files, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in files.values()
    ):
        raise ValueError(f"{index} must map tensors to files beside it, under 'weight_map'")
    tensors = {}
    for file in sorted(set(files.values())):
        shard, _ = read_safetensors(folder / file)
        for name, place in files.items():
            if place == file and name not in shard:
                raise ValueError(
                    f"{folder / file} must hold {shown(name)}, as {index.name} says, and does not"
                )
        tensors.update(shard)
    return Stored(index, config, tensors, places)


def save_diffusers(model: nn.Module, folder: Path) -> None:
    """Write a folder that `from_pretrained` of the network's class in diffusers reads."""
    network = network_in(model)
    config = network.config
    form = FORMATS[name_of(config)]
    form.check("diffusers", config)
    text = json.dumps({"_class_name": form.CLASS, **form.config_to(config)}, indent=2) + "\n"
    with one_writer(model) as writes:
        state = plain_state(model, network, expected_shapes(config), writes)
        if writes:
            replace_folder(
                folder, WEIGHTS, spread(state, form.places(config)),
                "config.json", lambda file: file.write_text(text),
            )  # fmt: skip


def _is_name(stored: dict) -> bool:
    return isinstance(stored.get("_class_name"), str)
