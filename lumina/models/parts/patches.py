"""Images to sequences of patches, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina.models.parts.rope import positions

Grid = tuple[int, int, int]


class Patched(Protocol):
    """What a network's config says of its patches."""

    in_channels: int
    axes: tuple[str, ...]  # of a latent after its channels
    channels_first: bool  # a patch on its way in is (C, pH, pW), else (pH, pW, C)

    @property
    def patch(self) -> tuple[int, int, int]: ...  # extent along (t, h, w)

    @property
    def out_channels(self) -> int: ...


@dataclass(frozen=True)
class Tokens:
    """A batch of images as padded sequences of patches, in row-major order of (t, h, w)."""

    patches: Tensor  # (B, L, C * volume)
    grids: list[Grid]  # patches along (t, h, w): one for all or, where they differ, one each
    positions: Tensor  # (L, 3) for one grid, else (B, L, 3)
    mask: Tensor | None  # (B, L) bool, False on padding; None: no padding


def to_tokens(x: Tensor | list[Tensor], config: Patched) -> Tokens:
    """Cut images into patches, in the order of the config; shorter sequences are padded with zeros.

    Raises:
        ValueError: channels, dimensions or sides that do not fit the config, or no image.
    """
    if isinstance(x, Tensor):
        patches, grid = _cut(x, config)
        return Tokens(patches, [grid], positions(*grid, device=x.device), None)
    if not x:
        raise ValueError("x must hold at least one image, got an empty list")
    sequences, grids = zip(*(_cut(image[None], config) for image in x), strict=True)
    if all(grid == grids[0] for grid in grids):
        where = positions(*grids[0], device=x[0].device)
        return Tokens(torch.cat(sequences), [grids[0]], where, None)
    lengths = [s.shape[1] for s in sequences]
    pad = [max(lengths) - length for length in lengths]
    patches = torch.cat([F.pad(s, (0, 0, 0, p)) for s, p in zip(sequences, pad, strict=True)])
    where = [
        F.pad(positions(*grid, device=patches.device), (0, 0, 0, p))
        for grid, p in zip(grids, pad, strict=True)
    ]
    mask = None
    if any(pad):
        length = filled(lengths, patches.device)
        mask = torch.arange(max(lengths), device=patches.device) < length[:, None]
    return Tokens(patches, list(grids), torch.stack(where), mask)


def to_images(
    out: Tensor, grids: list[Grid], like: Tensor | list[Tensor], config: Patched
) -> Tensor | list[Tensor]:
    """Undo `to_tokens` for the network's output, whose patches are (pH, pW, out_channels).

    Only the first in_channels channels are kept: the others belong to learn_sigma and are unused.

    Args:
        out: the patches, for the batch of `like` or for it several times in a row.
        grids: of the tokens.
        like: the images that the tokens were made of.
        config: of the network.
    """
    if isinstance(like, Tensor):
        return _paste(out, grids[0], like, config)
    images = like * (out.shape[0] // len(like))
    grids = grids * (len(images) // len(grids))
    each = zip(out, grids, images, strict=True)
    return [_paste(o[None], grid, image[None], config)[0] for o, grid, image in each]


def repeated(x, n: int):
    """A batch, a tensor or a list of its images, n times in a row; None stays None."""
    if n == 1 or x is None:
        return x
    return x * n if isinstance(x, list) else torch.cat([x] * n)


def filled(numbers: list[int], device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The numbers as a tensor made on the device: copying them there would stall the host."""
    return torch.cat([torch.full((1,), n, dtype=dtype, device=device) for n in numbers])


def _cut(x: Tensor, config: Patched) -> tuple[Tensor, Grid]:
    axes, C, p = config.axes, config.in_channels, config.patch
    ndim = {("w",): (3,), ("h", "w"): (4,), ("t", "h", "w"): (4, 5)}[axes]
    if x.ndim not in ndim or x.shape[1] != C:
        names = {3: "(B, C, L)", 4: "(B, C, H, W)", 5: "(B, C, T, H, W)"}
        raise ValueError(
            f"x must be {' or '.join(names[n] for n in ndim)} with C = {C} for axes {axes}, "
            f"got shape {tuple(x.shape)}"
        )
    B, T = x.shape[0], x.shape[2] if x.ndim == 5 else 1
    height, width = (1 if x.ndim == 3 else x.shape[-2]), x.shape[-1]
    grid = (T, height // p[1], width // p[2])
    if min(grid) < 1 or height % p[1] or width % p[2]:
        raise ValueError(
            f"the sides of x must be positive multiples of the patch {p}, got {tuple(x.shape)}"
        )
    order = (0, 2, 3, 5, 1, 4, 6) if config.channels_first else (0, 2, 3, 5, 4, 6, 1)
    x = x.reshape(B, C, T, grid[1], p[1], grid[2], p[2]).permute(order)
    return x.reshape(B, grid[0] * grid[1] * grid[2], C * p[1] * p[2]), grid


def _paste(out: Tensor, grid: Grid, like: Tensor, config: Patched) -> Tensor:
    T, h, w = grid
    _, ph, pw = config.patch
    out = out[:, : T * h * w].reshape(-1, T, h, w, ph, pw, config.out_channels)
    out = out[..., : config.in_channels].permute(0, 6, 1, 2, 4, 3, 5)
    # from (B, C, T, h, pH, w, pW)
    return out.reshape(out.shape[0], *like.shape[1:]).to(like.dtype)
