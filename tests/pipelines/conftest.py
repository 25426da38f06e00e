"""Tiny checkpoints of the three families, and pipelines of them: ours, and diffusers'."""

import importlib.util
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import lumina.pipelines

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OURS = {"lumina_next": "LuminaPipeline", "lumina2": "Lumina2Pipeline", "z_image": "ZImagePipeline"}
NETWORKS = {
    "lumina_next": diffusers.LuminaNextDiT2DModel,
    "lumina2": diffusers.Lumina2Transformer2DModel,
    "z_image": diffusers.ZImageTransformer2DModel,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny():
    """examples/tiny_checkpoint.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "tiny_checkpoint", EXAMPLES / "tiny_checkpoint.py"
    )
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Made(dict):
    """Made when it is first asked for."""

    def __init__(self, make):
        self.make = make

    def __missing__(self, family):
        self[family] = self.make(family)
        return self[family]


@pytest.fixture(scope="session")
def folders(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return Made(lambda family: tiny.write(family, root / family))


@pytest.fixture(scope="session")
def ours(folders):
    """Our pipeline of each family; a test that changes one must change it back."""

    def make(family):
        pipe = lumina.pipelines.Pipeline.from_pretrained(folders[family])
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return Made(make)


@pytest.fixture(scope="session")
def theirs(folders, ours):
    """diffusers' pipelines of the same text encoder, tokenizer and VAE objects."""

    def make(family):
        parts = {name: getattr(ours[family], name) for name in ("text_encoder", "tokenizer", "vae")}
        transformer = NETWORKS[family].from_pretrained(folders[family] / "transformer").eval()
        scheduler = type(ours[family].scheduler).from_config(ours[family].scheduler.config)
        kind = getattr(diffusers, OURS[family])
        pipe = kind(transformer=transformer, scheduler=scheduler, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return Made(make)
