"""The loss of flow matching on a straight path from noise to data."""

import torch
from torch import Tensor, nn


def drawn_times(
    count: int, kind: str, mean: float, generator: torch.Generator | None = None
) -> Tensor:
    """Times (count,) of training examples: "uniform" in [0, 1], or "lognorm", the logistic function
    of a normal variable with this mean and deviation 1."""
    if kind == "lognorm":
        return (mean + torch.randn(count, generator=generator)).sigmoid()
    return torch.rand(count, generator=generator)


def flow_matching_loss(
    network: nn.Module, x1: Tensor, t: Tensor, noise: Tensor, feats: Tensor, mask: Tensor
) -> Tensor:
    """Mean of |v(x_t, t, caption) - (x1 - noise)|^2 with x_t = t x1 + (1 - t) noise.

    Args:
        network: returns the velocity v.
        x1, noise: data and noise, (B, C, H, W).
        t: times (B,), 0 is noise, 1 is data.
        feats, mask: captions, (B, T, Y) and (B, T) bool.
    """
    time = t[:, None, None, None]
    v = network(time * x1 + (1 - time) * noise, t, feats, mask)
    return (v.float() - (x1 - noise)).square().mean()
