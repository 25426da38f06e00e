"""Weights of a Next-DiT on disk: our own file, diffusers folders, folders of the original release.

All are read in the same order: map the files into memory and look at names, shapes and dtypes;
compare them with the network of the stored sizes, which has no memory yet; then allocate it and
copy, converting on the way. So an error comes before anything is loaded, and memory holds no more
than the network and the files' pages (plus one copy where tensor-parallel shards are merged).
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lumina.checkpoints.files import (
    Stored,
    construct,
    on_cpu,
    parse_json,
    read_safetensors,
    replace,
)
from lumina.emoji.encoder import CaptionEncoder
from lumina.models.next_dit.config import NextDiTConfig
from lumina.models.next_dit.diffusers import open_diffusers, save_diffusers
from lumina.models.next_dit.model import NextDiT
from lumina.models.next_dit.original import open_original, save_original

ENCODER = "caption_encoder."  # prefix of the text encoder's tensors in our own file


def load(
    path: str | os.PathLike,
    *,
    ema: bool | None = None,
    backend: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> NextDiT:
    """Load a Next-DiT, in eval mode.

    Args:
        path: one of
            - a file written by `save`;
            - a diffusers folder: `config.json` of a LuminaNextDiT2DModel, and
              `diffusion_pytorch_model.safetensors` or its shards and their index; or the folder of
              a pipeline, which has that as `transformer/`;
            - an original folder: `model_args.pth`, and `consolidated.00-of-0N` or
              `consolidated_ema.00-of-0N`, `.safetensors` or `.pth` (safetensors where there are
              both). Tensor-parallel shards are merged.
        ema: which weights of an original folder: the average (True), the last (False), the average
            where there is one (None). The other formats hold one set, and take None only.
        backend: of the network's ops, as for `NextDiT`.
        device: where to load to.
        dtype: of the parameters. float32 whatever the file holds, as in diffusers'
            `from_pretrained`; None keeps the file's (the widest, if it has several).

    Raises:
        FileNotFoundError: there is nothing at `path`, or a file of the checkpoint is missing.
        ValueError: an unknown or damaged file; a tensor that is missing, foreign or of another
            shape (the message names the first, both shapes, and how many more); copies of a tensor
            that differ; a pickle of other things than tensors, which is never unpickled.
    """
    stored = _open(Path(path), ema)
    with torch.device("meta"):
        model = NextDiT(stored.config, backend)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    expected = {there: shape for name, shape in shapes.items() for there in stored.names(name)}
    _check(stored.where, stored.tensors, expected)
    state = {}
    for name in shapes:
        first, *copies = stored.names(name)
        state[name] = stored.tensors[first]
        for copy in copies:
            if not torch.equal(stored.tensors[copy], state[name]):
                raise ValueError(
                    f"{stored.where}: {copy} must be a copy of {first}, and differs: "
                    "a layer of a Next-DiT has one query"
                )
    return _fill(model, state, device, dtype)


def load_caption_encoder(
    path: str | os.PathLike,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> CaptionEncoder:
    """Load the caption encoder out of a file that `save` wrote with one, in eval mode.

    Args:
        path: the file.
        device, dtype: as for `load`.

    Raises:
        FileNotFoundError, ValueError: as `load`; also where the file has no caption encoder.
    """
    path = Path(path)
    tensors, metadata = ({}, {}) if path.is_dir() else read_safetensors(path)
    if "caption_encoder" not in metadata:
        raise ValueError(f"{path} holds no caption encoder")
    with torch.device("meta"):
        sizes = parse_json(path, metadata["caption_encoder"])
        encoder = construct(path, CaptionEncoder, sizes)
    tensors = {k.removeprefix(ENCODER): t for k, t in tensors.items() if k.startswith(ENCODER)}
    _check(path, tensors, {name: t.shape for name, t in encoder.state_dict().items()})
    return _fill(encoder, tensors, device, dtype)


def save(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    format: str = "lumina",
    caption_encoder: CaptionEncoder | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the weights of a Next-DiT, in the dtype they have; `load` brings back every bit.

    Every file is written under a temporary name beside its place and renamed when complete, so a
    crash leaves the old file or the new one. In a folder the weights come first, the config last.

    Args:
        model: a `lumina.NextDiT` or `lumina.reference.NextDiT`.
        path: the file (format "lumina") or the folder to write; folders are made.
        format: "lumina", one safetensors file with the config in its metadata; "diffusers", a
            folder that `LuminaNextDiT2DModel.from_pretrained` reads; "original", a folder of
            `consolidated.00-of-01.safetensors` and `model_args.pth` (which says the vae and
            image_size of the released model).
        caption_encoder: goes into the same file; "lumina" only.
        metadata: more strings for the file's metadata; "lumina" only.

    Raises:
        ValueError: an unknown format; a config that diffusers or the original code would run as
            another network; a folder with other weights or configs, which would be taken for a part
            of this checkpoint.
    """
    path = Path(path)
    if format == "lumina":
        _save_lumina(model, path, caption_encoder, metadata or {})
        return
    if caption_encoder is not None or metadata is not None:
        raise ValueError(f"format {format!r} has no place for a caption_encoder or metadata")
    if format == "diffusers":
        save_diffusers(model, path)
    elif format == "original":
        save_original(model, path)
    else:
        raise ValueError(f"format must be 'lumina', 'diffusers' or 'original', got {format!r}")


def _open(path: Path, ema: bool | None) -> Stored:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if (path / "model_args.pth").exists():
        return open_original(path, ema)
    if ema is not None:
        raise ValueError(f"ema={ema} is for original folders: {path} has no model_args.pth")
    if path.is_file():
        return _open_lumina(path)
    for folder in (path, path / "transformer"):
        if (folder / "config.json").exists():
            return open_diffusers(folder)
    raise ValueError(
        f"{path} is no checkpoint: it has neither config.json (diffusers), nor "
        "transformer/config.json (a pipeline of diffusers), nor model_args.pth (original release)"
    )


def _open_lumina(path: Path) -> Stored:
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != "lumina":
        raise ValueError(
            f"{path} has no Next-DiT config in its metadata; "
            "of a checkpoint of diffusers or of the original release, give the folder"
        )
    config = construct(path, NextDiTConfig, parse_json(path, metadata.get("config", "")))
    return Stored(path, config, {k: t for k, t in tensors.items() if not k.startswith(ENCODER)})


def _save_lumina(
    model: nn.Module, path: Path, encoder: CaptionEncoder | None, metadata: dict[str, str]
) -> None:
    state, own = on_cpu(model), {"format": "lumina", "config": json.dumps(asdict(model.config))}
    if encoder is not None:
        state.update((ENCODER + name, tensor) for name, tensor in on_cpu(encoder).items())
        sizes = {name: getattr(encoder, name) for name in ("dim", "width", "heads")}
        own["caption_encoder"] = json.dumps(sizes)
    for key in ("format", "config", "caption_encoder"):
        if key in metadata:
            raise ValueError(f"metadata must not have the key {key!r}, which `save` writes itself")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda file: save_file(state, file, {**metadata, **own}))


def _check(where: Path, tensors: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
    """Raise one error for all names, shapes and kinds of tensors that are not as expected."""
    problems = [
        f"{name} must have shape {tuple(shape)}, and is missing"
        for name, shape in expected.items()
        if name not in tensors
    ]
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name not in expected:
            problems.append(f"{name} of shape {shape} is not part of this network")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} must have shape {tuple(expected[name])}, got {shape}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} must be of floating point, got {tensor.dtype}")
    if problems:
        more = f" (and {len(problems) - 1} more like this)" if len(problems) > 1 else ""
        raise ValueError(f"{where}: {problems[0]}{more}")


def _fill(model: nn.Module, state: dict[str, Tensor], device, dtype: torch.dtype | None):
    """Give a network on the meta device memory, and copy the weights into it."""
    if dtype is None:
        dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})
    model = model.to(dtype).to_empty(device=device)
    model.load_state_dict(state)
    return model.eval()
