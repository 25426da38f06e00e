"""Damages checkpoints of all formats at random and loads each; a process of its own, because it
measures the process: `python tests/checkpoints/fuzz.py COUNT [SEED]`. `test_fuzz.py` runs it."""

import faulthandler
import json
import random
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from argparse import Namespace
from collections import Counter
from pathlib import Path

import torch

from lumina.checkpoints import checkpoint
from lumina.models.next_dit.config import NextDiTConfig
from lumina.models.next_dit.model import NextDiT

# 13 MB, more than what Python's own objects take.
CONFIG = NextDiTConfig(
    dim=288, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=128, cap_feat_dim=128
)
SECONDS = 20  # for one file
SLACK = 8 * 2**20  # bytes that the allocators keep beside
VALUES = (
    None, True, "x", "", [], {}, -1, 0, 1, 2, 3, 48, 2.0, 1e308, float("nan"), float("inf"),
    10**9, 2**24, 2**31, 2**63, 10**30, 10**400, [[[]]], "\n", "layers.0", 1e-5,
)  # fmt: skip
NAMES = ("layers.999999999.x", "layers.2.x", "a\nb", "", "x" * 300)


def bits(file: Path, rng: random.Random) -> None:
    """Flip a few, mostly near the ends, where files say what they hold."""
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 3, 20))):
        at = rng.randrange(min(rng.choice((16, 400, 8000, len(data))), len(data)))
        data[at if rng.random() < 0.6 else -1 - at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut(file: Path, rng: random.Random) -> None:
    """Truncate, leave out or repeat a part."""
    data = file.read_bytes()
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    file.write_bytes(rng.choice((data[:a], data[a:], data[:a] + data[b:], data[:b] + data[a:])))


def says(file: Path, rng: random.Random) -> None:
    """Edit what a file says of itself: JSON, the header of safetensors, the records of a .pth."""
    data = file.read_bytes()
    if file.suffix == ".json":
        file.write_bytes(edited(data, rng))
    elif file.suffix == ".pth":
        repack(file, rng)
    else:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        own = header.get("__metadata__", {})
        if "config" in own and rng.random() < 0.5:
            own["config"] = edited(own["config"].encode(), rng).decode()
            text = json.dumps(header).encode()
        else:
            text = edited(data[8 : 8 + size], rng)
        length = rng.choice((len(text), len(text), len(text), len(text) - 1, 2**31, 2**63))
        file.write_bytes(struct.pack("<Q", length) + text + data[8 + size :])


def edited(text: bytes, rng: random.Random) -> bytes:
    """JSON with a value or a name changed or left out at any depth, or nested without end."""
    root = node = json.loads(text)
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not node[key] or not isinstance(node[key], (dict, list)) or rng.random() < 0.3:
            break
        node = node[key]
    kind = rng.randrange(4) if isinstance(node, dict) else 0
    if kind < 2:
        node[key] = rng.choice(VALUES)
    elif kind == 2:
        node[rng.choice(NAMES)] = node[key]
    else:
        del node[key]
    text = json.dumps(root).encode()
    return text if rng.random() < 0.9 else text.replace(b":", b":" + b"[" * 5000, 1)


def repack(file: Path, rng: random.Random) -> None:
    """Cut, lengthen, exchange or compress records of the zip."""
    with zipfile.ZipFile(file) as archive:
        records = {r.filename: archive.read(r) for r in archive.infolist()}
    name, other = rng.choice(list(records)), rng.choice(list(records))
    content = records[name]
    content = rng.choice((content[: rng.randrange(len(content) + 1)], content * 2, records[other]))
    records[name] = content
    with zipfile.ZipFile(file, "w", rng.choice((0, 0, 0, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def tensors(file: Path, rng: random.Random) -> None:
    """Save other tensors or arguments in a .pth; other files: as `says`."""
    if file.suffix != ".pth":
        return says(file, rng)
    if file.name == "model_args.pth":
        value = rng.choice((*VALUES, "NextDiT_patch0", "NextDiT_patch" + "9" * 5000))
        return torch.save(Namespace(**{rng.choice(("model", "qk_norm")): value}), file)
    state = torch.load(file)
    name = rng.choice(list(state))
    tensor = state[name]
    state[name] = rng.choice(
        [tensor.char, tensor.bool, tensor.cfloat, tensor.flatten, tensor.to_sparse]
        + [lambda: tensor[None], lambda: tensor[:0], lambda: tensor.to("meta")]
        + [lambda: torch.zeros(1).expand(10**6, 10**6), lambda: state.pop(name)]
    )()
    state[rng.choice((name, name, *NAMES))] = state.pop(name)
    torch.save(state, file)


def write(folder: Path, model: NextDiT) -> dict[str, Path]:
    paths = {name: folder / name for name in ("lumina", "diffusers", "original", "pth")}
    for name in ("lumina", "diffusers", "original"):
        checkpoint.save(model, paths[name], format=name)
    paths["pth"].mkdir()
    shutil.copy(paths["original"] / "model_args.pth", paths["pth"])
    torch.save(model.state_dict(), paths["pth"] / "consolidated.00-of-01.pth")
    return paths


def memory(what: str) -> int:
    """Bytes of this process: VmRSS, what it has in memory, or VmHWM, the most since the reset."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if what in x)
    return int(line.split()[1]) * 1024


def attempt(path: Path, expected: dict) -> str:
    """Load one; what came of it. Anything but the documented errors is raised."""
    try:
        loaded = checkpoint.load(path)
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError), repr(error)
        assert "\n" not in str(error) and len(str(error)) < 1000, str(error)
        return type(error).__name__
    state = loaded.state_dict()
    assert {name: (p.shape, p.dtype) for name, p in state.items()} == expected
    return "loaded"


def main(count: int, seed: int) -> None:
    torch.manual_seed(0)
    model, results = NextDiT(CONFIG), Counter(loaded=0, ValueError=0, FileNotFoundError=0)
    expected = {name: (p.shape, p.dtype) for name, p in model.state_dict().items()}
    size, slowest, most = sum(p.nbytes for p in model.parameters()), 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole = write(Path(folder), model)
        for path in whole.values():
            assert attempt(path, expected) == "loaded"
        for i in range(count):
            rng = random.Random(f"{seed} {i}")
            source, path = whole[rng.choice(list(whole))], Path(folder, "damaged")
            shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
            file = rng.choice(sorted(path.iterdir())) if path.is_dir() else path
            change = rng.choice((bits, bits, cut, says, says, tensors))
            change(file, rng)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            Path("/proc/self/clear_refs").write_text("5")  # the most is that from here on
            start, before = time.perf_counter(), memory("VmRSS")
            try:
                results[attempt(path, expected)] += 1
            except BaseException:
                print(f"seed {seed}, file {i}: {source.name}/{file.name}, {change.__name__}")
                raise
            slowest = max(slowest, time.perf_counter() - start)
            most = max(most, memory("VmHWM") - before)
            assert most < 2 * size + SLACK, f"{most} bytes for {size} ({i}, {change.__name__})"
            faulthandler.cancel_dump_traceback_later()
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(json.dumps({**results, "slowest": slowest, "memory / file": most / size}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
