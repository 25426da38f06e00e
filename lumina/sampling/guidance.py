"""Classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How the velocity v_c for the caption leads away from v_u, that for the negative caption.

    The guided velocity is v_u + scale * (v_c - v_u). A subclass may compute another one.

    Args:
        scale: 1 runs the conditional network alone, at half the cost.
        channels: guide only the first so many channels and leave the others as v_c; 3 is what the
            released Lumina-Next models (of 4 latent channels) do. None: all.
        until: guide while t is below this, then follow the caption alone (Lumina-Image 2.0's CFG
            truncation). 1: always guide.
        renorm: shrink the guided velocity of a picture where its L2 norm exceeds this many times
            that of v_c (Lumina-Image 2.0's CFG renormalisation; 1 there). None: never.

    Raises:
        ValueError: a value out of range; the message says which.
    """

    scale: float = 4.0
    channels: int | None = None
    until: float = 1.0
    renorm: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance scale must be finite, got {self.scale}")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance channels must be at least 1, got {self.channels}")
        if math.isnan(self.until):
            raise ValueError(f"guidance until must be a time, got {self.until}")
        if self.renorm is not None and not self.renorm > 0:
            raise ValueError(f"guidance renorm must be positive, got {self.renorm}")

    @property
    def needed(self) -> bool:
        """Whether it differs from the caption alone at any time."""
        return self.scale != 1 and self.until > 0

    def acts_at(self, t: float) -> bool:
        """Whether the velocity at time t is guided."""
        # Heun, rk4 and dopri5 also evaluate at t = 1: skipping it would cost them their order.
        return self.needed and (t < self.until or self.until >= 1)

    @property
    def linear(self) -> bool:
        """Whether `velocity` is v_u + scale * (v_c - v_u) in its channels, and no more."""
        return self.renorm is None and type(self).velocity is Guidance.velocity

    def velocity(self, v_c: Tensor, v_u: Tensor) -> Tensor:
        """The guided velocity of one picture (C, ...), in at least float32."""
        acc = torch.promote_types(v_c.dtype, torch.float32)
        v_c, v_u = v_c.to(acc), v_u.to(acc)
        v = v_u + self.scale * (v_c - v_u)
        if self.channels is not None:
            v = torch.cat([v[: self.channels], v_c[self.channels :]])
        if self.renorm is not None:
            limit = self.renorm * v_c.norm()
            v = v * (limit / v.norm().clamp(min=torch.finfo(acc).tiny)).clamp(max=1)
        return v
