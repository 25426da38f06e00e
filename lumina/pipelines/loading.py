"""Pipelines from folders and to folders.

First every part is looked at: its files are there, and a copy without memory says whether it fits.
Only then is anything loaded.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from torch import nn

import lumina
from lumina.checkpoints.files import check_there, one_line, read_json
from lumina.pipelines.parts import check_sample_size, pipeline_of
from lumina_kernels.output import replace

GIVEN = ("text_encoder", "tokenizer", "vae", "scheduler", "transformer")
VAES = ("AutoencoderKL", "AutoencoderTiny")
WEIGHTS = ("*.safetensors", "*.bin")
SPLIT = ("auto", "balanced", "balanced_low_0", "sequential")  # over devices, by accelerate

NO_CODE = {"trust_remote_code": False}  # a folder is data


def load(cls, folder, *, dtype, device_map, stages: bool, backend, ema, given: dict):
    """`Pipeline.from_pretrained`, which describes the arguments."""
    for name in given:
        if name not in GIVEN:
            raise TypeError(f"parts are {', '.join(GIVEN)}, got {name!r}")
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder} does not exist; `hf download OWNER/NAME --local-dir FOLDER` fetches one"
        )
    if isinstance(device_map, dict):
        places = {name: device_map.get(name, "cpu") for name in GIVEN}
    else:
        places = dict.fromkeys(GIVEN, "cpu" if device_map is None else device_map)

    def network(place):
        return lumina.load(weights, ema=ema, backend=backend, device=place, dtype=dtype)

    weights = given.get("transformer", folder)
    if isinstance(weights, nn.Module):
        parts, loaders = {"transformer": weights}, {}
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again with the numbers
            parts = {"transformer": network("meta")}
        loaders = {"transformer": lambda: network(places["transformer"])}
    family = pipeline_of(parts["transformer"])
    if not issubclass(family, cls):
        raise ValueError(f"{folder} is of a {family.__name__}, it was loaded as a {cls.__name__}")
    for name in GIVEN[:-1]:
        if name not in given:
            _check_links(folder / name, folder)
    for name, look, read in (
        ("text_encoder", _look_at_encoder, _read_encoder),
        ("vae", _look_at_vae, _read_vae),
    ):
        part = given.get(name, folder / name)
        if part is not None and not isinstance(part, nn.Module):
            check_folder(name, Path(part), WEIGHTS)
            loaders[name] = lambda part=part, name=name, read=read: read(part, dtype, places[name])
            part = look(Path(part))
        parts[name] = part
    parts["tokenizer"] = _tokenizer(folder, given)
    parts["scheduler"] = _scheduler(folder, given, family)
    pipe = family(**parts, sample_size=_sample_size(folder, given, family))
    if stages:
        pipe.use_stages(loaders, torch.device(places["transformer"]))
        return pipe
    for name in GIVEN:
        if name in loaders:
            setattr(pipe, name, loaders[name]())
    return pipe


def save(pipe, folder, **options) -> None:
    """`Pipeline.save_pretrained`."""
    folder = Path(folder)
    index = {"_class_name": type(pipe).__name__, "_diffusers_version": diffusers.__version__}
    for name in GIVEN:
        if getattr(pipe, name) is None:
            index[name] = [None, None]
            continue
        with pipe.stage(name) as part:
            if name == "transformer":
                lumina.save(part, folder / name, format="diffusers")
                config = json.loads((folder / name / "config.json").read_text())
                index[name] = ["diffusers", config["_class_name"]]
                if pipe.default_sample_size != 128:
                    config["sample_size"] = pipe.default_sample_size
                    (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            else:
                own = options if isinstance(part, nn.Module) else {}
                part.save_pretrained(folder / name, **own)
                index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    text = json.dumps(index, indent=2) + "\n"
    replace(folder / "model_index.json", lambda file: file.write_text(text))


def check_folder(name: str, folder: Path, patterns: tuple[str, ...]) -> None:
    """Raise unless the folder of a part has its config and any of its files."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: a pipeline needs its {name}, or {name}=")
    check_there(folder / "config.json")
    if not any(file for pattern in patterns for file in folder.glob(pattern)):
        raise FileNotFoundError(f"{folder} has no weights ({' or '.join(patterns)})")


def _check_links(part: Path, folder: Path) -> None:
    """Raise for a link out of a pipeline's folder, as `read_json` does, which the network's go by.

    Its weights may be links: they are no more than numbers.
    """
    root = folder.resolve()
    cache = root.as_posix().rpartition("/snapshots/")[0]
    blobs = Path(cache, "blobs") if cache else None
    for path in [part, *sorted(part.rglob("*"))]:
        if any(path.match(pattern) for pattern in WEIGHTS):
            continue
        real = path.resolve()
        if not real.is_relative_to(root) and real.parent != blobs:
            raise ValueError(f"{path} must lie in {folder}, and is a link out of it")


def _sample_size(folder: Path, given: dict, family: type) -> int:
    """Of the latents where a call names no size."""
    root, config = folder, folder / "transformer" / "config.json"
    part = given.get("transformer")
    if isinstance(part, (str, os.PathLike)) and (Path(part) / "config.json").exists():
        root, config = Path(part), Path(part) / "config.json"
    size = read_json(config, root).get("sample_size") if config.exists() else None
    if size is None:
        return 128
    check_sample_size(f"{config}: sample_size", size, family.patch_size)
    return size


def _look_at_encoder(folder: Path) -> nn.Module:
    config = _from(folder, transformers.AutoConfig.from_pretrained, **NO_CODE)
    with _reading(folder), torch.device("meta"):
        return transformers.AutoModel.from_config(config, **NO_CODE).eval()


def _read_encoder(folder: Path, dtype: torch.dtype, place) -> nn.Module:
    return _read(transformers.AutoModel, folder, place, dtype=dtype, **NO_CODE)


def _look_at_vae(folder: Path) -> nn.Module:
    kind = _vae_class(folder)
    with _reading(folder), torch.device("meta"):
        return kind.from_config(kind.load_config(folder, local_files_only=True)).eval()


def _read_vae(folder: Path, dtype: torch.dtype, place) -> nn.Module:
    # Cast here: the argument's name changes from version to version, and their `to` warns.
    return nn.Module.to(_read(_vae_class(folder), folder, place), dtype)


def _vae_class(folder: Path) -> type:
    name = read_json(folder / "config.json", folder).get("_class_name")
    if name not in VAES:
        raise ValueError(f"{folder} must be of an {' or '.join(VAES)}, got {name!r}")
    return getattr(diffusers, name)


def _read(kind: type, folder: Path, place, **options) -> nn.Module:
    split = isinstance(place, dict) or place in SPLIT
    if split:
        options["device_map"] = place
    module, report = _from(folder, kind.from_pretrained, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):  # the libraries would make them up
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{folder}: the weights lack {missing[0]}{more}")
    return (module if split else module.to(place)).eval()


def _tokenizer(folder: Path, given: dict):
    part = given.get("tokenizer", folder / "tokenizer")
    encoder = given.get("text_encoder")
    if "tokenizer" not in given and not part.exists() and isinstance(encoder, (str, os.PathLike)):
        part = Path(encoder)
    if not isinstance(part, (str, os.PathLike)):
        return part
    if not Path(part).is_dir():
        raise FileNotFoundError(f"{part} does not exist: a pipeline needs its tokenizer")
    return _from(Path(part), transformers.AutoTokenizer.from_pretrained, **NO_CODE)


def _scheduler(folder: Path, given: dict, family: type):
    kind = diffusers.FlowMatchEulerDiscreteScheduler
    part = given.get("scheduler", folder / "scheduler")
    if not isinstance(part, (str, os.PathLike)):
        return part
    if "scheduler" not in given and not (folder / "model_index.json").exists():
        return kind(shift=family.shift)  # weights alone
    name = read_json(Path(part) / "scheduler_config.json", Path(part)).get("_class_name")
    if name != kind.__name__:
        raise ValueError(f"{part} must be of a {kind.__name__}, got {name!r}")
    return _from(Path(part), kind.from_pretrained)


def _from(folder: Path, read, **options):
    """What a library reads from a folder, and from nowhere else."""
    with _reading(folder):
        return read(folder, local_files_only=True, **options)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """The errors of a library in one line."""
    try:
        yield
    except Exception as error:  # of any kind, by the library and by what is broken
        raise ValueError(f"{folder} can not be read: {one_line(error)}") from error
