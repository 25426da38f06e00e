from functools import partial

import pytest
import torch
from common import (
    DTYPES,
    KERNEL_DTYPES,
    assert_accurate,
    assert_compiles,
    assert_equal_results,
    assert_kernel_contract,
    assert_same_in_float64,
    assert_strided_is_same,
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
    raises(ValueError, "'cpu' is not there for this op", swiglu, good, backend="cpu")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("shape", ((), (7,), (2, 3, 5), (3, 1100), (2, 2, 1024)))
def test_triton_is_accurate(shape, dtype):
    inputs = {"a": 3 * randn(*shape), "b": randn(*shape)}
    assert_accurate(partial(swiglu, backend="triton"), lambda a, b: F.silu(a) * b, inputs, dtype)


def test_triton_keeps_the_contract():
    assert_kernel_contract(swiglu, make_inputs(2, 5, 12), make_inputs(3, 7, 12))


def test_triton_reads_halves_in_place():
    a, b = randn(2, 5, 32).float().chunk(2, -1)
    torch.testing.assert_close(swiglu(a, b, backend="triton"), swiglu(a, b))
    a, b = a.transpose(0, 1), b.transpose(0, 1)  # rows that no single step reaches
    torch.testing.assert_close(swiglu(a, b, backend="triton"), swiglu(a, b))


def test_triton_with_large_gates():
    a = torch.tensor([[[-1e4, -100.0, 0.0, 100.0, 6e4]]], dtype=torch.float16)
    out = swiglu(a, torch.ones_like(a), backend="triton")
    assert torch.equal(out, torch.tensor([[[0.0, 0.0, 0.0, 100.0, 6e4]]], dtype=torch.float16))


def test_triton_takes_nothing():
    inputs = {name: tensor.float() for name, tensor in make_inputs(B=0).items()}
    assert_equal_results(run(partial(swiglu, backend="triton"), inputs), run(swiglu, inputs))
