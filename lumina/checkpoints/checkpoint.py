"""Weights on disk: our own file, diffusers folders, folders of the releases, files of ComfyUI.

All are read in the same order: map the files into memory and look at names, shapes and dtypes;
compare them with the network of the stored sizes, which has no memory yet; then give it the
tensors, converted or joined where they have to be, one after the other. So an error comes before
anything is loaded, and memory holds no more than the network (plus one copy where tensor-parallel
shards are merged).
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lumina.checkpoints.comfyui import open_comfyui, save_comfyui
from lumina.checkpoints.diffusers import open_diffusers, save_diffusers
from lumina.checkpoints.files import (
    Place,
    Stored,
    check_there,
    construct,
    parse_json,
    read_safetensors,
    same,
    shown,
    weights_in,
)
from lumina.checkpoints.original import open_original, save_original
from lumina.checkpoints.state import FLOATS, expected_shapes, network_in, one_writer, plain_state
from lumina.emoji.encoder import CaptionEncoder
from lumina.models.families import FAMILIES, name_of
from lumina.models.parts.fields import LARGEST
from lumina_kernels.output import replace

ENCODER = "caption_encoder."  # prefix of the text encoder's tensors in our own file


def load(
    path: str | os.PathLike,
    *,
    ema: bool | None = None,
    backend: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> nn.Module:
    """Load a network, in eval mode: a `NextDiT`, a `Lumina2` or a `ZImage`, by what the file says.

    Args:
        path: one of
            - a file written by `save`;
            - a diffusers folder: `config.json` of a LuminaNextDiT2DModel, a
              Lumina2Transformer2DModel or a ZImageTransformer2DModel, and
              `diffusion_pytorch_model.safetensors` or its shards and their index; or the folder of
              a pipeline, which has that as `transformer/`;
            - a safetensors file of ComfyUI with a Lumina-Image 2.0 or a Z-Image, alone or together
              with other networks, which are not read;
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
        FileNotFoundError: there is nothing at `path`, or a file of the checkpoint is missing; the
            message names the weights that are there instead.
        ValueError: an unknown or damaged file; a config of other types or sizes than the network's;
            a tensor that is missing, foreign or of another shape (the message names the first, both
            shapes, and how many more); copies of a tensor that differ; a pickle of other things
            than tensors, which is never unpickled.

    Warns:
        UserWarning: a tensor that is NaN throughout.
    """
    stored = _open(Path(path), ema)
    _check_depth(stored)
    shapes = expected_shapes(stored.config)
    places = {name: stored.places(name) for name in shapes}
    expected = {p.name: p.shape(shapes[name]) for name, each in places.items() for p in each}
    _check(stored.where, stored.tensors, expected)
    state = {name: _whole(stored, each) for name, each in places.items()}
    _warn_of_nan(stored.where, state)
    with torch.device("meta"):
        model = FAMILIES[name_of(stored.config)].network(stored.config, backend)
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
        why = f", it is a folder{weights_in(path)}" if path.is_dir() else ": `save` was given none"
        raise ValueError(f"{path} holds no caption encoder{why}")
    sizes = parse_json(path, metadata["caption_encoder"])
    numbers = [n for n in sizes.values() if type(n) is int and 1 <= n <= LARGEST]
    if sizes.keys() != {"dim", "width", "heads"} or len(numbers) < 3 or numbers[0] % numbers[2]:
        raise ValueError(f"{path}: no sizes of a caption encoder are {shown(sizes)}")
    with torch.device("meta"):
        encoder = construct(path, CaptionEncoder, sizes)
    tensors = {k.removeprefix(ENCODER): t for k, t in tensors.items() if k.startswith(ENCODER)}
    _check(path, tensors, {name: t.shape for name, t in encoder.state_dict().items()})
    _warn_of_nan(path, tensors)
    return _fill(encoder, tensors, device, dtype)


def save(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    format: str = "lumina",
    caption_encoder: CaptionEncoder | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the weights of a network, in the dtype they have; `load` brings back every bit.

    Every file is written under a temporary name beside its place and renamed when complete, so a
    crash leaves the old file or the new one. In a folder the weights come first, the config last.

    What is written is a plain network: without torch.compile, DDP, activation checkpointing or
    merged adapters around it, and with the values of parametrizations. Sharded parameters are
    gathered: every process calls `save`, the first one writes, and all return when it has.

    Args:
        model: a network of `lumina` or its reference, or what contains one.
        path: the file (format "lumina") or the folder to write; folders are made.
        format: "lumina", one safetensors file with the config in its metadata; "diffusers", a
            folder that `from_pretrained` of the network's class reads; "original", a folder of
            `consolidated.00-of-01.safetensors` and `model_args.pth` (which says the vae and
            image_size of the released model), or, of a Z-Image, the same as "diffusers"; "comfyui",
            one safetensors file, of a Lumina-Image 2.0 or a Z-Image.
        caption_encoder: goes into the same file; "lumina" only.
        metadata: more strings for the file's metadata; "lumina" only.

    Raises:
        ValueError: an unknown format; a network that `load` would not read back as it is: with
            adapters that are not merged, quantised, pruned, offloaded, its modules replaced; a
            config that diffusers or the original code would run as another network; a place that is
            no file or no folder; a folder with other weights or configs, which would be taken for a
            part of this checkpoint.
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
    elif format == "comfyui":
        save_comfyui(model, path)
    else:
        formats = "'lumina', 'diffusers', 'original' or 'comfyui'"
        raise ValueError(f"format must be {formats}, got {format!r}")


def _open(path: Path, ema: bool | None) -> Stored:
    if not path.exists():
        check_there(path)
    if (path / "model_args.pth").exists():
        return open_original(path, ema)
    if ema is not None:
        raise ValueError(f"ema={ema} is for original folders: {path} has no model_args.pth")
    if path.is_file():
        return _open_lumina(path)
    for folder in (path, path / "transformer"):
        if (folder / "config.json").exists():
            return open_diffusers(folder, path)
    raise ValueError(
        f"{path} is not a checkpoint: it has neither config.json (diffusers), nor "
        "transformer/config.json (a pipeline of diffusers), nor model_args.pth (original release)"
        f"{weights_in(path)}"
    )


def _open_lumina(path: Path) -> Stored:
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != "lumina":
        return open_comfyui(path, tensors)
    family = metadata.get("family", "next_dit")  # of files written before there were others
    if family not in FAMILIES:
        raise ValueError(
            f"{path}: family must be one of {', '.join(FAMILIES)}, got {shown(family)}"
        )
    fields = parse_json(path, metadata.get("config", ""))
    config = construct(path, FAMILIES[family].config, fields)
    return Stored(path, config, {k: t for k, t in tensors.items() if not k.startswith(ENCODER)})


def _save_lumina(
    model: nn.Module, path: Path, encoder: CaptionEncoder | None, metadata: dict[str, str]
) -> None:
    network = network_in(model)
    own, expected = {"format": "lumina", "config": json.dumps(asdict(network.config))}, {}
    own["family"] = name_of(network.config)
    if encoder is not None:
        plain = network_in(encoder, (CaptionEncoder,))
        sizes = {name: getattr(plain, name) for name in ("dim", "width", "heads")}
        own["caption_encoder"] = json.dumps(sizes)
        with torch.device("meta"):
            expected = {name: t.shape for name, t in CaptionEncoder(**sizes).state_dict().items()}
    for key in ("format", "family", "config", "caption_encoder"):
        if key in metadata:
            raise ValueError(f"metadata must not have the key {key!r}, which `save` writes itself")
    with one_writer(model) as writes:
        state = plain_state(model, network, expected_shapes(network.config), writes)
        if encoder is not None:
            named = plain_state(encoder, plain, expected, writes)
            state |= {ENCODER + name: tensor for name, tensor in named.items()}
        if writes:
            replace(path, lambda file: save_file(state, file, {**metadata, **own}))


def _check_depth(stored: Stored) -> None:
    """Refuse a depth that the file does not have, before a network of that depth is described."""
    for stack, field in stored.config.stacks.items():
        said = getattr(stored.config, field)
        found = len(
            {m[1] for m in (re.match(rf"{stack}\.(\d+)\.", n) for n in stored.tensors) if m}
        )
        if said > found:
            raise ValueError(
                f"{stored.where}: the network has {field}={said}, the file tensors of {found} "
                f"{stack}"
            )


def _whole(stored: Stored, places: tuple[Place, ...]) -> Tensor:
    """A tensor of the network, taken out of the file, which may hold copies or only the rows."""
    first, *others = places
    tensors = [stored.tensors.pop(place.name) for place in places]
    if first.rows is not None:
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1:
            raise ValueError(
                f"{stored.where}: {first.name} and {others[0].name} must have one dtype, "
                f"got {sorted(map(str, dtypes))}"
            )
        return torch.cat(tensors)
    for place, tensor in zip(others, tensors[1:], strict=True):
        if not same(tensor, tensors[0]):
            raise ValueError(
                f"{stored.where}: {place.name} must be a copy of {first.name}, and differs: "
                "a layer of a Next-DiT has one query"
            )
    return tensors[0]


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
            problems.append(f"{shown(name)} of shape {shape} is not part of this network")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} must have shape {tuple(expected[name])}, got {shape}")
        elif tensor.dtype not in FLOATS:
            problems.append(f"{name} must be of floating point, got {tensor.dtype}")
    if problems:
        more = f" (and {len(problems) - 1} more like this)" if len(problems) > 1 else ""
        raise ValueError(f"{where}: {problems[0]}{more}")


def _warn_of_nan(where: Path, state: dict[str, Tensor]) -> None:
    """Only a tensor that starts with NaN is read further."""
    names = [
        name
        for name, t in state.items()
        if t.numel() and t[(0,) * t.ndim].float().isnan() and t.float().isnan().all()
    ]
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        warnings.warn(f"{where}: {names[0]} is NaN throughout{more}", stacklevel=3)


def _fill(model: nn.Module, state: dict[str, Tensor], device, dtype: torch.dtype | None):
    """Give a network on the meta device its weights, one after the other."""
    if dtype is None:
        dtypes = {tensor.dtype for tensor in state.values()}
        if len(dtypes) > 1:  # torch does not promote those of 8 bits, which float16 holds
            dtypes = {dtype if dtype.itemsize > 1 else torch.float16 for dtype in dtypes}
        dtype = functools.reduce(torch.promote_types, dtypes)
    # Copies: a file may put a tensor at any address, and products of matrices are computed in
    # another order, or slower, where that is not aligned. The pages of the file go one by one.
    state = {name: state.pop(name).to(device, dtype, copy=True) for name in list(state)}
    model.load_state_dict(state, assign=True)
    return model.eval()
