"""A model of one block that computes a given function of a weight and its inputs."""

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from lumina_kernels import patch


class Block(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.linspace(0.5, 2, 8))
        self.norm = nn.BatchNorm1d(5)
        self.idle = nn.Sequential(nn.Linear(8, 8), nn.Identity())

    def forward(self, *inputs):
        if self.function == "batch_norm":
            self.norm(inputs[0])
            return F.gelu(inputs[0] + 1)
        return self.function(self.w, *inputs)


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.blocks = nn.ModuleList([Block(function)])

    def forward(self, *inputs):
        return self.blocks[0](*inputs)


def pair(function):
    """A model as it is, the same patched, and its report."""
    model = Model(function)
    patched = copy.deepcopy(model)
    return model, patched, patch(patched)


def called(model, *inputs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a graph is left")
        return model(*inputs)


def layer(x):
    return F.layer_norm(x, (8,))


def heads(x):
    return x[:, None]


def gradients(model, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = called(model, *inputs)
    out.float().backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
    return [out, *(x.grad for x in (*inputs, model.blocks[0].w))]
