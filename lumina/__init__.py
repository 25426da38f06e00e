"""A compact, complete Next-DiT (the model of Lumina-Next) and its sampler, on `lumina_kernels`.

model = lumina.load(lumina.COMPACT)
encoder = lumina.load_caption_encoder(lumina.COMPACT)
caption, nothing = encoder(["a red apple"]), encoder([""])
pictures = lumina.sample(model, *caption, *nothing, size=(32, 32)).latents
"""

from lumina.checkpoints.checkpoint import load, load_caption_encoder, save
from lumina.emoji.compact import COMPACT, COMPACT_SETTINGS
from lumina.models.next_dit import reference
from lumina.models.next_dit.config import PRESETS, NextDiTConfig
from lumina.models.next_dit.model import NextDiT
from lumina.models.parts.rope import RopeScaling
from lumina.sampling.context_drop import ContextDrop
from lumina.sampling.guidance import Guidance
from lumina.sampling.sampler import Sample, sample

__all__ = [
    "COMPACT",
    "COMPACT_SETTINGS",
    "PRESETS",
    "ContextDrop",
    "Guidance",
    "NextDiT",
    "NextDiTConfig",
    "RopeScaling",
    "Sample",
    "load",
    "load_caption_encoder",
    "reference",
    "sample",
    "save",
]
