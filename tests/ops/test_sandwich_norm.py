import pytest
import torch
from common import (
    assert_same_in_float64,
    raises,
    randn,
)
from torch.nn import functional as F

from lumina_kernels import sandwich_norm


def make_inputs(B=2, L=5, D=48, per_token=False):
    y = randn(B, L, D)
    y[:1] *= 0.01  # eps shows
    gate = randn(B, L, D) if per_token else randn(B, D)
    return {"y": y, "residual": randn(B, L, D), "weight": randn(D), "gate": gate}


def eager(y, residual, weight, gate, eps=1e-5, tanh=True):
    """Rounds after the norm, the tanh, the product and the sum, as models do."""
    normed = F.rms_norm(y, y.shape[-1:], weight, eps)
    if gate is None:
        return residual + normed
    gate = gate[:, None] if gate.ndim == 2 else gate
    return residual + (torch.tanh(gate) if tanh else gate) * normed


@pytest.mark.parametrize("tanh", (True, False))
def test_gradcheck(tanh):
    leaves = [tensor.requires_grad_() for tensor in make_inputs(B=2, L=2, D=3).values()]
    assert torch.autograd.gradcheck(lambda *args: sandwich_norm(*args, 1e-3, tanh), leaves)


@pytest.mark.parametrize("tanh", (True, False))
@pytest.mark.parametrize("per_token", (False, True))
def test_matches_torch(per_token, tanh):
    inputs = make_inputs(per_token=per_token) | {"eps": 1e-3, "tanh": tanh}
    assert_same_in_float64(sandwich_norm, eager, inputs)


def test_factors_are_optional():
    for none in ({"weight": None}, {"gate": None}, {"weight": None, "gate": None}):
        assert_same_in_float64(sandwich_norm, eager, make_inputs() | none)


def test_known_row():
    y = torch.tensor([[[3.0, -4.0]]])
    weight, gate = torch.tensor([2.0, 1.0]), torch.tensor([[50.0, 0.0]])
    out = sandwich_norm(y, torch.ones_like(y), weight, gate, 3.5)
    torch.testing.assert_close(out, torch.tensor([[[2.5, 1.0]]]))  # 1 + 1 * 3/4 * 2; gate closed
    out = sandwich_norm(y, torch.ones_like(y), weight, gate, 3.5, tanh=False)
    torch.testing.assert_close(out, torch.tensor([[[76.0, 1.0]]]))  # 1 + 50 * 3/4 * 2
    out = sandwich_norm(y, torch.ones_like(y), None, None, 3.5)
    torch.testing.assert_close(out, torch.tensor([[[1.75, 0.0]]]))


def test_errors():
    good, op = make_inputs(), sandwich_norm
    raises(ValueError, r"y must have shape \(B, L, D\)", op, good, y=randn(5, 48))
    raises(ValueError, r"residual .* \(2, 5, 48\), got", op, good, residual=randn(2, 6, 48))
    raises(ValueError, r"weight .* \(48,\), got \(1,\)", op, good, weight=randn(1))
    raises(TypeError, "residual must be a tensor, got NoneType", op, good, residual=None)
    raises(ValueError, r"gate .* \(2, 48\) or \(2, 5, 48\)", op, good, gate=randn(48))
    raises(TypeError, "gate must be float16.*bool", op, good, gate=randn(2, 48) > 0)
