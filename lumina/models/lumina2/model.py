"""Lumina-Image 2.0 (arXiv 2503.21758) on the fused ops of lumina_kernels.

The parameters have the names of the released checkpoint and of `reference.Lumina2`, which defines
in plain PyTorch what this file computes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.models.lumina2.config import Lumina2Config
from lumina.models.parts.joint import JointCaption
from lumina.models.parts.joint_model import JointTransformer
from lumina.models.parts.timestep import TimestepEmbedder


class Lumina2(JointTransformer):
    """The velocity network of Lumina-Image 2.0.

    Text token i lies at (i, 0, 0), token (r, c) of the image at (n, r, c), with n tokens of text.

    Args:
        config: sizes, see `Lumina2Config`.
        backend: of every op: "torch", "triton", "cuda", "cpu"; None takes the best one for the
            tensors' device.
    """

    def __init__(self, config: Lumina2Config, backend: str | None = None) -> None:
        super().__init__(config, TimestepEmbedder(config.cond_dim), backend)
        self.reset_parameters()

    def _modulation(self) -> nn.Module:
        # The network applies the SiLU once.
        return nn.Sequential(nn.Identity(), nn.Linear(self.config.cond_dim, 4 * self.config.dim))

    def _conditions(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        c = F.silu(self.t_embedder(t, dtype))
        return c, c

    def _embedded(self, feats: Tensor, mask: Tensor) -> JointCaption:
        places = (mask.cumsum(1) - 1).clamp(min=0)
        return JointCaption(self.cap_embedder(feats), mask, places, mask.sum(1))
