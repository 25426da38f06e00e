"""Checks of the text features that a network takes."""

from __future__ import annotations

from torch import Tensor, bool


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
    if not fits or mask.dtype != bool:
        more = f" or {(B, 'L', T)}".replace("'", "") if by_token else ""
        raise ValueError(
            f"{kind}_mask must be bool of shape {(B, T)}{more}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
