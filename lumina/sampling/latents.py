"""The latents of a batch: their sizes, the noise, what image-to-image and inpainting start from."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from lumina.models.families import Config

Size = tuple[int, ...]


def picture_sizes(size, B: int, config: Config) -> tuple[list[Size], Size | None]:
    """The size of each picture, and that of all unless they came as a list."""
    common = (size,) * len(config.axes) if _is_whole(size) else size
    try:
        if not len(common) or not all(map(_is_whole, common)):
            common, sizes = None, [tuple(map(index, s)) for s in size]
        else:
            common = tuple(map(index, common))
            sizes = [common] * B
    except TypeError:
        raise ValueError(
            f"size must be a whole number, a tuple of them, or a list of such tuples, got {size}"
        ) from None
    if len(sizes) != B:
        raise ValueError(f"size must be one size or {B}, one for each caption, got {len(sizes)}")
    for sides in {*sizes, *([common] if common else [])}:
        if not all(0 < n < 2**31 for n in sides) or any(n % config.patch_size for n in sides[-2:]):
            raise ValueError(
                f"sides of size must be positive multiples of the patch, {config.patch_size}, "
                f"got {size}"
            )
    return sizes, common


def _is_whole(n) -> bool:
    """Whether n is an integer of Python, NumPy or PyTorch; True and False are none here."""
    try:
        index(n)
    except TypeError:
        return False
    return not isinstance(n, bool)


def drawn(shapes, generator) -> list[Tensor]:
    """Noise of these shapes, from one generator or one for each."""
    each = [generator] * len(shapes) if not isinstance(generator, Sequence) else generator
    if len(each) != len(shapes):
        raise ValueError(f"there must be 1 or {len(shapes)} generators, got {len(each)}")
    return [
        torch.randn(shape, generator=g, device=g.device if g is not None else None)
        for shape, g in zip(shapes, each, strict=True)
    ]


def batched(name, images, shapes, ragged, dtype, device) -> Tensor | list[Tensor]:
    """Latents of these shapes: one tensor, or a list if they are ragged."""
    got = [tuple(z.shape) for z in images]
    if got != [tuple(s) for s in shapes]:
        raise ValueError(f"{name} must have the shapes {shapes}, got {got}")
    for z in images:
        if not z.is_floating_point():  # bytes 0..255 are not latents
            raise TypeError(f"{name} must be floating, got {z.dtype}")
    images = [z.to(device, dtype) for z in images]
    return images if ragged or not images else torch.stack(images)


def noised(image, noise, t: float) -> Tensor | list[Tensor]:
    """t image + (1 - t) noise."""
    if isinstance(noise, Tensor):
        return t * image + (1 - t) * noise
    return [t * a + (1 - t) * b for a, b in zip(image, noise, strict=True)]


def batched_mask(mask, shapes, ragged, dtype, device) -> Tensor | list[Tensor]:
    """One mask for each picture, broadcastable to its shape, with values in [0, 1]."""
    each = [mask[0]] * len(shapes) if isinstance(mask, Tensor) and len(mask) == 1 else list(mask)
    if len(each) != len(shapes) or not all(
        isinstance(m, Tensor) and m.shape[1:] == shape[1:] and m.shape[0] in (1, shape[0])
        for m, shape in zip(each, map(torch.Size, shapes), strict=False)
    ):
        got = [tuple(m.shape) if isinstance(m, Tensor) else type(m).__name__ for m in each]
        raise ValueError(f"mask must have the shapes {shapes}, or 1 channel, got {got}")
    each = [m.to(device, dtype) for m in each]
    if not all(bool(((m >= 0) & (m <= 1)).all()) for m in each):
        raise ValueError("mask must have values in [0, 1]")
    return each if ragged or not each else torch.stack(each)


def kept(x, others, mask) -> Tensor | list[Tensor]:
    """x where the mask is 1, `others` where it is 0."""
    if isinstance(x, Tensor):
        return torch.lerp(others, x, mask.expand_as(x))
    return [torch.lerp(b, a, m.expand_as(a)) for a, b, m in zip(x, others, mask, strict=True)]
