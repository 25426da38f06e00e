"""How often a model draws what it was asked for: `python -m lumina evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina.emoji.data import EmojiSet
from lumina.emoji.encoder import CaptionEncoder
from lumina.emoji.pictures import to_float
from lumina.models.next_dit.model import NextDiT
from lumina.progress import progress as progress_of
from lumina.sampling.sampler import sample


def nearest(pictures: Tensor, images: Tensor) -> Tensor:
    """Index of the image with the least L2 distance over all pixels, (N,).

    Args:
        pictures: (N, C, H, W), clipped to [-1, 1] first, as a file would be; where they are larger
            than the images by a whole factor, averaged over squares of that side.
        images: (M, C, h, w) float in [-1, 1].

    Raises:
        ValueError: the sides are no multiples of the images', or a picture holds NaN.
    """
    factor = _check_multiple(tuple(pictures.shape[1:]), images)
    if pictures.isnan().any():  # argmin takes NaN for the smallest number
        raise ValueError("pictures must not hold NaN")
    small = F.avg_pool2d(pictures.clamp(-1, 1), factor)
    return torch.cdist(
        small.flatten(1), images.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    ).argmin(1)


def _check_multiple(shape: tuple[int, ...], images: Tensor) -> int:
    """How many times the sides of the images those of a picture are; else a ValueError."""
    C, h, w = images.shape[1:]
    factor = max(1, shape[-1] // w)
    if shape != (C, factor * h, factor * w):
        raise ValueError(f"pictures must be a whole multiple of {(C, h, w)}, got {shape}")
    return factor


@torch.no_grad()
def evaluate(
    model: NextDiT,
    encoder: CaptionEncoder,
    data: EmojiSet,
    *,
    language: str = "en",
    indices: Sequence[int] | None = None,
    size: tuple[int, int] = (32, 32),
    seed: int = 0,
    batch: int = 64,
    progress: bool = False,
    **settings,
) -> Tensor:
    """Draw emoji from their captions and find what each came out as.

    Args:
        model, encoder: as loaded.
        data: the pictures among which the nearest neighbour is sought, all of them.
        language: of the captions; an emoji without one in it is drawn from the English.
        indices: which emoji to draw; None: all.
        size: (H, W) of the pictures, a whole multiple of the data's.
        seed: picture i is drawn from the seed `seed * 1_000_003 + i` modulo 2**64, whatever the
            batch.
        batch: pictures at a time.
        progress: say what begins, and show a bar, or lines where there is no terminal.
        settings: further arguments of `lumina.sample`.

    Returns:
        (len(indices),) bool: whether the nearest neighbour, by L2 over pixels, is the prompted
        emoji.

    Raises:
        ValueError: an unknown language, no or foreign indices, a size that is no multiple, or what
            `lumina.sample` raises.
    """
    if language not in data.captions:
        raise ValueError(f"language must be one of {', '.join(data.captions)}, got {language!r}")
    indices = list(range(len(data)) if indices is None else indices)
    if not indices or not 0 <= min(indices) <= max(indices) < len(data):
        raise ValueError(f"indices must be some of 0..{len(data) - 1}, got {indices}")
    images = to_float(data.images)
    _check_multiple((images.shape[1], *size), images)
    if progress:
        print(f"drawing {len(indices)} pictures, {language}", file=sys.stderr, flush=True)
    negative = encoder([""])
    right = []
    with progress_of(len(indices), f"pictures, {language}", shown=progress) as bar:
        for start in range(0, len(indices), batch):
            chunk = indices[start : start + batch]
            captions = [data.captions[language][i] or data.captions["en"][i] for i in chunk]
            seeds = [(seed * 1_000_003 + i) % 2**64 for i in chunk]
            generators = [torch.Generator().manual_seed(s) for s in seeds]
            result = sample(
                model, *encoder(captions), *negative, size=size, generator=generators, **settings
            )
            found = nearest(result.latents.float().cpu(), images)
            right.append(found == torch.tensor(chunk))
            bar.update(len(chunk))
    return torch.cat(right)
