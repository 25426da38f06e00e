import pytest
import test_sandwich_norm
import torch
from common import (
    assert_same_in_float64,
    raises,
    randn,
)
from torch.nn import functional as F

from lumina_kernels import sandwich_norm_chain


def make_inputs(B=2, L=5, D=48, per_token=False):
    rows = (B, L, D) if per_token else (B, D)
    y = randn(B, L, D)
    y[:1] *= 0.01  # eps shows
    return {
        "y": y,
        "residual": randn(B, L, D),
        "weight": randn(D),
        "gate": randn(*rows),
        "next_weight": randn(D),
        "next_scale": randn(*rows),
    }


def eager(y, residual, weight, gate, next_weight, next_scale, eps=1e-5, tanh=True):
    """Two sub-layers of a model, with its roundings."""
    new = test_sandwich_norm.eager(y, residual, weight, gate, eps, tanh)
    normed = F.rms_norm(new, new.shape[-1:], next_weight, eps)
    if next_scale is not None:
        normed = normed * (1 + (next_scale[:, None] if next_scale.ndim == 2 else next_scale))
    return new, normed


@pytest.mark.parametrize("tanh", (True, False))
def test_gradcheck(tanh):
    leaves = [tensor.requires_grad_() for tensor in make_inputs(B=1, L=2, D=3).values()]
    assert torch.autograd.gradcheck(lambda *args: sandwich_norm_chain(*args, 1e-3, tanh), leaves)


@pytest.mark.parametrize("tanh", (True, False))
@pytest.mark.parametrize("per_token", (False, True))
def test_matches_torch(per_token, tanh):
    inputs = make_inputs(per_token=per_token) | {"eps": 1e-3, "tanh": tanh}
    assert_same_in_float64(sandwich_norm_chain, eager, inputs)


@pytest.mark.parametrize("left_out", ("weight", "gate", "next_weight", "next_scale"))
def test_factors_are_optional(left_out):
    assert_same_in_float64(sandwich_norm_chain, eager, make_inputs() | {left_out: None})


def test_errors():
    good, chain = make_inputs(), sandwich_norm_chain
    raises(ValueError, r"y must have shape \(B, L, D\)", chain, good, y=randn(5, 48))
    raises(ValueError, "residual must have shape", chain, good, residual=randn(2, 1, 48))
    raises(ValueError, "weight must have shape", chain, good, weight=randn(2, 48))
    raises(ValueError, "gate must have shape", chain, good, gate=randn(1, 48))
    raises(ValueError, r"next_weight must have shape \(48,\)", chain, good, next_weight=randn(47))
    raises(ValueError, r"next_scale must have shape", chain, good, next_scale=randn(2, 5, 1))
    raises(TypeError, "next_scale must be float16", chain, good, next_scale=torch.ones(2, 48).int())
