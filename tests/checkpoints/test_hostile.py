"""Files that are damaged, odd or made to harm: one line of ValueError or FileNotFoundError, before
anything is built or allocated."""

import json
import os
import struct
import warnings

import pytest
import torch
from checkpoint_cases import CONFIG, INDEX, WEIGHTS, network, refused, rewrite
from safetensors.torch import save_file

from lumina.checkpoints import checkpoint
from lumina.emoji.encoder import CaptionEncoder
from lumina.models.next_dit.config import NextDiTConfig


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("allocated"))


# ---- configs

WRONG = [
    *[(n, v) for n in ("dim", "n_layers", "n_heads") for v in ("48", None, 48.0, True, [], 0, -1)],
    *[("multiple_of", v) for v in (10**30, 1e308, float("nan"), float("inf"), {}, "x" * 10**6)],
    *[(n, v) for n in ("norm_eps", "rope_theta") for v in ("x", None, -1, 1e308, float("nan"))],
    *[(n, v) for n in ("norm_eps", "rope_theta") for v in (True, 10**400, float("inf"), [1])],
    ("rope_theta", 1),
    *[("ffn_dim_multiplier", v) for v in ("x", 0, -1, 1e308, 1e-300, float("nan"), 10**400, True)],
    *[(n, v) for n in ("qk_norm", "learn_sigma") for v in ("false", None, 1, 0.0, [])],
    *[("axes", v) for v in ("hw", None, 3, ["h"], [["h", "w"]], [1, 2], {"h": 1}, ["w", "h"])],
]


@pytest.mark.parametrize("name, value", WRONG, ids=lambda v: repr(v)[:12])
def test_values_of_the_config(name, value, tmp_path):
    """Of a wrong type or range: refused by the class, and by `load` with the name of the file."""
    with pytest.raises(ValueError, match=f"^{name} ") as caught:
        NextDiTConfig(**{**CONFIG.__dict__, name: value})
    text = json.dumps({**CONFIG.__dict__, name: value})
    metadata = {"format": "lumina", "config": text}
    save_file(network().state_dict(), tmp_path / "w", metadata)
    refused(tmp_path / "w", f"{tmp_path}/w: {caught.value}")


@pytest.mark.parametrize(
    "fields",
    [
        dict(n_layers=2**24),
        dict(dim=2**21),
        dict(multiple_of=2**24),
        dict(cap_feat_dim=2**24),
        dict(in_channels=2**20),
        dict(ffn_dim_multiplier=2.0**16),
    ],
)
def test_sizes_that_the_file_does_not_have(fields, tmp_path):
    metadata = {"format": "lumina", "config": json.dumps({**CONFIG.__dict__, **fields})}
    save_file(network().state_dict(), tmp_path / "w", metadata)
    refused(tmp_path / "w", "n_layers=16777216" if "n_layers" in fields else "must have shape")


@pytest.mark.parametrize("fields", [dict(patch_size=2**13), dict(ffn_dim_multiplier=2.0**24)])
def test_widths_beyond_64_bits(fields):
    with pytest.raises(ValueError, match=r"must lie in \[1, 16777216\], got "):
        NextDiTConfig(**{**CONFIG.__dict__, **fields})


def test_numbers_of_other_libraries():
    numpy = pytest.importorskip("numpy")
    config = NextDiTConfig(dim=numpy.int64(96), n_heads=numpy.int32(8), norm_eps=numpy.float32(0.5))
    assert (config.dim, config.norm_eps) == (96, 0.5)
    assert (type(config.dim), type(config.norm_eps)) == (int, float)


BAD_JSON = {
    "deep": "[" * 10**5,
    "deep object": '{"a":' * 10**5,
    "long number": f'{{"dim": {"9" * 10**4}}}',
    "not utf-8": b'{"a": "\xff\xfe"}',
    "list": "[]",
    "empty": "",
    "line break": '{"a\\nb": 1}',
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json(kind, tmp_path):
    text = BAD_JSON[kind]
    if isinstance(text, str):
        save_file(network().state_dict(), tmp_path / "w", {"format": "lumina", "config": text})
        refused(tmp_path / "w", str(tmp_path / "w"))
    checkpoint.save(network(), tmp_path / "d", format="diffusers")
    text = text.encode() if isinstance(text, str) else text
    for file in ("config.json", INDEX):
        (tmp_path / "d" / file).write_bytes(text)
        refused(tmp_path / "d", str(tmp_path / "d" / file))
        (tmp_path / "d" / "config.json").write_text(json.dumps({"_class_name": "X"}))
        refused(tmp_path / "d", "or ZImageTransformer2DModel, got 'X'")
        checkpoint.save(network(), tmp_path / "e", format="diffusers")
        os.replace(tmp_path / "e" / "config.json", tmp_path / "d" / "config.json")


def test_deep_value_under_a_known_name(tmp_path):
    checkpoint.save(network(), tmp_path / "d", format="diffusers")
    file = tmp_path / "d" / "config.json"
    for depth in (100, 500, 900, 990):
        file.write_text('{"_class_name": %s}' % ("[" * depth + "]" * depth))
        refused(tmp_path / "d", "config.json")


def test_places_of_the_config(tmp_path):
    checkpoint.save(network(), tmp_path / "d", format="diffusers")
    file = tmp_path / "d" / "config.json"
    text = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    refused(tmp_path / "d", "config.json is not a regular file", FileNotFoundError)
    file.unlink()
    file.symlink_to("/dev/zero")
    refused(tmp_path / "d", "config.json is not a regular file", FileNotFoundError)
    file.unlink()
    (tmp_path / "other.json").write_bytes(text)
    file.symlink_to(tmp_path / "other.json")
    refused(tmp_path / "d", f"must lie in {tmp_path / 'd'}, and is a link out of it")
    file.unlink()
    file.write_bytes(text + b" " * 2**24)
    refused(tmp_path / "d", "config.json must be at most 16777216 bytes, got")


def test_cache_of_hugging_face(tmp_path, monkeypatch):
    """There all files of a snapshot are links to blobs."""
    monkeypatch.undo()
    folder, blobs = tmp_path / "snapshots" / "abc" / "transformer", tmp_path / "blobs"
    checkpoint.save(network(), folder, format="diffusers")
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(f"../../../blobs/{i}")
    assert checkpoint.load(folder).config == checkpoint.load(folder.parent).config == CONFIG


def test_index_with_odd_places(tmp_path):
    checkpoint.save(network(), tmp_path, format="diffusers")
    for place in (5, None, ["a"], "/etc/passwd", "../w", "a/b"):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": place, "b": "c"}}))
        refused(tmp_path, "must map tensors to files beside it")
    for place in ("..", "", "a\0b", "x" * 200):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": place}}))
        with pytest.raises((ValueError, FileNotFoundError)):
            checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(dim=10**30),
        dict(dim=2**24),
        dict(heads=0),
        dict(heads=3),
        dict(width=16.0),
        dict(width="16"),
        dict(extra=1),
        dict(dim=[[1]]),
    ],
    ids=str,
)
def test_sizes_of_the_caption_encoder(sizes, tmp_path):
    encoder = CaptionEncoder(dim=32, width=16, heads=2)
    tensors = {f"caption_encoder.{name}": t for name, t in encoder.state_dict().items()}
    text = json.dumps({"dim": 32, "width": 16, "heads": 2, **sizes})
    save_file(tensors, tmp_path / "w", {"format": "lumina", "caption_encoder": text})
    message = "must have shape" if sizes == dict(dim=2**24) else "no sizes of a caption encoder"
    refused(tmp_path / "w", message, load=checkpoint.load_caption_encoder)


# ---- safetensors


def header(fields, data=b""):
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS = {
    "absurd length": struct.pack("<Q", 2**63) + b"{}",
    "length beyond the file": struct.pack("<Q", 10**9) + b"{}",
    "cut": struct.pack("<Q", 10)[:5],
    "deep": header(b"[" * 10**5),
    "not utf-8": header(b'{"\xff": 1}'),
    "overlap": header({"a": ONE, "b": ONE}, b"\0" * 4),
    "gap": header({"a": {**ONE, "data_offsets": [4, 8]}}, b"\0" * 8),
    "trailing": header({"a": ONE}, b"\0" * 8),
    "beyond": header({"a": {**ONE, "data_offsets": [0, 2**62]}}, b"\0" * 4),
    "backwards": header({"a": {**ONE, "data_offsets": [4, 0]}}, b"\0" * 4),
    "twice": header(b'{"a": %s, "a": %s}' % (2 * (json.dumps(ONE).encode(),)), b"\0" * 4),
    "unknown dtype": header({"a": {**ONE, "dtype": "F33"}}, b"\0" * 4),
    "product overflows": header({"a": {**ONE, "shape": [2**40, 2**40]}}, b"\0" * 4),
    "negative": header({"a": {**ONE, "shape": [-1]}}, b"\0" * 4),
    "side of 64 bits": header(
        {"a": {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}}
    ),
    "metadata": header({"__metadata__": {"format": 3}}),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers(kind, tmp_path):
    (tmp_path / "w").write_bytes(HEADERS[kind])
    refused(tmp_path / "w", "w is damaged or not a safetensors file: ")
    if kind == "twice":
        refused(tmp_path / "w", "its header has a twice")


@pytest.mark.parametrize("dtype", ["I8", "U64", "BOOL", "C64", "F4", "F8_E8M0"])
def test_dtypes_that_are_no_weights(dtype, tmp_path):
    model = network()
    checkpoint.save(model, tmp_path / "w")
    raw = (tmp_path / "w").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    fields, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    start, end = fields["pad_token"]["data_offsets"]
    bits = {"F4": 4, "C64": 64, "U64": 64}.get(dtype, 8)
    fields["pad_token"].update(dtype=dtype, shape=[(end - start) * 8 // bits])
    (tmp_path / "w").write_bytes(header(fields, data))
    refused(tmp_path / "w", "pad_token must ")
    if dtype in ("I8", "BOOL", "F8_E8M0"):
        rewrite(tmp_path / "w", lambda t: t.update(pad_token=t["pad_token"][:48].clone()))
        refused(tmp_path / "w", "pad_token must be of floating point, got torch.")


def test_names_with_line_breaks(tmp_path):
    checkpoint.save(network(), tmp_path / "w")
    rewrite(tmp_path / "w", lambda t: t.update({"a\nb" * 1000: torch.zeros(1)}))
    refused(tmp_path / "w", "of shape (1,) is not part of this network")


# ---- what is there instead


def test_names_what_is_there(tmp_path):
    checkpoint.save(network(), tmp_path, format="diffusers")
    (tmp_path / WEIGHTS).rename(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    there = f"; {tmp_path} has diffusion_pytorch_model.fp16.safetensors"
    refused(tmp_path, f"{WEIGHTS} does not exist{there}", FileNotFoundError)
    refused(tmp_path / "w", f"w does not exist{there}", FileNotFoundError)
    (tmp_path / "config.json").unlink()
    refused(tmp_path, there)
    for name in ("a.bin", "b.pth", "c.ckpt", "d.pt"):
        (tmp_path / name).touch()
    refused(tmp_path, "has a.bin, b.pth, c.ckpt, d.pt and 1 more")


# ---- NaN


@pytest.mark.parametrize("format", ["lumina", "diffusers", "original"])
def test_nan_throughout_warns(format, tmp_path, monkeypatch):
    """A network that diverged is saved and loaded as it is, and `load` says so."""
    monkeypatch.undo()
    model = network()
    model.layers[0].attention.wq.weight.data.fill_(float("nan"))
    model.layers[1].attention.wq.weight.data[0, 0] = float("nan")
    checkpoint.save(model, tmp_path / "w", format=format)
    with pytest.warns(UserWarning) as caught:
        loaded = checkpoint.load(tmp_path / "w")
    file = next(f for f in (tmp_path / "w", *(tmp_path / "w").glob("*.safetensors")) if f.is_file())
    assert [str(w.message) for w in caught] == [
        f"{file}: layers.0.attention.wq.weight is NaN throughout"
    ]
    assert caught[0].filename == __file__
    assert loaded.layers[0].attention.wq.weight.isnan().all()
    model.layers[0].attention.wq.weight.data[-1, -1] = 0
    checkpoint.save(model, tmp_path / "w", format=format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.load(tmp_path / "w")


def test_eight_bits(tmp_path, monkeypatch):
    """Weights of 8 bits are read; beside others, None takes what holds both."""
    monkeypatch.undo()
    model = network()
    model.layers[0].to(torch.float8_e4m3fn)
    checkpoint.save(model, tmp_path / "w")
    assert checkpoint.load(tmp_path / "w", dtype=None).dtype == torch.float32
    weight = model.layers[0].attention.wq.weight
    assert torch.equal(
        checkpoint.load(tmp_path / "w").layers[0].attention.wq.weight, weight.float()
    )
    model.half().layers[0].to(torch.float8_e5m2)
    checkpoint.save(model, tmp_path / "w")
    assert checkpoint.load(tmp_path / "w", dtype=None).dtype == torch.float16
