"""Checkpoints of diffusers and of the original release."""

import argparse
import json
import os
import warnings
from dataclasses import replace

import pytest
import torch
from checkpoint_cases import CONFIG, INDEX, WEIGHTS, assert_same, network, rewrite
from safetensors.torch import load_file, save_file

from lumina.checkpoints import checkpoint, files
from lumina.models.next_dit import original
from lumina.models.next_dit.config import NextDiTConfig
from lumina.models.next_dit.model import NextDiT

# ---- diffusers


def test_sharded_and_pipeline_folder(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = network()
    checkpoint.save(model, tmp_path / "one", format="diffusers")
    theirs = diffusers.LuminaNextDiT2DModel.from_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "pipe" / "transformer", max_shard_size="100KB")
    folder = tmp_path / "pipe" / "transformer"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert_same(checkpoint.load(folder).state_dict(), model.state_dict())
    assert_same(checkpoint.load(tmp_path / "pipe").state_dict(), model.state_dict())

    name = next(iter(load_file(shards[1])))
    rewrite(shards[1], lambda t: t.pop(name))
    with pytest.raises(ValueError, match=f"{shards[1].name} must hold {name}"):
        checkpoint.load(folder)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        checkpoint.load(folder)
    for bad in ({"weight_map": {name: "../" + shards[0].name}}, {"weight_map": [1]}, {}, [1]):
        (folder / INDEX).write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="index.json must"):
            checkpoint.load(folder)


def test_defaults_of_diffusers_config(tmp_path):
    config = NextDiTConfig(dim=64, n_layers=1, n_heads=32, n_kv_heads=32, cap_feat_dim=16)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 4"):
        checkpoint.save(network(config), tmp_path, format="diffusers")
    config = NextDiTConfig(dim=128, n_layers=1, n_heads=32, n_kv_heads=32, cap_feat_dim=16)
    checkpoint.save(network(config), tmp_path, format="diffusers")
    stored = json.loads((tmp_path / "config.json").read_text())
    for name in ("patch_size", "in_channels", "num_attention_heads", "num_kv_heads", "multiple_of"):
        del stored[name]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert checkpoint.load(tmp_path).config == config


@pytest.mark.parametrize("name", ["to_q.weight", "norm_q.weight", "norm_q.bias"])
def test_differing_copies_of_the_query(name, tmp_path):
    checkpoint.save(network(), tmp_path, format="diffusers")

    def change(tensors):
        tensors[f"layers.1.attn2.{name}"].flatten()[-1] += 1

    rewrite(tmp_path / WEIGHTS, change)
    with pytest.raises(ValueError, match=f"layers.1.attn2.{name} must be a copy of layers.1.attn1"):
        checkpoint.load(tmp_path)


# ---- the original release


@pytest.mark.parametrize(
    "name, config",
    [
        ("NextDiT_2B_GQA_patch2", NextDiTConfig()),
        ("NextDiT_2B_patch2", NextDiTConfig(n_kv_heads=32)),
        ("NextDiT_patch2", NextDiTConfig(dim=3072, n_layers=1)),
        ("NextDiT_patch2", NextDiTConfig(dim=4096, n_layers=1, in_channels=16, learn_sigma=False)),
    ],
)
def test_original_sizes_come_from_shapes(name, config):
    with torch.device("meta"):
        state = NextDiT(config).state_dict()
    assert original.model_args(config).model == name
    assert original.config_from_shapes("here", state, name) == config


@pytest.mark.parametrize("hidden", [1, 97, 128, 129, 160, 191, 192, 250, 256, 999])
def test_original_ffn_of_any_width(hidden):
    multiple, multiplier = files.ffn_rounding(128, hidden)
    config = replace(CONFIG, multiple_of=multiple, ffn_dim_multiplier=multiplier)
    assert config.ffn_dim == hidden
    assert (multiplier is None) == (hidden in (128, 256))


def split(state, ranks):
    """The shards of tensor parallelism, by the layers' classes in the release."""
    column = "x_embedder mlp.0 cap_embedder.1 adaLN_modulation.1 wq wk wv wk_y wv_y w1 w3 linear"
    shards = [{} for _ in range(ranks)]
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if kind == "gate" or module.endswith(("q_norm", "k_norm", "ky_norm")):
            axis = 0  # as many as the rank has heads
        elif module.endswith(tuple(column.split())):
            axis = 0
        elif module.endswith(("wo", "w2", "mlp.2")) and kind == "weight":
            axis = 1
        else:
            axis = None
        for rank, shard in enumerate(shards):
            part = tensor if axis is None else tensor.chunk(ranks, axis)[rank]
            shard[name] = part.contiguous().clone()
    return shards


def write_original(folder, state, *, ranks=1, stem="consolidated", suffix=".pth", **args):
    folder.mkdir(exist_ok=True)
    args = {"model": "NextDiT_2B_GQA_patch2", "qk_norm": True, "lr": 1e-4, "resume": None, **args}
    torch.save(argparse.Namespace(**args), folder / "model_args.pth")
    for rank, shard in enumerate(split(state, ranks)):
        file = folder / f"{stem}.{rank:02d}-of-{ranks:02d}{suffix}"
        torch.save(shard, file) if suffix == ".pth" else save_file(shard, file)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_original_tensor_parallel(suffix, tmp_path):
    state = network().state_dict()
    write_original(tmp_path, state, ranks=2, suffix=suffix)
    with pytest.warns(UserWarning, match="over the heads of one shard") as caught:
        loaded = checkpoint.load(tmp_path)
    assert caught[0].filename == __file__
    assert loaded.config == CONFIG
    assert_same(loaded.state_dict(), state)

    (tmp_path / f"consolidated.01-of-02{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match="consolidated.01-of-02"):
        checkpoint.load(tmp_path)


def test_original_shards_that_do_not_fit(tmp_path):
    state = network().state_dict()
    write_original(tmp_path, state, ranks=2, suffix=".safetensors")
    second = tmp_path / "consolidated.01-of-02.safetensors"
    whole = second.read_bytes()
    warnings.simplefilter("ignore")

    def expect(change, message):
        rewrite(second, change)
        with pytest.raises(ValueError, match=message):
            checkpoint.load(tmp_path)
        second.write_bytes(whole)

    expect(lambda t: t["pad_token"].add_(1), "pad_token must be the same in .*00-of-02.* and .*01-")
    expect(lambda t: t.pop("pad_token"), "only one of them has pad_token")
    wq = "layers.0.attention.wq.weight"
    expect(
        lambda t: t.update({wq: torch.zeros(7, 48)}),
        r"wq.weight must have one shape.*24, 48.*7, 48",
    )
    second.rename(tmp_path / "consolidated.01-of-03.safetensors")
    with pytest.raises(ValueError, match="of 2 and of 3 ranks"):
        checkpoint.load(tmp_path)


def test_original_choice_of_average(tmp_path):
    last, average = network(seed=1).state_dict(), network(seed=2).state_dict()
    write_original(tmp_path, last)
    assert_same(checkpoint.load(tmp_path).state_dict(), last)
    with pytest.raises(FileNotFoundError, match="no consolidated_ema"):
        checkpoint.load(tmp_path, ema=True)
    write_original(tmp_path, average, stem="consolidated_ema")
    assert_same(checkpoint.load(tmp_path).state_dict(), average)
    assert_same(checkpoint.load(tmp_path, ema=True).state_dict(), average)
    assert_same(checkpoint.load(tmp_path, ema=False).state_dict(), last)
    write_original(tmp_path, last, stem="consolidated_ema", suffix=".safetensors")
    assert_same(checkpoint.load(tmp_path).state_dict(), last)  # safetensors before .pth

    checkpoint.save(network(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="ema=True is for original folders"):
        checkpoint.load(tmp_path / "w.safetensors", ema=True)


def test_original_arguments_that_do_not_fit(tmp_path):
    state = network().state_dict()
    write_original(tmp_path, state, qk_norm=False)
    with pytest.raises(ValueError, match="says qk_norm=False, the tensors of .* say True"):
        checkpoint.load(tmp_path)
    write_original(tmp_path, state, model="NextDiT_2B_patch3")
    with pytest.raises(ValueError, match=r"no Next-DiT with 3x3 patches.*\(48, 16\)"):
        checkpoint.load(tmp_path)
    state["layers.0.attention.gate"] = torch.zeros(4, 1)
    write_original(tmp_path, state)
    with pytest.raises(ValueError, match=r"attention.gate with 1 dimensions, got \(4, 1\)"):
        checkpoint.load(tmp_path)
    torch.save({"model": "x"}, tmp_path / "model_args.pth")
    with pytest.raises(ValueError, match="model_args.pth must hold a Namespace, got dict"):
        checkpoint.load(tmp_path)
    (tmp_path / "consolidated.00-of-01.pth").unlink()
    torch.save(argparse.Namespace(model="x"), tmp_path / "model_args.pth")
    with pytest.raises(FileNotFoundError, match="no consolidated.00-of-0N"):
        checkpoint.load(tmp_path)


class Foreign:
    """What a file could run when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["model_args.pth", "consolidated.00-of-01.pth"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_foreign_pickles_are_refused(where, wrapped, tmp_path):
    write_original(tmp_path, network().state_dict())
    evil = Foreign(f"touch {tmp_path}/ran")
    if wrapped:
        evil = argparse.Namespace(model=evil) if where.startswith("model") else {"w": evil}
    torch.save(evil, tmp_path / where)
    with pytest.raises(ValueError, match=f"{where} holds a pickled .*system, which can run code"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_namespace_only_in_model_args(tmp_path):
    write_original(tmp_path, network().state_dict())
    torch.save(argparse.Namespace(), tmp_path / "consolidated.00-of-01.pth")
    with pytest.raises(ValueError, match="holds a pickled argparse.Namespace"):
        checkpoint.load(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "consolidated.00-of-01.pth")
    with pytest.raises(ValueError, match="must hold tensors by name, got list"):
        checkpoint.load(tmp_path)


def test_truncated_pth(tmp_path):
    write_original(tmp_path, network().state_dict())
    for file in (tmp_path / "consolidated.00-of-01.pth", tmp_path / "model_args.pth"):
        whole = file.read_bytes()
        for size in (0, 100, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=f"{file.name} "):
                checkpoint.load(tmp_path)
        file.write_bytes(whole)
