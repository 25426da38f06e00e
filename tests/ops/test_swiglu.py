from functools import partial

import pytest
import torch
from common import (
    BACKENDS,
    CPU_LEVELS,
    DTYPES,
    KERNELS,
    assert_accurate,
    assert_compiles,
    assert_equal_results,
    assert_kernel_contract,
    assert_same_in_float64,
    assert_strided_is_same,
    at_cpu_level,
    raises,
    randn,
    run,
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


def test_large_gates_neither_overflow_nor_underflow_to_nan():
    a = torch.tensor([[[-1e4, -100.0, 0.0, 100.0, 6e4]]], dtype=torch.float16)
    out = swiglu(a, torch.ones_like(a))
    assert torch.equal(out, torch.tensor([[[0.0, 0.0, 0.0, 100.0, 6e4]]], dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(dtype):
    assert_accurate(swiglu, lambda a, b: F.silu(a) * b, make_inputs(2, 7, 72), dtype)


def test_strided():
    assert_strided_is_same(swiglu, make_inputs())
    a, b = randn(2, 5, 32).chunk(2, -1)
    assert torch.equal(swiglu(a, b), swiglu(a.contiguous(), b.contiguous()))


def test_any_shape():
    a, b = randn(2, 3, 4, 5, 6), randn(2, 3, 4, 5, 6)
    assert torch.equal(swiglu(a, b)[1, 2, 3], swiglu(a[1, 2, 3], b[1, 2, 3]))


def test_empty_batch():
    assert {tuple(t.shape) for t in run(swiglu, make_inputs(B=0)).values()} == {(0, 5, 48)}


def test_compile():
    assert_compiles(swiglu, make_inputs(2, 5, 12), make_inputs(3, 7, 12), make_inputs(4, 9, 20))


def test_errors():
    good = make_inputs()
    raises(TypeError, "a must be a tensor, got NoneType", swiglu, good, a=None)
    raises(ValueError, r"b must have shape \(2, 5, 48\)", swiglu, good, b=randn(2, 5, 1))
    raises(
        TypeError, "b must have the dtype of a, torch.float64", swiglu, good, b=good["b"].float()
    )
    raises(TypeError, "a must be float16.*int64", swiglu, good, a=torch.ones(2, 5, 48).long())


@pytest.mark.parametrize("backend, dtype", KERNELS)
@pytest.mark.parametrize("shape", ((), (7,), (2, 3, 5), (3, 1100), (2, 2, 1024)))
def test_kernels_are_accurate(shape, backend, dtype):
    inputs = {"a": 3 * randn(*shape), "b": randn(*shape)}
    assert_accurate(partial(swiglu, backend=backend), lambda a, b: F.silu(a) * b, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", CPU_LEVELS)
def test_every_instruction_set_is_accurate(level, dtype):
    with at_cpu_level(level):
        test_kernels_are_accurate((3, 1111), "cpu", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_keep_the_contract(backend):
    assert_kernel_contract(swiglu, make_inputs(2, 5, 12), make_inputs(3, 7, 12), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_read_halves_in_place(backend):
    a, b = randn(2, 5, 32).float().chunk(2, -1)
    torch.testing.assert_close(swiglu(a, b, backend=backend), swiglu(a, b, backend="torch"))
    a, b = a.transpose(0, 1), b.transpose(0, 1)  # rows that no single step reaches
    torch.testing.assert_close(swiglu(a, b, backend=backend), swiglu(a, b, backend="torch"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_with_large_gates(backend):
    a = torch.tensor([[[-1e4, -100.0, 0.0, 100.0, 6e4]]], dtype=torch.float16)
    out = swiglu(a, torch.ones_like(a), backend=backend)
    assert torch.equal(out, torch.tensor([[[0.0, 0.0, 0.0, 100.0, 6e4]]], dtype=torch.float16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_take_nothing(backend):
    inputs = {name: tensor.float() for name, tensor in make_inputs(B=0).items()}
    expected = run(partial(swiglu, backend="torch"), inputs)
    assert_equal_results(run(partial(swiglu, backend=backend), inputs), expected)
