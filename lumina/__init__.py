"""The Lumina family of diffusion transformers and its sampler, on `lumina_kernels`.

model = lumina.load(lumina.COMPACT)
encoder = lumina.load_caption_encoder(lumina.COMPACT)
caption, nothing = encoder(["a red apple"]), encoder([""])
pictures = lumina.sample(model, *caption, *nothing, size=(32, 32)).latents
lumina.save_picture(pictures, "apple.png")
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lumina.checkpoints.checkpoint import load, load_caption_encoder, save
    from lumina.emoji.compact import COMPACT, COMPACT_SETTINGS
    from lumina.emoji.pictures import save_picture
    from lumina.models.families import PRESETS
    from lumina.models.lumina2.config import Lumina2Config
    from lumina.models.lumina2.model import Lumina2
    from lumina.models.next_dit import reference
    from lumina.models.next_dit.config import NextDiTConfig
    from lumina.models.next_dit.model import NextDiT
    from lumina.models.parts.rope import RopeScaling
    from lumina.models.z_image.config import ZImageConfig
    from lumina.models.z_image.model import ZImage
    from lumina.pipelines import Pipeline as Pipeline
    from lumina.sampling.context_drop import ContextDrop
    from lumina.sampling.guidance import Guidance
    from lumina.sampling.regions import place_captions
    from lumina.sampling.sampler import Sample, sample

# Imported when first used: PyTorch takes seconds, in which the command line has to hear Ctrl-C.
_MODULES = {
    "COMPACT": "emoji.compact",
    "COMPACT_SETTINGS": "emoji.compact",
    "Lumina2": "models.lumina2.model",
    "Lumina2Config": "models.lumina2.config",
    "PRESETS": "models.families",
    "ContextDrop": "sampling.context_drop",
    "Guidance": "sampling.guidance",
    "NextDiT": "models.next_dit.model",
    "NextDiTConfig": "models.next_dit.config",
    "RopeScaling": "models.parts.rope",
    "Sample": "sampling.sampler",
    "ZImage": "models.z_image.model",
    "ZImageConfig": "models.z_image.config",
    "load": "checkpoints.checkpoint",
    "load_caption_encoder": "checkpoints.checkpoint",
    "place_captions": "sampling.regions",
    "reference": "models.next_dit.reference",
    "sample": "sampling.sampler",
    "save": "checkpoints.checkpoint",
    "save_picture": "emoji.pictures",
}
# Need libraries that the others do without: `from lumina import *` does not bring them.
_OPTIONAL = {"Pipeline": "pipelines"}

__all__ = [
    "COMPACT",
    "COMPACT_SETTINGS",
    "PRESETS",
    "ContextDrop",
    "Guidance",
    "Lumina2",
    "Lumina2Config",
    "NextDiT",
    "NextDiTConfig",
    "RopeScaling",
    "Sample",
    "ZImage",
    "ZImageConfig",
    "load",
    "load_caption_encoder",
    "place_captions",
    "reference",
    "sample",
    "save",
    "save_picture",
]


def __getattr__(name: str):
    if name == "__version__":
        return import_module("lumina_kernels").__version__
    place = _MODULES.get(name) or _OPTIONAL.get(name)
    if place is None:
        raise AttributeError(f"module 'lumina' has no attribute {name!r}")
    module = import_module(f"lumina.{place}")
    value = globals()[name] = module if name == "reference" else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_OPTIONAL})
