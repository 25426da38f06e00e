"""Between pictures and latents: noise, the VAE of `diffusers` in both directions, masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from lumina.pipelines.call import Size

Latents = Tensor | list[Tensor]  # (B, C, H, W), or a list of (C, H_i, W_i)


def draw_noise(plan, generator, dtype: torch.dtype, device: torch.device) -> Latents:
    """As diffusers draws it, in its dtype: the same seed gives the same picture."""
    if not plan.ragged:
        shape = (len(plan.sizes), plan.channels, *plan.sizes[0])
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype).float()
    several = isinstance(generator, Sequence)
    each = generator if several else [generator] * len(plan.sizes)
    return [
        randn_tensor((1, plan.channels, *size), generator=g, device=device, dtype=dtype)[0].float()
        for g, size in zip(each, plan.sizes, strict=True)
    ]


def check_latents(latents, channels: int, sizes: Sequence[Size]) -> None:
    """Raise unless there is one latent of its size for each picture."""
    if not isinstance(latents, (Tensor, list, tuple)):
        raise TypeError(f"latents must be a tensor or a list of them, got {type(latents).__name__}")
    shapes, got = [(channels, *size) for size in sizes], [tuple(z.shape) for z in latents]
    if got != shapes:
        raise ValueError(f"latents must be of the shapes {shapes}, got {got}")


def prepare(
    image, batch: int, sizes: Sequence[Size], processor: VaeImageProcessor, name: str
) -> list[Tensor]:
    """The picture for each of the sizes, (1, channels, height, width) in pixels.

    image: one, or one for each of the `batch` prompts. Bytes (0..255) and bool come to what PIL
    makes of them, floats are shares of white; (height, width, channels) in NumPy, (channels,
    height, width) in PyTorch.

    Raises:
        ValueError: no picture, or not one for each.
    """
    together = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4
    several = list(image) if together else [image]
    if len(several) not in (1, batch):
        raise ValueError(f"{name} must be one, or one for each prompt, got {len(several)}")
    gray = processor.config.do_convert_grayscale
    plain = [_plain(picture, gray, name) for picture in several]
    each, made = len(sizes) // len(several), {}
    for i, (height, width) in enumerate(sizes):
        key = (i // each, height, width)
        if key not in made:
            made[key] = processor.preprocess(plain[i // each], height, width)
    return [made[i // each, height, width] for i, (height, width) in enumerate(sizes)]


def _plain(picture, gray: bool, name: str) -> PIL.Image.Image | Tensor:
    """As PIL, or floats (1, channels, height, width); of one channel if gray, of three if not."""
    if isinstance(picture, PIL.Image.Image):
        return picture if gray else picture.convert("RGB")  # the processor makes gray
    if isinstance(picture, np.ndarray):
        if picture.dtype.kind not in "bf" and picture.dtype != np.uint8:
            raise ValueError(f"{name} must be of bytes, bool or floats, got {picture.dtype}")
        picture = torch.from_numpy(np.ascontiguousarray(picture))
        if picture.ndim > 2:
            picture = picture.movedim(-1, -3)
    if not isinstance(picture, Tensor):
        got = type(picture).__name__
        raise ValueError(f"{name} must be pictures of PIL, NumPy or PyTorch, got {got}")
    shape = tuple(picture.shape)
    if picture.ndim == 4 and len(picture) == 1:
        picture = picture[0]
    if picture.ndim == 2:
        picture = picture[None]
    if picture.ndim != 3 or len(picture) not in (1, 3) or picture.numel() == 0:
        raise ValueError(f"{name} must have the shape (1 or 3, height, width), got {shape}")
    if picture.dtype in (torch.bool, torch.uint8):
        if picture.dtype == torch.bool and len(picture) == 3:
            picture = picture.to(torch.uint8) * 255
        levels = picture[0] if len(picture) == 1 else picture.movedim(0, -1)
        return _plain(PIL.Image.fromarray(levels.cpu().contiguous().numpy()), gray, name)
    if not picture.is_floating_point():
        raise ValueError(f"{name} must be of bytes, bool or floats, got {picture.dtype}")
    picture = picture.float()
    if gray and len(picture) == 3:  # luminance, as PIL has it
        weights = picture.new_tensor([0.299, 0.587, 0.114])
        picture = (picture * weights[:, None, None]).sum(0, keepdim=True)
    return picture[None] if gray else picture.expand(3, -1, -1)[None]


@torch.no_grad()
def encode(vae: nn.Module, pictures: list[Tensor], device: torch.device) -> list[Tensor]:
    """The latents (C, H, W) of pictures in [-1, 1]: the mode of what the VAE gives."""
    latents, made = [], {}
    for picture in pictures:
        if id(picture) not in made:
            encoded = vae.encode(picture.to(device, vae.dtype))
            z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
            z = (z.float() - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor
            made[id(picture)] = check_finite(vae, z)[0]
        latents.append(made[id(picture)])
    return latents


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor, device: torch.device) -> Tensor:
    """The pictures (B, 3, height, width) of latents (B, C, H, W), about in [-1, 1].

    Raises:
        FloatingPointError: the latents or what the VAE makes of them is not finite.
    """
    if not torch.isfinite(latents).all():
        raise FloatingPointError(
            "the network gave latents that are not finite: load it in float32 or bfloat16, "
            "or lower the guidance"
        )
    z = latents.to(device, vae.dtype)
    z = z / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
    return check_finite(vae, vae.decode(z, return_dict=False)[0])


def check_finite(vae: nn.Module, result: Tensor) -> Tensor:
    if torch.isfinite(result).all():
        return result
    raise FloatingPointError(
        f"the VAE overflows in {vae.dtype}: pipe.vae.to(torch.float32), or bfloat16, may help"
    )


def redrawn(mask: Tensor, factor: int) -> Tensor:
    """(1, H, W), 1 for latents of which any pixel of a mask (1, 1, height, width) is white."""
    return F.max_pool2d(mask[:, :1].float(), factor)[0]
