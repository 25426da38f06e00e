"""From a prompt to a picture: pipelines of Lumina-Next, Lumina-Image 2.0 and Z-Image.

pipe = lumina.Pipeline.from_pretrained(FOLDER)
pipe("a red apple").images[0].save("apple.png")

Tokenizers and text encoders are those of `transformers`, VAE and scheduler those of `diffusers`,
the network and the sampler ours.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lumina.pipelines.lumina2 import Lumina2Pipeline
    from lumina.pipelines.lumina_next import LuminaPipeline
    from lumina.pipelines.pipeline import Pipeline
    from lumina.pipelines.z_image import ZImagePipeline

# Imported when first used, as `lumina` itself is to be without the two libraries.
_MODULES = {
    "Lumina2Pipeline": "lumina2",
    "Lumina2Text2ImgPipeline": "lumina2",
    "LuminaPipeline": "lumina_next",
    "LuminaText2ImgPipeline": "lumina_next",
    "Pipeline": "pipeline",
    "ZImagePipeline": "z_image",
}
_FORMER = {  # names that diffusers had for the same
    "LuminaText2ImgPipeline": "LuminaPipeline",
    "Lumina2Text2ImgPipeline": "Lumina2Pipeline",
}

__all__ = ["Lumina2Pipeline", "LuminaPipeline", "Pipeline", "ZImagePipeline"]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'lumina.pipelines' has no attribute {name!r}")
    try:
        module = import_module(f"lumina.pipelines.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if error.name not in ("diffusers", "transformers"):
            raise
        raise ImportError(
            f"pipelines need {error.name}: pip install diffusers transformers accelerate"
        ) from error
    return getattr(module, _FORMER.get(name, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
