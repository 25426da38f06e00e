"""From the last tokens to patches."""

from torch import Tensor, nn

from lumina_kernels import norm_modulate


class FinalLayer(nn.Module):
    """linear(layer_norm(x) * (1 + scale)); the norm has no weight, and an epsilon of its own."""

    def __init__(self, dim: int, cond_dim: int, out: int, backend: str | None):
        super().__init__()
        self.linear = nn.Linear(dim, out)
        # The network applies the SiLU.
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(cond_dim, dim))
        self.backend = backend

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Patches (B, L, out) for tokens (B, L, D) and the SiLU of the conditioning, (B, A)."""
        scale = self.adaLN_modulation(c)
        x = norm_modulate(x, scale=scale, eps=1e-6, kind="layer", backend=self.backend)
        return self.linear(x)
