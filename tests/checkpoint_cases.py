"""What the tests of checkpoints share."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lumina.checkpoints import checkpoint, files
from lumina.models.next_dit.config import NextDiTConfig
from lumina.models.next_dit.model import NextDiT

CONFIG = NextDiTConfig(
    dim=48, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=128, cap_feat_dim=32
)
INDEX = "diffusion_pytorch_model.safetensors.index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def network(config=CONFIG, kind=NextDiT, seed=0):
    """A network of random parameters, those that start as 0 or 1 too."""
    model, g = kind(config), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=g))
    return model


def assert_same(state, expected, dtype=None):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == (dtype or tensor.dtype), name
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name


def rewrite(file, change):
    """Apply `change` to the dict of tensors in a safetensors file."""
    with files.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata)


def refused(path, message, kind=ValueError, load=checkpoint.load):
    """`load` raises exactly this kind of error, in one line that has `message`."""
    with pytest.raises(kind) as caught:
        load(path)
    assert type(caught.value) is kind
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
