"""Regional prompts: captions that only a part of the image sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Box = tuple[float, float, float, float]


def place_captions(
    cap_feats: Tensor, cap_mask: Tensor, boxes: Sequence[Box | None], grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Put R captions in a row, and say which tokens of the image see which of them.

    A token lies in a box if its centre does. Boxes may overlap; a token then sees the captions of
    all its boxes, in one softmax. For boxes apart from each other the text branch is, with the
    tokens outside of all boxes left without text, the sum over the captions in the released code of
    Lumina-Next (lumina_next_compositional_generation), whose grids of 2 x 2 and more however mix up
    their captions.

    Args:
        cap_feats: (R, T, Y).
        cap_mask: (R, T) bool, True where there is text.
        boxes: (left, top, right, bottom) of each caption, as shares of the width and height; None:
            wherever no box is.
        grid: rows and columns of tokens, height and width of the latent over the patch.

    Returns:
        Features (1, R T, Y) and mask (1, rows * columns, R T), as `lumina.sample` takes them.

    Raises:
        ValueError: not as many boxes as captions; a box that is empty or leaves the image; a box so
            small that it has no token.

    Source: Lumina-Next (arXiv 2406.18583), compositional generation.
    """
    R, T = cap_mask.shape
    if len(boxes) != R:
        raise ValueError(f"there must be a box for each of the {R} captions, got {len(boxes)}")
    rows, columns = grid
    y = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    x = (torch.arange(columns, dtype=torch.float64) + 0.5) / columns
    inside = torch.zeros(R, rows, columns, dtype=torch.bool)
    for region, box in zip(inside, boxes, strict=True):
        if box is None:
            continue
        left, top, right, bottom = box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(
                f"a box must be left,top,right,bottom with 0 <= left < right <= 1 and "
                f"0 <= top < bottom <= 1, got {tuple(box)}"
            )
        region |= ((top <= y) & (y < bottom))[:, None] & ((left <= x) & (x < right))
        if not region.any():
            raise ValueError(f"box {tuple(box)} holds no token of the {rows} x {columns} grid")
    outside = ~inside.any(0)
    for region, box in zip(inside, boxes, strict=True):
        if box is None:
            region |= outside
    sees = inside.flatten(1).T.to(cap_mask.device)  # (L, R)
    mask = sees[:, :, None] & cap_mask  # (L, R, T)
    return cap_feats.reshape(1, R * T, -1), mask.reshape(1, rows * columns, R * T)
