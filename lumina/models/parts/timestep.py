"""The embedding of the time."""

import math

import torch
from torch import Tensor, nn


class TimestepEmbedder(nn.Module):
    """MLP of 256 sinusoids of t, cosines first."""

    def __init__(self, width: int, hidden: int | None = None):
        super().__init__()
        hidden = width if hidden is None else hidden
        self.mlp = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, width) for times (B,), from sinusoids rounded to `dtype`."""
        # bfloat16 would merge neighbouring times.
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device).to(t.dtype) / 128)
        angles = t[:, None] * freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(dtype))
