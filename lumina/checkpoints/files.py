"""Checkpoint files, read without running anything."""

from __future__ import annotations

import json
import mmap
import pickle
import re
import reprlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lumina.models.families import Config
from lumina_kernels.output import replace

JSON_LIMIT = 2**24  # bytes; what a network of a thousand layers says of itself is under 5 MB
WEIGHTS = {".safetensors", ".bin", ".pth", ".pt", ".ckpt"}


@dataclass(frozen=True)
class Place:
    """Where a tensor of a network lies in a file.

    The tensor called `name` there holds all of it, or the rows (first, end) of it.
    """

    name: str
    rows: tuple[int, int] | None = None

    def shape(self, whole: torch.Size) -> torch.Size:
        """Of the tensor in the file, for that of the network."""
        if self.rows is None:
            return whole
        return torch.Size([self.rows[1] - self.rows[0], *whole[1:]])


Places = Callable[[str], tuple[Place, ...]]  # of a tensor: several copies of it, or its rows


def as_named(name: str) -> tuple[Place, ...]:
    """Of a format with the network's own names."""
    return (Place(name),)


def split_qkv(name: str, heads: Sequence[int], head_dim: int, names: Sequence[str]):
    """The places of one matrix of q, k and v that a format stores as three."""
    ends = [sum(heads[: i + 1]) * head_dim for i in range(3)]
    starts = [0, *ends[:2]]
    each = zip(names, starts, ends, strict=True)
    return tuple(Place(name.replace("qkv", n), (a, b)) for n, a, b in each)


def spread(state: dict[str, Tensor], places: Places) -> dict[str, Tensor]:
    """The tensors of a file, for those of a network."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        first, *copies = places(name)
        for place in (first, *copies):
            if place.rows is not None:
                out[place.name] = tensor[slice(*place.rows)].clone()
            else:  # no shared memory
                out[place.name] = tensor if place is first else tensor.clone()
    return out


@dataclass
class Stored:
    """A checkpoint that has been opened, but neither read nor checked."""

    where: Path  # for messages
    config: Config
    tensors: dict[str, Tensor]  # mapped into memory; named as in the file
    places: Places = as_named


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Every tensor is a map of its own part of the file: nothing is read before it is used, and the
    pages that a tensor takes are gone with it.
    """
    check_there(path)
    try:
        header, start = _header(path)
        with safe_open(path, framework="pt") as file:  # the library's checks of the whole
            metadata, names = file.metadata() or {}, list(file.keys())
            kinds = {name: file.get_tensor(name) for name in names}  # of which nothing is read
        with open(path, "rb") as file:
            tensors = {
                name: _mapped(file, start + header[name]["data_offsets"][0], kind)
                for name, kind in kinds.items()
            }
        return tensors, metadata
    except Exception as error:  # the library lets errors of torch through
        raise ValueError(
            f"{path} is damaged or not a safetensors file: {one_line(error)}"
        ) from error


def _mapped(file, begin: int, kind: Tensor) -> Tensor:
    """A tensor of this kind, at this place of a file."""
    if kind.numel() == 0:
        return torch.empty_like(kind)
    page = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    size = begin - page + kind.nbytes
    # Written to, it changes in memory only.
    pages = mmap.mmap(file.fileno(), size, offset=page, access=mmap.ACCESS_COPY)
    raw = torch.frombuffer(pages, dtype=torch.uint8, offset=begin - page, count=kind.nbytes)
    return raw.view(kind.dtype).view(kind.shape)


def read_pth(path: Path) -> dict[str, Tensor]:
    """Tensors by name, mapped into memory, out of what `torch.save` wrote."""
    state = read_pickle(path)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise ValueError(f"{path} must hold tensors by name, got {type(state).__name__}")
    for name, tensor in state.items():
        if kind := unusual(tensor):
            raise ValueError(f"{path}: {shown(name)} must be a plain tensor, got {kind}")
    # torch maps as many bytes as the pickle says from where a record starts, whatever lies there.
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in state.values())}
    stored = _record_sizes(path)
    if sorted(filter(None, storages.values())) != stored:
        raise ValueError(f"{path} is damaged: its tensors do not have the sizes of its records")
    if (said := sum(t.nbytes for t in state.values())) > sum(stored):
        raise ValueError(
            f"{path} must store every tensor in full: its tensors are of {said} bytes in all, "
            f"its records of {sum(stored)}"
        )
    return state


def read_pickle(path: Path, allowed: type | None = None) -> object:
    """What `torch.save` wrote; only tensors, plain values and the allowed class are read."""
    check_there(path)
    try:
        with torch.serialization.safe_globals([allowed] if allowed else []):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"a pickled {found[1]}" if found else "a pickle of other things than tensors"
        raise ValueError(f"{path} holds {what}, which can run code: it is not read") from None
    except Exception as error:  # a damaged pickle can make any
        raise ValueError(f"{path} is damaged or not a PyTorch file: {one_line(error)}") from error


def read_json(path: Path, folder: Path) -> dict:
    """The JSON object in a file of a checkpoint's folder.

    A link may not lead out of the folder, but to the blobs of a Hugging Face cache, of which all
    files of a snapshot are links.
    """
    check_there(path)
    root, real = folder.resolve(), path.resolve()
    cache = root.as_posix().rpartition("/snapshots/")[0]
    if not real.is_relative_to(root) and not (cache and real.parent == Path(cache, "blobs")):
        raise ValueError(f"{path} must lie in {folder}, and is a link out of it")
    if (size := path.stat().st_size) > JSON_LIMIT:
        raise ValueError(f"{path} must be at most {JSON_LIMIT} bytes, got {size}")
    return parse_json(path, path.read_bytes())


def parse_json(where: Path, text: str | bytes) -> dict:
    """A JSON object, or a ValueError that says where it was."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} holds no valid JSON: {one_line(error)}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(parsed).__name__}")
    return parsed


def construct(where: Path, kind: type, fields: dict):
    """kind(**fields), or a ValueError that says where the fields came from."""
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:  # unknown or missing fields, sizes that do not fit
        raise ValueError(f"{where}: {one_line(error)}") from error


def check_there(path: Path) -> None:
    """Raise FileNotFoundError, with the files that are there instead, unless it is a file."""
    if path.is_file():
        return
    what = "is not a regular file" if path.exists() else "does not exist"
    raise FileNotFoundError(f"{path} {what}{weights_in(path.parent)}")


def weights_in(folder: Path) -> str:
    """For the end of a message: which weights a folder has."""
    if not folder.is_dir():
        return ""
    names = sorted(f.name for f in folder.iterdir() if f.suffix in WEIGHTS)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    where = "the current folder" if folder == Path() else folder
    return f"; {where} has {', '.join(names[:4])}{more}" if names else ""


def check_released(where: Path | str, config: Config, **fixed: object) -> None:
    """Refuse a config that differs from the constants of the released code, which would win."""
    for name, value in {"axes": ("h", "w"), "rope_theta": 10000.0, **fixed}.items():
        if (got := getattr(config, name)) != value:
            raise ValueError(f"{where}: {name} can only be {value} in this format, got {got}")


def check_alternating(where: Path | str, config: Config) -> None:
    """Refuse a head_dim of which h and w cannot have half of the pairs each."""
    if config.head_dim % 4:
        got = config.head_dim
        raise ValueError(f"{where}: head_dim must be a multiple of 4 in this format, got {got}")


def shape_of(where: Path, tensors: dict[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    """Of a tensor that must be there, with so many dimensions."""
    got = tuple(tensors[name].shape) if name in tensors else "none"
    if name not in tensors or len(got) != ndim or 0 in got:
        raise ValueError(f"{where} must hold {name} with {ndim} dimensions, got {got}")
    return got


def length_of(stack: str, tensors: dict[str, Tensor]) -> int:
    """Blocks in a list, by the largest number in the names; 0: none."""
    found = (re.match(rf"{stack}\.([0-9]{{1,9}})\.", name) for name in tensors)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def patch_side(preset: str) -> int:
    """The side of a patch, by the name of a preset of the original releases."""
    side = re.search(r"_patch([1-9][0-9]{0,3})(?![0-9])", preset)
    return int(side[1]) if side else 2


def ffn_rounding(base: int, hidden: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that make `hidden` of `base`.

    The released 256 and None, if they do.
    """
    multiples = (256, 128, 64, 32, 16, 8, 4, 2, 1)
    for multiple in multiples:
        if -(-base // multiple) * multiple == hidden:
            return multiple, None
    multiple = next(m for m in multiples if hidden % m == 0)
    return multiple, (hidden + 0.5) / base  # the half keeps int() from rounding below hidden


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bit by bit, NaN too."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


def unusual(tensor: Tensor) -> str | None:
    """What makes a tensor more than a block of numbers in memory; None: nothing does."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_nested:
        return f"a tensor of {tensor.dtype} and {tensor.layout}"
    return "a tensor without values (on the meta device)" if tensor.is_meta else None


def shown(value: object) -> str:
    """A name or value out of a file, short and on one line."""
    short = isinstance(value, str) and value.isprintable() and len(value) <= 200
    return value if short else reprlib.repr(value)


def one_line(error: Exception) -> str:
    """What an error says, without the trace that torch appends."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


def replace_folder(
    folder: Path, weights: str, state: dict[str, Tensor], config: str, write: Callable
) -> None:
    """Replace the weights, then the config, in a folder that holds no other checkpoint."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, it must be a folder or a new name")
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        if file.suffix in {".json", *WEIGHTS} and file.name not in (weights, config):
            raise ValueError(
                f"{folder} must hold no other checkpoint, or the two would mix: it has {file.name}"
            )
    replace(folder / weights, lambda file: save_file(state, file, {"format": "pt"}))
    replace(folder / config, write)


def _record_sizes(path: Path) -> list[int]:
    """Bytes of the records with the numbers of tensors, in order of size."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = [r for r in archive.infolist() if re.match(r"[^/]*/data/", r.filename)]
            for record in records:
                archive.open(record).close()  # compares its two headers
    except Exception as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError(f"{path} is compressed: its tensors cannot be mapped into memory")
    return sorted(record.file_size for record in records if record.file_size)


def _header(path: Path) -> tuple[dict, int]:
    """What a file says of its tensors, and where they begin.

    Refuses what the format forbids and its parser takes: names that come twice.
    """

    def once(pairs: list[tuple[str, object]]) -> dict:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in fields if names.count(name) > 1)
            raise ValueError(f"its header has {shown(twice)} twice")
        return fields

    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(JSON_LIMIT, path.stat().st_size):
            raise ValueError(f"its header would be of {size} bytes")
        return json.loads(file.read(size) or b"{}", object_pairs_hook=once), 8 + size
