"""Calls with tensors that are no plain ones, though their type is Tensor: they are dispatched."""

import pytest
import torch
from common import BACKENDS, DEVICE, randn
from torch.autograd.functional import jacobian

from lumina_kernels import gelu

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def _call(backend):
    return lambda x: gelu(x, "tanh", backend=backend)


@every_backend
def test_vectorised_jacobian(backend):
    x, call = randn(2, 4).float().to(DEVICE), _call(backend)
    torch.testing.assert_close(jacobian(call, x, vectorize=True), jacobian(call, x))


@every_backend
def test_batched_gradients_of_second_order_are_refused(backend):
    """As those are that are not batched: without them a gradient would lack a term."""
    x = randn(2, 4).float().to(DEVICE).requires_grad_()
    weight = torch.ones(3, 2, 4, device=DEVICE, requires_grad=True)
    (first,) = torch.autograd.grad(
        _call(backend)(x), x, weight, is_grads_batched=True, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="gelu_bwd has no gradient"):
        torch.autograd.grad(first.sum(), x)


@every_backend
def test_tensors_without_memory(backend):
    """Zeros of autograd, and what is left of a tensor after the transform it was made in."""
    zeros = torch._efficientzerotensor((2, 4), device=DEVICE)
    assert torch.equal(_call(backend)(zeros), torch.zeros(2, 4, device=DEVICE))
    kept, x = [], randn(2, 4).float().to(DEVICE)
    torch.func.grad(lambda x: kept.append(x) or x.sum())(x)
    with torch.no_grad():
        assert torch.equal(_call(backend)(kept[0]), _call(backend)(x))


@every_backend
def test_compiled_autograd(backend):
    x, call = randn(2, 4).float().to(DEVICE).requires_grad_(), _call(backend)
    (expected,) = torch.autograd.grad(call(x).sum(), x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        call(x).sum().backward()
    torch.testing.assert_close(x.grad, expected)
