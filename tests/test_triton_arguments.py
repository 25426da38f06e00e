"""What Triton's launchers pass, as far as versions of Triton differ in what they compile."""

import inspect
import re
from importlib import import_module

import pytest
import torch
from common import DEVICE
from triton.runtime import interpreter, jit

import lumina_kernels
from lumina_kernels.examples import Sizes, examples
from lumina_kernels.ops import OPS

COMPARED = re.compile(r"\b(\w+) is (?:not )?None")


@pytest.mark.parametrize("op", OPS)
def test_no_tuple_that_is_compared_with_none_holds_one(op, monkeypatch):
    """Triton 3.6 does not compile the comparison."""
    launched = []
    differentiable = getattr(import_module(f"lumina_kernels.ops.{op}"), f"{op}_fwd").differentiable

    def record(kernel, *args, grid, warmup, **options):
        launched.append((kernel.fn, args))

    for kind in (interpreter.InterpretedFunction, jit.JITFunction):
        monkeypatch.setattr(kind, "run", record)
    for inputs in examples(op, Sizes(grid=(1, 2, 3), device=DEVICE)).values():
        for left_out in (None, *inputs):
            given = {name: x for name, x in inputs.items() if name != left_out}
            learned = (given.get(name) for name in differentiable)
            for x in filter(torch.is_tensor, learned):
                x.requires_grad_()
            try:
                out = getattr(lumina_kernels, op)(**given, backend="triton")
            except (TypeError, ValueError, NotImplementedError):
                continue  # it cannot be left out, or not be learned
            outs = out if isinstance(out, tuple) else (out,)
            outs = [x for x in outs if x is not None and x.requires_grad]
            torch.autograd.backward(outs, [torch.ones_like(x) for x in outs])
    assert launched
    for fn, args in launched:
        compared = set(COMPARED.findall(inspect.getsource(fn)))
        for name, argument in zip(inspect.signature(fn).parameters, args, strict=False):
            holds = isinstance(argument, tuple) and None in [*flat(argument)]
            assert not (name in compared and holds), (fn.__name__, name)


def flat(argument):
    """The tensors, numbers and None in nested tuples, tensors as 0."""
    for x in argument:
        if isinstance(x, tuple):
            yield from flat(x)
        else:
            yield x if x is None else 0
