"""Calls of every op on every backend, for tests of what all ops have in common."""

from functools import cache, partial
from importlib import import_module

import attention
import pytest
import torch
from common import (
    BACKENDS,
    DEVICE,
    NATIVE,
    assert_as_accurate,
    cast,
    is_float,
    run,
)
from torch.utils._python_dispatch import TorchDispatchMode

import lumina_kernels
from lumina_kernels.examples import Sizes, examples
from lumina_kernels.ops import OPS

SIZES = Sizes(grid=(1, 2, 3), device=DEVICE)
# Several chunks of rows, windows and tiles of keys, for several threads.
LARGE = Sizes(grid=(2, 9, 9), T=70, H=20, G=5, K=52, F=1040, device=DEVICE)
# One graph must serve all. The dimensions of the first differ, also from pairs and positions, which
# are two and three numbers: torch.compile takes equal ones to be the same.
COMPILED = (
    Sizes(B=5, grid=(1, 1, 6), T=9, H=8, G=4, K=22, F=26, device=DEVICE),
    Sizes(B=2, grid=(1, 1, 3), T=7, H=4, G=2, K=22, F=40, device=DEVICE),
)
CALLS = [(op, name, backend) for op in OPS for name in examples(op, SIZES) for backend in BACKENDS]
FIRST = {op: next(iter(examples(op, SIZES))) for op in OPS}  # the calls that a model makes


def every(calls):
    ids = [f"{op}-{name or 'plain'}-{backend}" for op, name, backend in calls]
    return pytest.mark.parametrize("op, name, backend", calls, ids=ids)


every_call = every(CALLS)
# Triton is slow in its interpreter.
every_quick_call = every([call for call in CALLS if call[2] in NATIVE or call[1] == FIRST[call[0]]])
# For what PyTorch does around a kernel, whichever it is: every example on one backend.
every_registration = every(
    [call for call in CALLS if call[2] == NATIVE[0] or call[1] == FIRST[call[0]]]
)
every_op = pytest.mark.parametrize(
    "op, name", [(op, name) for op in OPS for name in examples(op, SIZES)]
)


def forward(op, name=""):
    """The declaration of the op's forward kernel, or of the one that an example is named after."""
    module, own = import_module(f"lumina_kernels.ops.{op}"), f"{op}_{name.split(' ')[0]}_fwd"
    return getattr(module, own, None) or getattr(module, f"{op}_fwd")


def arguments(op, name, sizes=SIZES, seed=0):
    torch.manual_seed(seed)
    return examples(op, sizes)[name]


def call(op, backend):
    return partial(getattr(lumina_kernels, op), backend=backend)


def results(op, backend, inputs, fn=None):
    """Outputs and gradients; `fn` instead of the op itself."""
    return run(fn or call(op, backend), inputs, wrt=forward(op).differentiable)


@cache
def expected(op, name, backend):
    """Outputs and gradients of the example. In tests memory that nothing wrote is NaN."""
    found = results(op, backend, arguments(op, name))
    assert not any(value.isnan().any() for value in found.values())
    return found


def assert_as_definition(found, inputs, op, backend, label="", low=None):
    """`found` has the definition's dtypes and keeps the accuracy rule: it errs at most twice as
    much as the definition on these inputs, or on `low` as eager PyTorch, whose attention rounds its
    weights to 16 bits."""
    definition, wrt = call(op, "torch"), forward(op).differentiable
    same, high = run(definition, inputs, wrt), run(definition, cast(inputs, torch.float64), wrt)
    rounding = attention.eager if op == "gqa_attention" else definition
    low = same if low is None else run(rounding, low, wrt)
    assert found.keys() == high.keys()
    for key, value in found.items():
        assert value.dtype == same[key].dtype, (label, key)
        assert_as_accurate(f"{label} {key}", value, low[key], high[key])


class Calls(TorchDispatchMode):
    """Records the calls of this package's ops, those of forwards with leaves as inputs."""

    def __init__(self, with_gradient=True):
        super().__init__()
        self.made, self.with_gradient = [], with_gradient

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lumina_kernels":
            grads = self.with_gradient and "_fwd" in func.name()
            leaves = (x.detach().clone().requires_grad_(grads) if is_float(x) else x for x in args)
            self.made.append((func, list(leaves)))
        return func(*args, **(kwargs or {}))
