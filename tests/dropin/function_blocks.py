"""A function as a block of a model that is patched, against itself unpatched."""

import copy

import torch
import torch.nn.functional as F
from torch import nn, randn
from torch.utils._pytree import tree_leaves, tree_map

from lumina_kernels.patching import patch

B, L, D = 2, 5, 8
H, K = 4, 8


class Block(nn.Module):
    def __init__(self, function, parameters):
        super().__init__()
        self.function = function
        self.p = nn.ParameterDict(parameters)
        self.idle = nn.Sequential(nn.Identity(), nn.Identity())

    def forward(self, *args):
        return self.function(self.p, *args)


class Model(nn.Module):
    def __init__(self, function, parameters):
        super().__init__()
        self.blocks = nn.ModuleList([Block(function, parameters)])

    def forward(self, *args):
        return self.blocks[0](*args)


def outcome(model, inputs):
    """The results, and the inputs after the call. Random numbers are the same each time."""
    torch.manual_seed(1)
    inputs = tree_map(torch.clone, inputs)
    return [*tree_leaves(model(*inputs)), *inputs]


def to_dtype(inputs, dtype):
    return [x.to(dtype) if x.dtype == torch.float32 else x for x in inputs]


def rms(x):
    return x.double().square().mean().sqrt().item()


def ops_of(report):
    return sorted(row["op"] for row in report.rows() if row["op"])


@torch.no_grad()
def check(function, *inputs, training=False, more=(), **parameters):
    """Patched, a block computes the same in float32, from `inputs` and then from `more`. Returns
    the ops that do it."""
    model = Model(function, parameters).train(training)
    own = copy.deepcopy(model)
    report = patch(model)
    for given in (inputs, *more):
        got, want = outcome(model, given), outcome(own, given)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert torch.equal(a.isfinite(), b.isfinite())
            difference = torch.where(b.isfinite(), a.double() - b.double(), 0).abs().max()
            assert difference <= 2e-5 * rms(b.nan_to_num(0, 0, 0))
    return ops_of(report)


@torch.no_grad()
def check_bfloat16(function, *inputs, kept=(), **parameters):
    """The same in bfloat16, but for the inputs and parameters that are `kept` in float32: with the
    same dtypes, and as close to the truth."""
    inputs = [x if i in kept else x.bfloat16() for i, x in enumerate(inputs)]
    parameters = {n: p if n in kept else p.bfloat16() for n, p in parameters.items()}
    model = Model(function, parameters)
    truth = copy.deepcopy(model).float()(*(x.float() for x in inputs))
    want = outcome(model, inputs)
    report = patch(model)
    got = outcome(model, inputs)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    for a, b, exact in zip(got, want, tree_leaves(truth), strict=False):
        assert rms(a - exact) <= 1.15 * rms(b - exact) + 1e-6 * rms(exact)
    return ops_of(report)


def vectors(*names):
    return {name: randn(D) for name in names}


def layer(x, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def root(x, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)
