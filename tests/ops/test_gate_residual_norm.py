import pytest
import torch
from common import (
    assert_same_in_float64,
    raises,
    randn,
)
from torch.nn import functional as F

from lumina_kernels import gate_residual_norm


def make_inputs(B=2, L=5, D=48, per_token=False):
    rows = (B, L, D) if per_token else (B, D)
    y, residual = randn(B, L, D), randn(B, L, D)
    y[:1] *= 0.003  # eps shows in the first sample
    residual[:1] *= 0.003
    inputs = {"y": y, "residual": residual, "gate": randn(*rows), "weight": randn(D)}
    return inputs | {"bias": randn(D), "scale": randn(*rows), "shift": randn(*rows)}


def eager(
    y, residual, gate=None, weight=None, bias=None, scale=None, shift=None, eps=1e-6, kind="layer"
):
    """A block of Flux, with its roundings."""
    gate, scale, shift = (
        t[:, None] if t is not None and t.ndim == 2 else t for t in (gate, scale, shift)
    )
    new = residual + (y if gate is None else gate * y)
    if kind == "layer":
        normed = F.layer_norm(new, new.shape[-1:], None, None, eps)
    else:
        normed = F.rms_norm(new, new.shape[-1:], None, eps)
    normed = normed if weight is None else normed * weight
    normed = normed if bias is None else normed + bias
    normed = normed if scale is None else normed * (1 + scale)
    return new, normed if shift is None else normed + shift


@pytest.mark.parametrize("kind", ("rms", "layer"))
def test_gradcheck(kind):
    leaves = [tensor.requires_grad_() for tensor in make_inputs(B=1, L=2, D=3).values()]
    assert torch.autograd.gradcheck(lambda *a: gate_residual_norm(*a, 1e-3, kind), leaves)


@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("kind", ("rms", "layer"))
def test_matches_torch(kind, per_token):
    inputs = make_inputs(per_token=per_token) | {"kind": kind, "eps": 1e-3}
    assert_same_in_float64(gate_residual_norm, eager, inputs)


def test_every_term_is_optional():
    inputs = make_inputs()
    for name in ("gate", "weight", "bias", "scale", "shift"):
        assert_same_in_float64(gate_residual_norm, eager, inputs | {name: None})
    bare = {name: inputs[name] for name in ("y", "residual")}
    assert_same_in_float64(gate_residual_norm, eager, bare)  # the defaults: "layer", 1e-6


def test_errors():
    good, op = make_inputs(), gate_residual_norm
    raises(ValueError, r"y must have shape \(B, L, D\)", op, good, y=randn(5, 48))
    raises(ValueError, "residual must have shape", op, good, residual=randn(1, 5, 48))
    raises(ValueError, "gate must have shape", op, good, gate=randn(48))
    raises(ValueError, "weight must have shape", op, good, weight=randn(1, 48))
    raises(ValueError, "bias must have shape", op, good, bias=randn(47))
    raises(ValueError, "scale must have shape", op, good, scale=randn(2, 1, 1))
    raises(TypeError, "shift must be float16", op, good, shift=torch.ones(2, 48).int())
    raises(ValueError, "kind must be one of rms, layer, got None", op, good, kind=None)
