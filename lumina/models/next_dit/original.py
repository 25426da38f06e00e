"""Next-DiT as the original release stores it: `model_args.pth` and `consolidated.00-of-0N`.

`model_args.pth` is a pickled `argparse.Namespace` that names a preset (`NextDiT_2B_GQA_patch2`) and
says qk_norm, but has no sizes: those come from the shapes of the tensors. norm_eps is 1e-5 and
rope_theta 10000 in that code. Tensor parallelism (fairscale) leaves N files, which are merged.
"""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor, nn

from lumina.checkpoints.files import (
    Stored,
    check_released,
    construct,
    read_pickle,
    read_pth,
    read_safetensors,
    replace_folder,
    same,
    shown,
    weights_in,
)
from lumina.checkpoints.state import expected_shapes, network_in, one_writer, plain_state
from lumina.models.next_dit.config import NextDiTConfig

FILE = re.compile(r"(consolidated(?:_ema)?)\.([0-9]+)-of-(0*[1-9][0-9]*)(\.safetensors|\.pth)")

# Linear layers cut by output rows, and the heads that follow them; by input columns; the rest is
# whole in every file.
CUT_ROWS = re.compile(
    r"(x_embedder|mlp\.0|cap_embedder\.1|adaLN_modulation\.1|final_layer\.linear|\.w[qkv]|\.w[kv]_y"
    r"|\.w[13]|\.(q|k|ky)_norm)\.(weight|bias)$|attention\.gate$"
)
CUT_COLUMNS = re.compile(r"(\.wo|\.w2|mlp\.2)\.weight$")


def open_original(folder: Path, ema: bool | None) -> Stored:
    """Open a folder of the release; `ema` as for `lumina.load`."""
    args_file = folder / "model_args.pth"
    args = read_pickle(args_file, allowed=Namespace)
    if not isinstance(args, Namespace):
        raise ValueError(f"{args_file} must hold a Namespace, got {type(args).__name__}")
    files = _files(folder, ema)
    shards = [
        read_pth(file) if file.suffix == ".pth" else read_safetensors(file)[0] for file in files
    ]
    tensors = shards[0] if len(shards) == 1 else _merge(files, shards)
    config = config_from_shapes(files[0], tensors, _preset(args_file, args))
    if getattr(args, "qk_norm", config.qk_norm) is not config.qk_norm:
        raise ValueError(
            f"{args_file} says qk_norm={shown(args.qk_norm)}, the tensors of {files[0].name} "
            f"say {config.qk_norm}"
        )
    return Stored(files[0], config, tensors)


def save_original(model: nn.Module, folder: Path) -> None:
    """Write a folder that the released scripts can read."""
    network = network_in(model)
    check_released("original", network.config, norm_eps=1e-5)
    args = model_args(network.config)
    with one_writer(model) as writes:
        state = plain_state(model, network, expected_shapes(network.config), writes)
        if writes:
            replace_folder(
                folder, "consolidated.00-of-01.safetensors", state,
                "model_args.pth", lambda file: torch.save(args, file),
            )  # fmt: skip


def model_args(config: NextDiTConfig) -> Namespace:
    """What the released scripts read of it; vae and image_size are the released model's."""
    sizes = (config.dim, config.n_layers, config.n_heads, config.ffn_dim)
    released = sizes == (2304, 24, 32, 6144)
    preset = {32: "2B_", 8: "2B_GQA_"}.get(config.n_kv_heads, "") if released else ""
    return Namespace(
        model=f"NextDiT_{preset}patch{config.patch_size}", qk_norm=config.qk_norm,
        model_parallel_size=1, vae="sdxl", image_size=1024,
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


def _merge(files: list[Path], shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    for file, shard in zip(files, shards, strict=True):
        if odd := sorted(shard.keys() ^ shards[0].keys()):
            raise ValueError(f"{files[0]} and {file.name}: only one of them has {shown(odd[0])}")
    if "layers.0.attention.q_norm.weight" in shards[0]:
        warnings.warn(
            f"{files[0].parent}: the original code normalises q and k over the heads of one shard, "
            "the merged network over all heads; if it was trained in shards, outputs will differ",
            stacklevel=5,
        )
    merged = {}
    for name in shards[0]:
        parts = [shard[name] for shard in shards]
        shapes = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in parts)
        axis = 0 if CUT_ROWS.search(name) else 1 if CUT_COLUMNS.search(name) else None
        if axis is None:
            for file, part in zip(files, parts, strict=True):
                if not same(part, parts[0]):
                    raise ValueError(f"{name} must be the same in {files[0]} and {file.name}")
            merged[name] = parts[0]
        elif parts[0].ndim <= axis or len({(part.shape, part.dtype) for part in parts}) > 1:
            raise ValueError(
                f"{files[0]}: shards of {name} must have one shape and dtype, got {shapes}"
            )
        else:
            merged[name] = torch.cat(parts, dim=axis)
    return merged


def config_from_shapes(where: Path, tensors: dict[str, Tensor], preset: str) -> NextDiTConfig:
    """The config that these tensors imply; the preset's name gives the patch size."""

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        got = tuple(tensors[name].shape) if name in tensors else "none"
        if name not in tensors or len(got) != ndim or 0 in got:
            raise ValueError(f"{where} must hold {name} with {ndim} dimensions, got {got}")
        return got

    dim, patch = shape("x_embedder.weight", 2)
    (heads,) = shape("layers.0.attention.gate", 1)
    kv, _ = shape("layers.0.attention.wk.weight", 2)
    hidden, _ = shape("layers.0.feed_forward.w1.weight", 2)
    out, _ = shape("final_layer.linear.weight", 2)
    side = re.search(r"_patch([1-9][0-9]{0,3})(?![0-9])", preset)
    side = int(side[1]) if side else 2
    if patch % side**2 or out not in (patch, 2 * patch) or kv * heads % dim:
        raise ValueError(
            f"{where} is no Next-DiT with {side}x{side} patches: x_embedder.weight is "
            f"{dim, patch}, final_layer.linear.weight {out, dim}, wk.weight {kv, dim}, "
            f"{heads} heads"
        )
    numbers = (re.match(r"layers\.([0-9]{1,9})\.", name) for name in tensors)
    layers = [int(match[1]) for match in numbers if match]
    multiple_of, multiplier = _ffn(dim, hidden)
    fields = dict(
        patch_size=side, in_channels=patch // side**2, dim=dim, n_layers=max(layers) + 1,
        n_heads=heads, n_kv_heads=kv * heads // dim, multiple_of=multiple_of,
        ffn_dim_multiplier=multiplier, learn_sigma=out != patch,
        qk_norm="layers.0.attention.q_norm.weight" in tensors,
        cap_feat_dim=shape("cap_embedder.0.weight", 1)[0],
    )  # fmt: skip
    return construct(where, NextDiTConfig, fields)


def _ffn(dim: int, hidden: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that give this width; the released 256 and None if so."""
    base, multiples = int(8 * dim / 3), (256, 128, 64, 32, 16, 8, 4, 2, 1)
    for multiple in multiples:
        if -(-base // multiple) * multiple == hidden:
            return multiple, None
    multiple = next(m for m in multiples if hidden % m == 0)
    return multiple, (hidden + 0.5) / base  # the half keeps int() from rounding below hidden
