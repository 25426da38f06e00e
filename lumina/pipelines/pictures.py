"""Between pictures and latents: noise, the VAE of `diffusers` in both directions, masks."""

from __future__ import annotations

from collections.abc import Sequence

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


def prepare(image, sizes: Sequence[Size], processor: VaeImageProcessor, name: str) -> list[Tensor]:
    """The picture for each of the sizes, (1, channels, height, width) in pixels.

    Raises:
        ValueError: no picture, or not one for each.
    """
    batch = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4
    several = list(image) if batch else [image]
    if not several or len(sizes) % len(several):
        raise ValueError(f"{name} must be one, or one for each prompt, got {len(several)}")
    each, made = len(sizes) // len(several), {}
    for i, (height, width) in enumerate(sizes):
        key = (i // each, height, width)
        try:
            if key not in made:
                made[key] = processor.preprocess(several[i // each], height, width)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{name} must be pictures of PIL, NumPy or PyTorch: {error}"
            ) from error
    return [made[i // each, height, width] for i, (height, width) in enumerate(sizes)]


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
