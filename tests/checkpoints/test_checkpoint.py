"""Checkpoints: every bit comes back, and what is wrong is told before anything is loaded."""

import json
import os
from dataclasses import replace

import pytest
import torch
from checkpoint_cases import CONFIG, INDEX, WEIGHTS, assert_same, network, rewrite
from safetensors.torch import save_file

from lumina.checkpoints import checkpoint, files
from lumina.emoji.encoder import CaptionEncoder
from lumina.models.next_dit import reference
from lumina.models.next_dit.config import NextDiTConfig

# What each format can say; the original's preset names say the patch, its tensors the rest.
CONFIGS = {
    "lumina": [
        CONFIG,
        NextDiTConfig(
            patch_size=1, in_channels=3, dim=36, n_layers=1, n_heads=2, n_kv_heads=1, multiple_of=8,
            ffn_dim_multiplier=1.3, norm_eps=1e-6, qk_norm=False, learn_sigma=False,
            cap_feat_dim=24, rope_theta=256.0, axes=("t", "h", "w"),
        ),
    ],
    "diffusers": [
        CONFIG,
        NextDiTConfig(
            patch_size=1, in_channels=3, dim=32, n_layers=1, n_heads=2, n_kv_heads=2, multiple_of=8,
            ffn_dim_multiplier=1.3, norm_eps=1e-6, qk_norm=False, learn_sigma=False,
            cap_feat_dim=24,
        ),
    ],
    "original": [
        CONFIG,
        NextDiTConfig(
            patch_size=4, in_channels=3, dim=32, n_layers=1, n_heads=2, n_kv_heads=2,
            qk_norm=False, learn_sigma=False, cap_feat_dim=24,
        ),
    ],
}  # fmt: skip
CASES = [(name, config) for name, configs in CONFIGS.items() for config in configs]
CASE_IDS = [f"{name}{i}" for name, configs in CONFIGS.items() for i in range(len(configs))]


# ---- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format, config", CASES, ids=CASE_IDS)
def test_round_trip(format, config, dtype, tmp_path):
    model = network(config).to(dtype)
    checkpoint.save(model, tmp_path / "a" / "b", format=format)
    loaded = checkpoint.load(tmp_path / "a" / "b", dtype=None)
    assert loaded.config == config and not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    assert_same(loaded.state_dict(), model.state_dict())
    files = sorted(f.name for f in (tmp_path / "a").rglob("*") if f.is_file())
    assert len(files) == (1 if format == "lumina" else 2)  # no temporary file stays
    checkpoint.save(loaded, tmp_path / "a" / "b", format=format)  # over the old one, which it maps
    assert_same(checkpoint.load(tmp_path / "a" / "b", dtype=None).state_dict(), model.state_dict())


def test_loaded_network_computes_the_same(tmp_path):
    model = network().eval()
    checkpoint.save(model, tmp_path / "w.safetensors")
    args = torch.randn(2, 4, 4, 6), torch.rand(2), torch.randn(2, 3, 32), torch.ones(2, 3).bool()
    assert checkpoint.load(tmp_path / "w.safetensors", backend="torch").backend == "torch"
    loaded = checkpoint.load(tmp_path / "w.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(*args), model(*args))


@pytest.mark.parametrize("format", ["lumina", "diffusers", "original"])
def test_reference_can_be_saved(format, tmp_path):
    model = network(kind=reference.NextDiT)
    checkpoint.save(model, tmp_path / "w", format=format)
    assert_same(checkpoint.load(tmp_path / "w").state_dict(), model.state_dict())


def test_dtype(tmp_path):
    model, path = network().half(), tmp_path / "w.safetensors"
    checkpoint.save(model, path)
    assert_same(checkpoint.load(path).state_dict(), model.state_dict(), torch.float32)
    as_bfloat16 = checkpoint.load(path, dtype=torch.bfloat16)
    assert_same(as_bfloat16.state_dict(), model.state_dict(), torch.bfloat16)
    rewrite(path, lambda t: t.update(pad_token=t["pad_token"].bfloat16()))
    loaded = checkpoint.load(path, dtype=None)  # what holds float16 and bfloat16 alike
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


# ---- our own file


def test_caption_encoder_in_the_same_file(tmp_path):
    model, encoder = network().half(), CaptionEncoder(dim=32, width=16, heads=2).half()
    path = tmp_path / "w.safetensors"
    checkpoint.save(model, path, caption_encoder=encoder, metadata={"steps": "7"})
    assert files.read_safetensors(path)[1]["steps"] == "7"
    assert_same(checkpoint.load(path, dtype=None).state_dict(), model.state_dict())
    loaded = checkpoint.load_caption_encoder(path, dtype=None)
    assert (loaded.dim, loaded.width, loaded.heads, loaded.training) == (32, 16, 2, False)
    assert_same(loaded.state_dict(), encoder.state_dict())
    captions = ["a cat", ""]
    expected, mask = encoder.float()(captions)
    features, loaded_mask = checkpoint.load_caption_encoder(path)(captions)
    assert torch.equal(features, expected) and torch.equal(loaded_mask, mask)

    rewrite(path, lambda t: t.pop("caption_encoder.qkv.weight"))
    checkpoint.load(path)  # which does not need it
    with pytest.raises(ValueError, match=r"qkv.weight must have shape \(96, 32\), and is missing"):
        checkpoint.load_caption_encoder(path)
    checkpoint.save(model, path)
    with pytest.raises(ValueError, match="holds no caption encoder"):
        checkpoint.load_caption_encoder(path)


@pytest.mark.parametrize("key", ["format", "config", "caption_encoder"])
def test_reserved_metadata(key, tmp_path):
    with pytest.raises(ValueError, match=f"must not have the key '{key}'"):
        checkpoint.save(network(), tmp_path / "w", metadata={key: "x"})
    assert not list(tmp_path.iterdir())


# ---- errors that all formats share


@pytest.fixture(params=["lumina", "diffusers", "original"])
def saved(request, tmp_path):
    """A saved network: what to load, its safetensors file, names of three tensors in there."""
    folder = tmp_path / "w"
    checkpoint.save(network(), folder, format=request.param)
    names = ["layers.1.feed_forward.w2.weight", "final_layer.linear.bias", "t_embedder.mlp.2.bias"]
    if request.param == "diffusers":
        names = [
            "layers.1.feed_forward.linear_2.weight",
            "norm_out.linear_2.bias",
            "time_caption_embed.timestep_embedder.linear_2.bias",
        ]
    file = folder if request.param == "lumina" else next(folder.glob("*.safetensors"))
    return folder, file, names


def test_wrong_tensors(saved):
    path, file, (weight, bias, third) = saved
    whole = file.read_bytes()

    def expect(change, message):
        rewrite(file, change)
        with pytest.raises(ValueError) as caught:
            checkpoint.load(path)
        assert str(caught.value) == f"{file}: {message}"
        file.write_bytes(whole)

    expect(lambda t: t.pop(weight), f"{weight} must have shape (48, 128), and is missing")
    expect(
        lambda t: t.update(extra=torch.zeros(3)), "extra of shape (3,) is not part of this network"
    )
    expect(lambda t: t.update({bias: torch.zeros(5)}), f"{bias} must have shape (32,), got (5,)")
    expect(
        lambda t: t.update({bias: torch.zeros(32, dtype=torch.int32)}),
        f"{bias} must be of floating point, got torch.int32",
    )

    def three(tensors):
        del tensors[weight]
        tensors.update({bias: torch.zeros(32, 1), third: torch.zeros(1)})

    expect(three, f"{weight} must have shape (48, 128), and is missing (and 2 more like this)")


def test_truncated(saved):
    path, file, _ = saved
    whole = file.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{file.name} is damaged or not a safetensors file"):
            checkpoint.load(path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        checkpoint.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        checkpoint.load_caption_encoder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is not a checkpoint: it has neither"):
        checkpoint.load(tmp_path)
    with pytest.raises(ValueError, match="holds no caption encoder"):
        checkpoint.load_caption_encoder(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="neither a config in its metadata nor"):
        checkpoint.load(tmp_path / "a.safetensors")
    checkpoint.save(network(), tmp_path / "d", format="diffusers")
    (tmp_path / "d" / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        checkpoint.load(tmp_path / "d")


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"_class_name": "PixArtTransformer2DModel"},
            "must be of a LuminaNextDiT2DModel or Lumina2Transformer2DModel or ZImage.*, got 'Pix",
        ),
        ({"num_attention_heads": 5}, "dim must be a multiple of n_heads, got 48 and 5"),
        ({"hidden_size": "48"}, "config.json: "),
        ({"norm_eps": 1e-6}, "norm_eps can only be 1e-05 in this format, got 1e-06"),
        ({"num_layers": 3}, "has n_layers=3, the file tensors of 2 layers"),
        ({"num_layers": 1}, r"layers.1.* is not part of this network \(and 25 more"),
    ],
)
def test_wrong_config(fields, message, tmp_path):
    checkpoint.save(network(), tmp_path, format="diffusers")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path)


def test_broken_json(tmp_path):
    checkpoint.save(network(), tmp_path / "d", format="diffusers")
    (tmp_path / "d" / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(ValueError, match="config.json holds no valid JSON"):
        checkpoint.load(tmp_path / "d")
    for config, message in [
        ("", "no valid JSON"),
        ("[]", "JSON object"),
        ('{"depth": 1}', "depth"),
    ]:
        metadata = {"format": "lumina", "config": config}
        save_file(network().state_dict(), tmp_path / "w.safetensors", metadata)
        with pytest.raises(ValueError, match=f"w.safetensors.*{message}"):
            checkpoint.load(tmp_path / "w.safetensors")


def test_no_memory_before_the_check(tmp_path, monkeypatch):
    checkpoint.save(network(), tmp_path / "w")
    rewrite(tmp_path / "w", lambda t: t.pop("pad_token"))
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(ValueError, match="pad_token"):
        checkpoint.load(tmp_path / "w")


# ---- saving


def test_formats_refuse_what_they_cannot_say(tmp_path):
    model = network()
    for config, message in [
        (dict(rope_theta=256.0), "rope_theta can only be 10000.0"),
        (dict(axes=("w",), patch_size=1), "axes can only be"),
        (dict(norm_eps=1e-6), "norm_eps can only be 1e-05"),
    ]:
        model.config = replace(CONFIG, **config)
        for format in ("diffusers", "original"):
            with pytest.raises(ValueError, match=f"{format}: {message}"):
                checkpoint.save(model, tmp_path / "w", format=format)
    model.config = CONFIG
    with pytest.raises(
        ValueError, match="format must be 'lumina', 'diffusers', 'original' or 'comfyui'"
    ):
        checkpoint.save(model, tmp_path / "w", format="gguf")
    with pytest.raises(ValueError, match="'diffusers' has no place for a caption_encoder or metad"):
        checkpoint.save(model, tmp_path / "w", format="diffusers", metadata={"a": "b"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "format, other",
    [
        ("diffusers", INDEX),
        ("diffusers", "model_args.pth"),
        ("original", "consolidated_ema.00-of-01.safetensors"),
        ("original", "consolidated.00-of-02.pth"),
        ("original", "config.json"),
    ],
)
def test_folder_of_another_checkpoint(format, other, tmp_path):
    (tmp_path / other).write_text("old")
    (tmp_path / "README.md").write_text("kept")
    with pytest.raises(ValueError, match=f"must hold no other checkpoint.*{other}"):
        checkpoint.save(network(), tmp_path, format=format)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([other, "README.md"])


@pytest.mark.parametrize("format", ["lumina", "diffusers", "original"])
@pytest.mark.parametrize("crash", ["writing", "before the rename"])
def test_interrupted_save_keeps_the_old(format, crash, tmp_path, monkeypatch):
    old, path = network(seed=1), tmp_path / "w"
    checkpoint.save(old, path, format=format)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}

    def write_half(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    def no_rename(source, target):
        raise OSError("disk full")

    if crash == "writing":
        monkeypatch.setattr(checkpoint, "save_file", write_half)
        monkeypatch.setattr(files, "save_file", write_half)
    else:
        monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(network(seed=2), path, format=format)
    monkeypatch.undo()
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    assert_same(checkpoint.load(path).state_dict(), old.state_dict())


def test_file_is_readable_by_others(tmp_path):
    previous = os.umask(0o022)
    try:
        checkpoint.save(network(), tmp_path / "w")
    finally:
        os.umask(previous)
    assert (tmp_path / "w").stat().st_mode & 0o777 == 0o644
