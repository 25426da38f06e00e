"""Lumina-Image 2.0 and Z-Image on disk: formats bit for bit, and diffusers' classes on them."""

import json
from dataclasses import replace

import pytest
import torch
from common import DEVICE
from diffusers import Lumina2Transformer2DModel, ZImageTransformer2DModel
from joint_networks import CONFIGS, NETWORKS, inputs
from networks import cast, randomise
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import lumina
from lumina.cli import main

FORMATS = ("lumina", "diffusers", "original", "comfyui")
THEIRS = {"lumina2": Lumina2Transformer2DModel, "z_image": ZImageTransformer2DModel}


def network(name, dtype=torch.float32):
    torch.manual_seed(3)
    ours = randomise(NETWORKS[type(CONFIGS[name])](CONFIGS[name]), dtype)
    return ours.to(dtype).eval().requires_grad_(False)


def path_of(folder, format):
    return folder / "file.safetensors" if format in ("lumina", "comfyui") else folder / "folder"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name, format, dtype, tmp_path):
    ours, path = network(name, dtype), path_of(tmp_path, format)
    lumina.save(ours, path, format=format)
    back = lumina.load(path, dtype=None)
    assert type(back) is type(ours)
    sizes, expected = vars(back.config).copy(), vars(ours.config).copy()
    if format == "original" or format == "comfyui":  # these say the width itself
        for config in (sizes, expected):
            for field in ("multiple_of", "ffn_dim_multiplier", "axes_lens"):
                config.pop(field, None)
        assert back.config.ffn_dim == ours.config.ffn_dim
    assert sizes == expected
    state = back.state_dict()
    assert state.keys() == ours.state_dict().keys()
    for key, tensor in ours.state_dict().items():
        assert state[key].dtype == dtype and torch.equal(state[key], tensor), key


def their_output(theirs, x, t, feats, mask):
    if isinstance(theirs, Lumina2Transformer2DModel):
        return theirs(x, t, feats, mask.long(), return_dict=False)[0]
    texts = [f[m] for f, m in zip(feats, mask, strict=True)]
    out = theirs([xi[:, None] for xi in x], t, texts, return_dict=False)[0]
    return torch.stack([z[:, 0] for z in out])


@pytest.mark.parametrize("pattern", ["all", "some"])
@pytest.mark.parametrize("name", ["lumina2", "z_image"])
def test_diffusers_computes_the_same(name, pattern, tmp_path):
    """What `save` writes, diffusers' class reads, and its velocity is ours; and the way back."""
    ours = network(name)
    lumina.save(ours, tmp_path / "ours", format="diffusers")
    theirs = THEIRS[name].from_pretrained(tmp_path / "ours").to(DEVICE).eval()
    assert not set(json.loads((tmp_path / "ours/config.json").read_text())) ^ {
        key for key in theirs.config if key not in ("sample_size", "scaling_factor", "out_channels")
        and (key == "_class_name" or not key.startswith("_"))
    }  # fmt: skip
    x, t, feats, mask = cast(inputs((8, 12)), torch.float32)
    mask = torch.ones_like(mask) if pattern == "all" else mask.sort(descending=True)[0]
    with torch.no_grad():
        expected = their_output(theirs, x, t, feats, mask)
        out = ours.to(DEVICE)(x, t, feats, mask)
        error = (out - expected).abs().max() / expected.square().mean().sqrt()
        assert error <= 2e-5, error
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
        again = lumina.load(tmp_path / "theirs", device=DEVICE)(x, t, feats, mask)
    assert (tmp_path / "theirs/diffusion_pytorch_model.safetensors.index.json").exists()
    assert torch.equal(again, out)


def test_comfyui_all_in_one(tmp_path):
    """A file with a text encoder and a VAE beside the network, and one without any prefix."""
    ours, file = network("z_image"), tmp_path / "all.safetensors"
    state = ours.state_dict()
    more = {"vae.decoder.conv_in.weight": torch.ones(2), "text_encoders.x.weight": torch.ones(3)}
    save_file({**{f"model.diffusion_model.{k}": v for k, v in state.items()}, **more}, file)
    save_file({**state, "norm_final.weight": torch.ones(96)}, tmp_path / "alone.safetensors")
    for path in (file, tmp_path / "alone.safetensors"):
        back = lumina.load(path).state_dict()
        assert (
            all(torch.equal(back[k], v) for k, v in state.items()) and back.keys() == state.keys()
        )


def test_original_file_of_the_release(tmp_path):
    """The released script loads strictly: its unused norm is there, and is not read."""
    lumina.save(network("lumina2"), tmp_path / "o", format="original")
    state = load_file(tmp_path / "o/consolidated.00-of-01.safetensors")
    assert torch.equal(state["norm_final.weight"], torch.ones(96))
    assert state["layers.0.attention.qkv.weight"].shape == (96 + 2 * 48, 96)


@pytest.mark.parametrize(
    "name, format, change, message",
    [
        ("lumina2", "diffusers", dict(out_channels=8), "out_channels must be null or equal in_ch"),
        ("lumina2", "diffusers", dict(axes_dim_rope=[8, 8, 6]), "axes_dims must be even and add"),
        ("lumina2", "diffusers", dict(axes_dim_rope="888"), "axes_dims must be three positive"),
        ("lumina2", "diffusers", dict(num_refiner_layers=3), "n_refiner_layers=3, the file tens"),
        ("lumina2", "diffusers", dict(num_layers=10**6), "has n_layers=1000000, the file tensors"),
        ("z_image", "diffusers", dict(siglip_feat_dim=8), "siglip_feat_dim can only be None"),
        (
            "z_image",
            "diffusers",
            dict(all_patch_size=[2, 4]),
            "all_patch_size must be a list of one",
        ),
        ("z_image", "diffusers", dict(qk_norm=False), "qk_norm can only be True in a ZImage"),
        ("z_image", "diffusers", dict(n_kv_heads=1), "n_kv_heads can only be 3 in this format"),
        ("z_image", "diffusers", dict(t_scale="x"), "t_scale must be a number"),
    ],
)
def test_refused_configs(name, format, change, message, tmp_path):
    lumina.save(network(name), tmp_path, format=format)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        lumina.load(tmp_path)


def test_refused_files(tmp_path):
    ours = network("lumina2")
    lumina.save(ours, tmp_path / "d", format="diffusers")
    file = tmp_path / "d/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["layers.1.attn.to_k.weight"] = state["layers.1.attn.to_k.weight"].half()
    save_file(state, file)
    with pytest.raises(
        ValueError, match="to_q.weight and layers.1.attn.to_k.weight must have one d"
    ):
        lumina.load(tmp_path / "d")
    state["layers.1.attn.to_k.weight"] = torch.zeros(47, 96)
    save_file(state, file)
    with pytest.raises(ValueError, match=r"to_k.weight must have shape \(48, 96\), got \(47, 96\)"):
        lumina.load(tmp_path / "d")
    extra = {**ours.state_dict(), "clip_text_pooled_proj.0.weight": torch.ones(3)}
    save_file(extra, tmp_path / "newbie.safetensors")
    with pytest.raises(ValueError, match="clip_text_pooled_proj.* is not part of this network"):
        lumina.load(tmp_path / "newbie.safetensors")
    with pytest.raises(ValueError, match="ComfyUI has no NextDiT"):
        lumina.save(lumina.load(lumina.COMPACT), tmp_path / "x.safetensors", format="comfyui")


@pytest.mark.parametrize("name", ["lumina2", "z_image"])
def test_info(name, tmp_path, capsys):
    """The command line tells sizes and FLOPs, as PyTorch counts those of a forward."""
    ours = network(name)
    lumina.save(ours, tmp_path / "w.safetensors")
    assert main(["info", str(tmp_path / "w.safetensors"), "--size", "8x4", "--text", "35"]) == 0
    said = capsys.readouterr().out
    x, t = torch.zeros(1, 4, 4, 8), torch.zeros(1)
    with FlopCounterMode(display=False) as counter:
        ours(x, t, torch.zeros(1, 35, 20), torch.ones(1, 35).bool())
    assert f"{counter.get_total_flops() / 1e9:.3f} GFLOP" in said
    assert f"parameters {sum(p.numel() for p in ours.parameters()):,}" in said


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("z_image", dict(axes_dims=(16, 8, 8)), r"axes_dims can only be \(8, 12, 12\)"),
        ("z_image", dict(rope_theta=1e4), "rope_theta can only be 256.0 .* got 10000.0"),
        ("z_image", dict(t_scale=1.0), "t_scale can only be 1000.0"),
        ("z_image", dict(patch_size=4, in_channels=4), "patch_size can only be 2"),
        ("lumina2", dict(axes_dims=(12, 8, 4)), r"axes_dims can only be \(8, 8, 8\)"),
        ("lumina2", dict(norm_eps=1e-3), "norm_eps can only be 1e-05"),
        ("lumina2", dict(rope_theta=100.0), "rope_theta can only be 10000.0"),
    ],
)
def test_comfyui_has_no_place_for(name, change, message, tmp_path):
    config = replace(CONFIGS[name], **change)
    with pytest.raises(ValueError, match=message):
        lumina.save(NETWORKS[type(config)](config), tmp_path / "x", format="comfyui")
    assert not (tmp_path / "x").exists()
