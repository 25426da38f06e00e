"""Checks of the text features that a network takes."""

from __future__ import annotations

import torch
from torch import Tensor


def check_features(
    kind: str, feats: Tensor | None, mask: Tensor | None, width: int, *, by_token: bool = False
) -> None:
    """Refuse what is no (B, T, width) with a mask (B, T) or, by image token, (B, L, T)."""
    if not isinstance(feats, Tensor) or feats.ndim != 3 or feats.shape[-1] != width:
        got = tuple(feats.shape) if isinstance(feats, Tensor) else feats
        raise ValueError(f"{kind}_feats must have shape (B, T, {width}), got {got}")
    if mask is None:
        raise ValueError(f"{kind}_feats need a {kind}_mask, got None")
    B, T, _ = feats.shape
    fits = mask.shape == (B, T) or by_token and mask.ndim == 3 and mask.shape[::2] == (B, T)
    if not fits or mask.dtype != torch.bool:
        more = f" or {(B, 'L', T)}".replace("'", "") if by_token else ""
        raise ValueError(
            f"{kind}_mask must be bool of shape {(B, T)}{more}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )


def captions_of_each(x: Tensor | list[Tensor] | None, t: Tensor | None, captions: int) -> int:
    """How many captions there are for every image; refuses a batch that does not fit."""
    if x is None or t is None:
        raise ValueError("x and t must be given together, or neither for captions alone")
    # Of a tensor not by len, which would fix the batch of an exported network.
    B = x.shape[0] if isinstance(x, Tensor) else len(x)
    if captions == B:
        n = 1
    elif B == 0 or captions % B:
        n = 0
    else:
        n = captions // B
    if t.shape != (B,) or n == 0:
        raise ValueError(
            f"t must have shape ({B},) and there must be {B} captions for {B} images, or a "
            f"multiple, got {tuple(t.shape)} and {captions}"
        )
    return n
