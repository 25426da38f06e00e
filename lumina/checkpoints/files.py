"""Checkpoint files: read without running anything, replaced without losing anything."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lumina.models.next_dit.config import NextDiTConfig


@dataclass
class Stored:
    """A checkpoint that has been opened, but neither read nor checked."""

    where: Path  # for messages
    config: NextDiTConfig
    tensors: dict[str, Tensor]  # mapped into memory; named as in the file
    names: Callable[[str], tuple[str, ...]] = lambda name: (name,)  # ours -> in the file


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, mapped into memory rather than read, and metadata of a safetensors file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def read_pickle(path: Path, allowed: type | None = None) -> object:
    """What `torch.save` wrote; only tensors, plain values and the allowed class are read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with torch.serialization.safe_globals([allowed] if allowed else []):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"a pickled {found[1]}" if found else "a pickle of other things than tensors"
        raise ValueError(f"{path} holds {what}, which can run code: it is not read") from None
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged or not a PyTorch file: {error}") from error


def parse_json(where: Path, text: str | bytes) -> dict:
    """A JSON object, or a ValueError that says where it was."""
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} holds no valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(parsed).__name__}")
    return parsed


def construct(where: Path, kind: type, fields: dict):
    """kind(**fields), or a ValueError that says where the fields came from."""
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:  # unknown or missing fields, sizes that do not fit
        raise ValueError(f"{where}: {error}") from error


def check_released(where: Path | str, config: NextDiTConfig, **fixed: object) -> None:
    """Refuse a config that differs from the constants of the released code, which would win."""
    for name, value in {"axes": ("h", "w"), "rope_theta": 10000.0, **fixed}.items():
        if (got := getattr(config, name)) != value:
            raise ValueError(f"{where}: {name} can only be {value} in this format, got {got}")
    if config.head_dim % 4:
        got = config.head_dim
        raise ValueError(f"{where}: head_dim must be a multiple of 4 in this format, got {got}")


def on_cpu(module: nn.Module) -> dict[str, Tensor]:
    """State dict in the form safetensors accepts; shares memory with the module where it can."""
    return {name: t.detach().cpu().contiguous() for name, t in module.state_dict().items()}


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file beside `path`, flush it to disk, and only then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # that of any new file; safetensors leaves 0600
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(
    folder: Path, weights: str, state: dict[str, Tensor], config: str, write: Callable
) -> None:
    """Replace the weights, then the config, in a folder that holds no other checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {".json", ".safetensors", ".pth", ".bin"}
    for file in sorted(folder.iterdir()):
        if file.suffix in kinds and file.name not in (weights, config):
            raise ValueError(
                f"{folder} must hold no other checkpoint, or the two would mix: it has {file.name}"
            )
    replace(folder / weights, lambda file: save_file(state, file, {"format": "pt"}))
    replace(folder / config, write)
