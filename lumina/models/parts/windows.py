"""Context drop inside a network: self-attention sees averages of keys and values over windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina.models.parts.patches import Grid
from lumina_kernels import context_drop


@dataclass(frozen=True)
class DroppedLayers:
    """What one call of the network pools: `ContextDrop.at` makes it, `NextDiT.forward` takes it.

    Args:
        factor: side of a window in tokens.
        layers: for each layer, whether it pools its keys and values.
        log_count: as in `ContextDrop`.
    """

    factor: int
    layers: tuple[bool, ...]
    log_count: bool = True


@dataclass(frozen=True)
class Windows:
    """Which tokens of a batch are averaged together; the same in every layer."""

    factor: int
    grid: Grid  # (t, h, w) tokens
    weighted: bool  # by log(count)
    # For images of several sizes: the tokens of each window in order, and whether they exist,
    # (B, L' factor^2). The grid is then (L', factor, factor), every window a frame of its own.
    index: Tensor | None = None
    mask: Tensor | None = None

    def bias(self, counts: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What attention in `dtype` adds to the scores of the windows, (B, 1, 1, L')."""
        if not self.weighted:
            return None
        acc = torch.promote_types(dtype, torch.float32)
        return counts.to(acc).clamp(min=1).log()[:, None, None]


def windows_of_layers(
    grids: Sequence[Grid],
    drop: DroppedLayers | None,
    n_layers: int,
    device,
    *,
    among_others: bool = False,
) -> list[Windows | None]:
    """The windows of each layer, None where it sees every token.

    Args:
        grids: tokens along (t, h, w), one grid for the whole batch or one for each image.
        drop: which layers pool, and how; None: none does.
        n_layers: layers of the network.
        device: of the batch.
        among_others: attention sees other keys together with those of the windows, such as the
            text's, which windows of one size have to outweigh too.

    Raises:
        ValueError: drop is for another number of layers.
    """
    if drop is None:
        return [None] * n_layers
    if len(drop.layers) != n_layers:
        raise ValueError(f"context_drop must be for {n_layers} layers, got {len(drop.layers)}")
    windows = _windows(grids, drop.factor, drop.log_count, among_others, device)
    return [windows if pooled else None for pooled in drop.layers]


def _windows(
    grids: Sequence[Grid], factor: int, log_count: bool, among_others: bool, device
) -> Windows:
    if len(grids) == 1:
        _, H, W = grids[0]
        # Where all keys are windows of one size, they weigh the same, and no bias is faster.
        alike = H % factor + W % factor == 0 and not among_others
        return Windows(factor, grids[0], log_count and not alike)
    each = [_window_tokens(grid, factor, device) for grid in grids]
    longest = max(len(tokens) for tokens in each)
    index = torch.stack([F.pad(z, (0, 0, 0, longest - len(z)), value=-1) for z in each]).flatten(1)
    grid = (longest, factor, factor)
    return Windows(factor, grid, log_count, index.clamp(min=0), index >= 0)


def _window_tokens(grid: Grid, factor: int, device) -> Tensor:
    """Index of each token of each window, -1 beyond the edge, (L', factor^2)."""
    T, H, W = grid
    rows, columns = -(-H // factor), -(-W // factor)
    index = torch.arange(T * H * W, device=device).view(T, H, W)
    index = F.pad(index, (0, columns * factor - W, 0, rows * factor - H), value=-1)
    index = index.view(T, rows, factor, columns, factor).transpose(2, 3)
    return index.reshape(T * rows * columns, factor * factor)


def pool(
    k: Tensor, v: Tensor, windows: Windows, backend: str | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Means of the keys and values (B, L, G, K) over windows; attention's key_mask and bias.

    Where `windows` has no index, `qk_norm_rope3d_pool` does the same together with the norm.
    """
    if windows.index is not None:
        index = windows.index[:, :, None, None].expand(-1, -1, *k.shape[2:])
        k, v = k.gather(1, index), v.gather(1, index)
    k, v, mask, counts = context_drop(
        k, v, windows.grid, windows.factor, windows.mask, backend=backend
    )
    return k, v, None if windows.index is None else mask, windows.bias(counts, k.dtype)


def pool_padded(k: Tensor, v: Tensor, windows: Windows, backend: str | None):
    """As `pool`, with any number of tokens behind those of the images."""
    if windows.index is None:
        tokens = math.prod(windows.grid)
        k, v = k[:, :tokens], v[:, :tokens]
    return pool(k, v, windows, backend)
