"""What the tests of patched models share."""

import torch
from models import output
from torch import nn


def deviation(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).abs().max() / want.double().square().mean().sqrt()).item()


def run(model: nn.Module, inputs: dict, report) -> tuple[torch.Tensor, int]:
    """What a model returns, and how many fused ops it has called for it."""
    before = report.fused
    return output(model, inputs), report.fused - before


def gradients(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """Those of all parameters, for a fixed gradient of the output."""
    model.zero_grad()
    out = output(model, inputs)
    out.backward(torch.linspace(-1, 1, out.numel()))
    named = ((n.removeprefix("_orig_mod."), p.grad) for n, p in model.named_parameters())
    return {name: grad.clone() for name, grad in named if grad is not None}


def largest_deviation(got: dict, want: dict) -> float:
    """Of the gradients, by the largest of all."""
    assert got.keys() == want.keys()
    largest = max(grad.abs().max() for grad in want.values())
    return max(((got[name] - want[name]).abs().max() / largest).item() for name in want)


class Block(nn.Module):
    """One of each: a norm with its modulation, a GELU, a residual with a gate."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, scale, shift=None):
        h = self.norm(x) * (1 + scale) + (0 if shift is None else shift)
        return x + scale * self.down(nn.functional.gelu(self.up(h), approximate="tanh"))


class Small(nn.Module):
    """Two blocks, three ops in each, that take a tenth of a second to capture."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Block(32) for _ in range(2))

    def forward(self, x, scale, shift=None):
        for layer in self.layers:
            x = layer(x, scale, shift)
        return x

    @staticmethod
    def inputs(batch: int = 2) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(batch, 5, 32), "scale": torch.randn(batch, 1, 32)}
