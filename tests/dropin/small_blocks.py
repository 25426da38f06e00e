"""A function of a weight and inputs as a block, patched and as it is, with gradients."""

import copy
import warnings

import torch
from function_blocks import Model
from torch import nn

from lumina_kernels import patch


def pair(function):
    """A model as it is, the same patched, and its report."""
    weight = nn.Parameter(torch.linspace(0.5, 2, 8))
    model = Model(lambda p, *inputs: function(p["w"], *inputs), {"w": weight})
    patched = copy.deepcopy(model)
    return model, patched, patch(patched)


def called(model, *inputs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a graph is left")
        return model(*inputs)


def heads(x):
    return x[:, None]


def gradients(model, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = called(model, *inputs)
    out.float().backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
    return [out, *(x.grad for x in (*inputs, model.blocks[0].p["w"]))]
