"""Small inputs that most models take."""

import torch
from torch import Tensor, randn

MASK = torch.arange(7) < torch.tensor([[7], [4]])  # of the tokens of TEXT: one sample is shorter
STEPS = torch.tensor([3, 700])  # numbers that the 16 bit types have, and so have 1000 times these:
TIMES = torch.tensor([0.125, 0.5])


def text(width: int = 32) -> Tensor:
    return randn(2, 7, width)


def image(channels: int = 4, side: int = 8) -> Tensor:
    return randn(2, channels, side, side)


def video(channels: int = 4, frames: int = 2, side: int = 8) -> Tensor:
    return randn(2, channels, frames, side, side)


def grid(*sizes: int) -> Tensor:
    """The coordinates of the tokens of a grid, (L, axes)."""
    axes = (torch.arange(float(n)) for n in sizes)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
