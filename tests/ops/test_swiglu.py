from functools import partial

import pytest
import torch
from common import (
    BACKENDS,
    DEVICE,
    IMPLEMENTATIONS,
    assert_accurate,
    assert_same_in_float64,
    raises,
    randn,
)
from torch.nn import functional as F

from lumina_kernels import swiglu


def make_inputs(B=2, L=5, F=48):
    return {"a": 3 * randn(B, L, F), "b": randn(B, L, F)}


def test_gradcheck():
    leaves = [tensor.requires_grad_() for tensor in make_inputs(1, 2, 3).values()]
    assert torch.autograd.gradcheck(swiglu, leaves)


def test_matches_the_formula():
    assert_same_in_float64(swiglu, lambda a, b: a * b / (1 + torch.exp(-a)), make_inputs())


def test_any_shape():
    a, b = randn(2, 3, 4, 5, 6), randn(2, 3, 4, 5, 6)
    assert torch.equal(swiglu(a, b)[1, 2, 3], swiglu(a[1, 2, 3], b[1, 2, 3]))


def test_errors():
    good, op = make_inputs(), swiglu
    raises(TypeError, "a must be a tensor, got NoneType", op, good, a=None)
    raises(ValueError, r"b must have shape \(2, 5, 48\)", op, good, b=randn(2, 5, 1))
    raises(TypeError, "b must have the dtype of a, torch.float64", op, good, b=good["b"].float())
    raises(TypeError, "a must be float16.*int64", op, good, a=torch.ones(2, 5, 48).long())


@pytest.mark.parametrize("backend, dtype", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ((), (7,), (2, 3, 5), (3, 1100), (2, 2, 1024)))
def test_accuracy(shape, backend, dtype):
    inputs = {"a": 3 * randn(*shape), "b": randn(*shape)}
    assert_accurate(partial(swiglu, backend=backend), lambda a, b: F.silu(a) * b, inputs, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_no_single_stride_reaches(backend):
    a, b = (x.transpose(0, 1) for x in randn(2, 5, 32).float().chunk(2, -1))
    torch.testing.assert_close(swiglu(a, b, backend=backend), swiglu(a, b, backend="torch"))


@pytest.mark.parametrize("backend", ("torch", *BACKENDS))
def test_large_gates_neither_overflow_nor_underflow_to_nan(backend):
    a = torch.tensor([-1e4, -100.0, 0.0, 100.0, 6e4], dtype=torch.float16, device=DEVICE)
    out = swiglu(a, torch.ones_like(a), backend=backend)
    assert out.tolist() == a.relu().tolist()
