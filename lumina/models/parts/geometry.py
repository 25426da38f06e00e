"""What self-attention needs to know of the tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lumina.models.parts.patches import Grid, filled

if TYPE_CHECKING:
    from lumina.distributed.sequence import SequenceParallel


@dataclass(frozen=True)
class Geometry:
    """Where the tokens are; the same for every block of a call."""

    rope: tuple[Tensor, Tensor, Tensor]  # positions, inv_freq and axis of the rope ops
    key_mask: Tensor | None  # (B, L) bool, False on padding
    key_scale: Tensor | None  # factor of the keys, see `key_scale`
    parallel: SequenceParallel | None = None  # the ranks that have the other tokens; None: none
    # Where the tokens of the text come behind those of the image, for context drop:
    image_tokens: int = 0
    whole_mask: Tensor | None = None  # `key_mask` of the tokens of all ranks

    def scaled(self, k: Tensor) -> Tensor:
        """Keys (B, L, G, K), for proportional attention."""
        return k if self.key_scale is None else (k * self.key_scale).to(k.dtype)


def key_scale(grids: list[Grid], base_seqlen: int | None, like: Tensor) -> Tensor | None:
    """Proportional attention's factor, one of all images or one of each, (B or 1, 1, 1, 1).

    A tensor: as a number it would be a constant of the compiled graph, one graph for every size.
    """
    if base_seqlen is None:
        return None
    if base_seqlen < 2:
        raise ValueError(f"base_seqlen must be at least 2 tokens, got {base_seqlen}")
    # Not in 16 bits: the factor would be off by up to 1/256, and for all keys alike.
    acc = torch.promote_types(like.dtype, torch.float32)
    tokens = filled([t * h * w for t, h, w in grids], like.device, acc)
    return (tokens.log() / math.log(base_seqlen)).sqrt()[:, None, None, None]
