"""Folders of the original releases: `model_args.pth` and `consolidated.00-of-0N`.

`model_args.pth` is a pickled `argparse.Namespace`.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

from lumina.checkpoints.diffusers import save_diffusers
from lumina.checkpoints.files import (
    Stored,
    read_pickle,
    read_pth,
    read_safetensors,
    replace_folder,
    shown,
    weights_in,
)
from lumina.checkpoints.state import expected_shapes, network_in, one_writer, plain_state
from lumina.models.families import name_of
from lumina.models.lumina2 import original as lumina2
from lumina.models.next_dit import original as next_dit

FILE = re.compile(r"(consolidated(?:_ema)?)\.([0-9]+)-of-(0*[1-9][0-9]*)(\.safetensors|\.pth)")


def open_original(folder: Path, ema: bool | None) -> Stored:
    """Open a folder of a release; `ema` as for `lumina.load`."""
    args_file = folder / "model_args.pth"
    args = read_pickle(args_file, allowed=Namespace)
    if not isinstance(args, Namespace):
        raise ValueError(f"{args_file} must hold a Namespace, got {type(args).__name__}")
    files = _files(folder, ema)
    shards = [
        read_pth(file) if file.suffix == ".pth" else read_safetensors(file)[0] for file in files
    ]
    preset = _preset(args_file, args)
    if lumina2.MARK in shards[0]:
        if len(files) > 1:
            raise ValueError(f"{files[0]}: a Lumina-Image 2.0 in {len(files)} shards is unknown")
        tensors = lumina2.used(shards[0])
        return Stored(files[0], lumina2.config_from_shapes(files[0], tensors, preset), tensors)
    tensors = shards[0] if len(shards) == 1 else next_dit.merge(files, shards)
    config = next_dit.config_from_shapes(files[0], tensors, preset)
    if getattr(args, "qk_norm", config.qk_norm) is not config.qk_norm:
        raise ValueError(
            f"{args_file} says qk_norm={shown(args.qk_norm)}, the tensors of {files[0].name} "
            f"say {config.qk_norm}"
        )
    return Stored(files[0], config, tensors)


def save_original(model: nn.Module, folder: Path) -> None:
    """Write a folder that the released scripts can read; those of Z-Image read diffusers'."""
    network = network_in(model)
    family = name_of(network.config)
    if family == "z_image":
        save_diffusers(model, folder)
        return
    form = {"next_dit": next_dit, "lumina2": lumina2}[family]
    form.check(network.config)
    args = form.model_args(network.config)
    with one_writer(model) as writes:
        state = plain_state(model, network, expected_shapes(network.config), writes)
        if family == "lumina2":
            state |= lumina2.unused(network.config)
        if writes:
            replace_folder(
                folder, "consolidated.00-of-01.safetensors", state,
                "model_args.pth", lambda file: torch.save(args, file),
            )  # fmt: skip


def _files(folder: Path, ema: bool | None) -> list[Path]:
    """The files, one per rank, of the set of weights that is asked for."""
    found: dict[str, dict[str, dict[int, dict[int, Path]]]] = {}  # set, suffix, ranks, rank
    for file in folder.iterdir():
        if match := FILE.fullmatch(file.name):
            of = found.setdefault(match[1], {}).setdefault(match[4], {})
            of.setdefault(int(match[3]), {})[int(match[2])] = file
    if ema is None:
        ema = "consolidated_ema" in found
    stem = "consolidated_ema" if ema else "consolidated"
    if stem not in found:
        raise FileNotFoundError(
            f"{folder} has no {stem}.00-of-0N.safetensors or .pth{weights_in(folder)}"
        )
    suffix = max(found[stem])  # .safetensors rather than .pth
    ranks, *others = sorted(found[stem][suffix])
    if others:
        raise ValueError(f"{folder} has {stem} files of {ranks} and of {others[0]} ranks")
    files = found[stem][suffix][ranks]
    for rank in range(ranks):  # ends at the first that is not there
        if rank not in files:
            missing = f"{stem}.{rank:02d}-of-{ranks:02d}{suffix}"
            raise FileNotFoundError(f"{folder / missing} does not exist{weights_in(folder)}")
    return [files[rank] for rank in range(ranks)]


def _preset(where: Path, args: Namespace) -> str:
    preset = getattr(args, "model", "")
    if not isinstance(preset, str):
        raise ValueError(f"{where} must name a model, got a {type(preset).__name__}")
    return preset
