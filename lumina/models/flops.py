"""FLOPs of the network, counted without computing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from lumina.models.families import FAMILIES, Config, name_of
from lumina.models.parts.windows import DroppedLayers


def forward_flops(
    config: Config,
    size: Sequence[int],
    text: int,
    context_drop: DroppedLayers | None = None,
) -> int:
    """FLOPs of the matrix products in one forward of one image, captions included.

    A multiply-add is two. Norms, rotations, averages and softmax are not counted.

    Args:
        config: sizes of the network.
        size: of a latent without batch and channels: (H, W), (T, H, W) or (L,).
        text: tokens of the caption.
        context_drop: as for the network's `forward`.

    Raises:
        ValueError: a size that does not fit the config.
    """
    with torch.device("meta"):
        model = FAMILIES[name_of(config)].network(config, backend="torch")
        x = torch.empty(1, config.in_channels, *size)
        feats, mask = torch.empty(1, text, config.cap_feat_dim), torch.ones(1, text).bool()
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(x, torch.empty(1), feats, mask, context_drop=context_drop)
    return counter.get_total_flops()
