"""What the `examples` of the ops are made of."""

import math

import torch
from torch import Tensor


class Sizes:
    """Sizes by their letters, and random tensors of these sizes, in one dtype on one device."""

    def __init__(
        self, B=2, grid=(1, 3, 3), T=5, H=4, G=2, K=12, F=40, dtype=torch.float32, device="cpu"
    ):
        self.B, self.grid, self.T, self.H, self.G, self.K, self.F = B, grid, T, H, G, K, F
        self.L, self.D = math.prod(grid), H * K
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def rows(self) -> Tensor:
        return self.normal(self.B, self.L, self.D)

    def modulations(self, count: int, *tokens: int) -> tuple[Tensor, ...]:
        """(B, [L,] D) each, views of one tensor with gaps between their rows."""
        return self.normal(self.B, *tokens, count * self.D).chunk(count, -1)

    def heads(self, count: int, length: int | None = None) -> Tensor:
        return self.normal(self.B, self.L if length is None else length, count, self.K)

    def mask(self, length: int) -> Tensor:
        """(B, length), every third key left out."""
        keys = torch.arange(self.B * length, device=self.device)
        return (keys % 3 != 1).view(self.B, length)

    def rope(self) -> dict[str, Tensor]:
        """Positions on the grid, and Lumina-Next's frequencies and alternating axes."""
        pair = torch.arange(self.K // 2, device=self.device)
        sizes = [torch.arange(size, device=self.device) for size in self.grid]
        return {
            "positions": torch.cartesian_prod(*sizes),
            "inv_freq": 10000.0 ** -(2 * (pair // 2) / max(1, self.K // 2)),
            "axis": pair % 2 + 1,
        }
