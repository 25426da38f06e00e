"""A compact, complete Next-DiT (the model of Lumina-Next) and its sampler, on `lumina_kernels`.

model = lumina.load(lumina.COMPACT)
encoder = lumina.load_caption_encoder(lumina.COMPACT)
caption, nothing = encoder(["a red apple"]), encoder([""])
pictures = lumina.sample(model, *caption, *nothing, size=(32, 32)).latents
"""

from pathlib import Path

from lumina.checkpoint import load, load_caption_encoder, save
from lumina.config import PRESETS, NextDiTConfig
from lumina.context import ContextDrop
from lumina.model import NextDiT
from lumina.rope import RopeScaling
from lumina.sampler import Sample, sample

# The model that ships with the package: emoji of 32x32 RGB pixels, from captions in 14 languages.
COMPACT = Path(__file__).with_name("weights") / "compact.safetensors"

# What it draws best with within 20 evaluations, for `sample`; measured by `lumina.evaluate`.
COMPACT_SETTINGS = {"steps": 10, "solver": "midpoint", "schedule": "uniform", "guidance": 3.0}

__all__ = [
    "COMPACT",
    "COMPACT_SETTINGS",
    "PRESETS",
    "ContextDrop",
    "NextDiT",
    "NextDiTConfig",
    "RopeScaling",
    "Sample",
    "load",
    "load_caption_encoder",
    "sample",
    "save",
]
