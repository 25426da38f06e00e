"""What `save` writes of a network that something was put around or into, `load` reads back; what it
could not is refused before a file is made."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from checkpoint_cases import CONFIG, assert_same, network
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune

from lumina.checkpoints import checkpoint
from lumina.checkpoints.state import expected_shapes
from lumina.emoji.encoder import CaptionEncoder
from lumina.models.next_dit.model import NextDiT

FORMATS = ("lumina", "diffusers", "original")
NAMES = "NextDiT or Lumina2 or ZImage"
WQ = "layers.0.attention.wq"


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def by_block(wrap):
    def wrapped(model):
        for i, layer in enumerate(model.layers):
            model.layers[i] = wrap(layer)
        return model

    return wrapped


def tied(model):
    model.layers[1].ffn_norm1.weight = model.layers[0].ffn_norm1.weight
    return model


def flat(model):
    """All parameters are views of one vector, as optimisers and FSDP keep them."""
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())
    return model


WRAPS = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "blocks compiled": by_block(compiled),
    "blocks checkpointed": by_block(checkpoint_wrapper),
    "both": lambda model: compiled(by_block(checkpoint_wrapper)(model)),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "in a larger module": lambda model: nn.ModuleDict({"a": nn.Linear(2, 2), "b": model}),
    "tied": tied,
    "flat": flat,
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapped(wrap, tmp_path):
    model = network()
    wrapped = WRAPS[wrap](model)
    expected = network().state_dict()
    if wrap == "tied":
        expected["layers.1.ffn_norm1.weight"] = expected["layers.0.ffn_norm1.weight"]
    for format in FORMATS:
        checkpoint.save(wrapped, tmp_path / format, format=format)
        assert_same(checkpoint.load(tmp_path / format).state_dict(), expected)


def test_shapes_of_any_network():
    for layers in (1, 3, 12):
        config = replace(CONFIG, n_layers=layers)
        state = NextDiT(config).state_dict()
        assert expected_shapes(config) == {name: t.shape for name, t in state.items()}


def test_wrapped_caption_encoder(tmp_path):
    encoder = CaptionEncoder(dim=32, width=16, heads=2)
    path = tmp_path / "w.safetensors"
    checkpoint.save(compiled(network()), path, caption_encoder=compiled(encoder))
    assert_same(checkpoint.load_caption_encoder(path).state_dict(), encoder.state_dict())


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrized(tmp_path):
    """The values that the network computes with are stored, and the network stays as it was."""
    model = network()
    expected = model.state_dict()
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    parametrize.register_parametrization(model.layers[0].attention.wq, "weight", Doubled())
    parametrize.register_parametrization(model, "pad_token", Doubled())
    parametrizations.weight_norm(model.layers[1].attention.wo)
    parametrizations.spectral_norm(model.layers[1].attention.wk)
    before = copy.deepcopy(model.state_dict())
    for format in FORMATS:
        checkpoint.save(model, tmp_path / format, format=format)
        loaded = checkpoint.load(tmp_path / format).state_dict()
        model.eval()
        expected[f"{WQ}.weight"] = model.layers[0].attention.wq.parametrizations.weight.original * 2
        expected["pad_token"] = model.pad_token
        expected["layers.1.attention.wo.weight"] = model.layers[1].attention.wo.weight
        expected["layers.1.attention.wk.weight"] = model.layers[1].attention.wk.weight
        model.train()
        assert_same(loaded, expected)
    assert_same(model.state_dict(), before)


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    model = network()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["wq", "linear"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    path = tmp_path / "w"
    with pytest.raises(ValueError) as caught:
        checkpoint.save(tuned, path)
    assert str(caught.value) == (
        f"{WQ} has an adapter that is not merged, which this format has no place for: "
        "call merge_and_unload() or merge_adapter() first, or save the adapter with PEFT"
    )
    assert not path.exists()
    with tuned.disable_adapter():
        checkpoint.save(tuned, path)
    assert_same(checkpoint.load(path).state_dict(), plain)
    tuned.merge_adapter()
    for format in FORMATS:
        checkpoint.save(tuned, tmp_path / format, format=format)
    merged = tuned.merge_and_unload().state_dict()
    assert not torch.equal(merged[f"{WQ}.weight"], plain[f"{WQ}.weight"])
    for format in FORMATS:
        assert_same(checkpoint.load(tmp_path / format).state_dict(), merged)


# ---- refused


class Packed(torch.Tensor):
    """A subclass that stands for numbers it does not hold, as those of torchao."""


def quantized(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def packed(model):
    linear = model.layers[0].attention.wq
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed), requires_grad=False)
    return model


def pruned(model):
    prune.l1_unstructured(model.layers[0].attention.wq, "weight", 0.5)
    return model


def replaced(model):
    model.layers[0].attention.wq = nn.Sequential(model.layers[0].attention.wq)
    return model


def integers(model):
    weight = model.layers[0].attention.wq.weight.detach().char()
    model.layers[0].attention.wq.weight = nn.Parameter(weight, requires_grad=False)
    return model


def cut(model):
    model.layers = model.layers[:1]
    return model


def wider(model):
    model.layers[0].attention.wq = nn.Linear(48, 96, bias=False)
    return model


def grown(model):
    model.extra = nn.Parameter(torch.zeros(1))
    return model


PLAIN = f"{WQ} must have a plain weight to be saved, got torch.nn.modules"
REFUSED = {
    "quantised": (quantized, "x_embedder must have a plain weight to be saved, got torch.ao.nn.qu"),
    "pruned": (pruned, f"{PLAIN}.linear.Linear: save the network before it is quantised or pruned"),
    "replaced": (replaced, f"{PLAIN}.container.Sequential: save the network before it is"),
    "subclass": (packed, f"{WQ}.weight must be a plain tensor to be saved, got a Packed: save the"),
    "integers": (integers, f"{WQ}.weight must be of floating point to be saved, got torch.int8"),
    "grown": (grown, "extra is not part of a NextDiT, so `load` could not read it back"),
    "cut": (cut, "layers.1.attention must have a plain gate to be saved, got nothing: save"),
    "wider": (wider, f"{WQ}.weight must have shape (48, 48) by the network's config, got (96, 48)"),
    "meta": (lambda m: m.to("meta"), "pad_token must be a plain tensor to be saved, got a tensor "),
    "none": (
        lambda m: m.layers,
        "model must be or contain one NextDiT or Lumina2 or ZImage, got a ModuleList with 0",
    ),
    "two": (
        lambda m: nn.ModuleList([m, network()]),
        f"model must be or contain one {NAMES}, got a ModuleList with 2",
    ),
}


@pytest.mark.filterwarnings("ignore:.*quantization.*is deprecated")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind, format, tmp_path):
    change, message = REFUSED[kind]
    model = change(network())
    with pytest.raises(ValueError) as caught:
        checkpoint.save(model, tmp_path / "w", format=format)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder is a folder, it must be a file or a new name"):
        checkpoint.save(network(), tmp_path / "folder")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="file is a file, it must be a folder or a new name"):
        checkpoint.save(network(), tmp_path / "file", format="diffusers")
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder"]


# ---- several processes

SHARDED = {
    "FSDP2": fully_shard,
    "FSDP2 by block": lambda model: fully_shard(by_block(fully_shard)(model)),
    "FSDP2 compiled": lambda model: compiled(fully_shard(model)),
    "FSDP1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    "DDP": DistributedDataParallel,
}


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        expected = network().state_dict()
        for name, wrap in SHARDED.items():
            model = wrap(network())
            for format in FORMATS if name == "FSDP2" else FORMATS[:1]:
                path = Path(folder, f"{name}-{format}" + (f"-{rank}" if name == "DDP" else ""))
                checkpoint.save(model, path, format=format)
                assert_same(checkpoint.load(path).state_dict(), expected)
            sharded = {type(p).__name__ for p in model.parameters()} == {"DTensor"}
            assert sharded == ("FSDP2" in name), name
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.filterwarnings("ignore")
def test_sharded():
    """Every process calls `save`, one writes, and all can load when it returns."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=2)
        assert not [f for f in Path(folder).rglob("*") if f.name.endswith(".tmp")]
