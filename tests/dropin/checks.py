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
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_deviation(got: dict, want: dict) -> float:
    """Of the gradients, by the largest of all."""
    assert got.keys() == want.keys()
    largest = max(grad.abs().max() for grad in want.values())
    return max(((got[name] - want[name]).abs().max() / largest).item() for name in want)
