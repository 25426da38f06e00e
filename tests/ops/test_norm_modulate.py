import pytest
import torch
from common import (
    assert_same_in_float64,
    raises,
    randn,
)
from torch.nn import functional as F

from lumina_kernels import norm_modulate

OPTIONAL = ("weight", "bias", "scale", "shift")


def make_inputs(B=2, L=5, D=48, per_token=False):
    rows = (B, L, D) if per_token else (B, D)
    x = randn(B, L, D) + 0.5
    x[:1] *= 0.01  # eps shows
    return {
        "x": x,
        "weight": randn(D),
        "bias": randn(D),
        "scale": randn(*rows),
        "shift": randn(*rows),
    }


def eager(x, weight=None, bias=None, scale=None, shift=None, eps=1e-5, kind="rms"):
    """Rounds after every operation, as models do."""
    if kind == "layer":
        x = F.layer_norm(x, x.shape[-1:], None, None, eps)
    else:
        x = F.rms_norm(x, x.shape[-1:], None, eps)
    x = x if weight is None else x * weight
    x = x if bias is None else x + bias
    if scale is not None:
        x = x * (1 + (scale[:, None] if scale.ndim == 2 else scale))
    if shift is not None:
        x = x + (shift[:, None] if shift.ndim == 2 else shift)
    return x


@pytest.mark.parametrize("kind", ("rms", "layer"))
def test_gradcheck(kind):
    inputs = make_inputs(B=1, L=2, D=3)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(lambda *args: norm_modulate(*args, 1e-3, kind), leaves)


@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("kind", ("rms", "layer"))
def test_matches_torch(kind, per_token):
    inputs = make_inputs(per_token=per_token)
    assert_same_in_float64(norm_modulate, eager, inputs | {"kind": kind, "eps": 1e-3})


@pytest.mark.parametrize("left_out", OPTIONAL)
def test_every_term_is_optional(left_out):
    inputs = make_inputs()
    del inputs[left_out]
    assert_same_in_float64(norm_modulate, eager, inputs)
    bare = {"x": inputs["x"]}
    assert_same_in_float64(norm_modulate, eager, bare)


def test_known_rows():
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], dtype=torch.float64)
    rms = norm_modulate(x, eps=0.5)  # mean square 12.5
    torch.testing.assert_close(rms, x / 13**0.5)
    layer = norm_modulate(x, eps=0.75, kind="layer")  # variance 0.25
    torch.testing.assert_close(layer, torch.tensor([[[-0.5, 0.5], [0.0, 0.0]]]).double())


def test_errors():
    good, op = make_inputs(), norm_modulate
    raises(ValueError, r"x must have shape \(B, L, D\), got \(5, 48\)", op, good, x=randn(5, 48))
    raises(TypeError, "x must be float16.*int64", op, good, x=torch.ones(2, 5, 48).long())
    raises(TypeError, "weight must be a tensor, got float", op, good, weight=1.0)
    raises(ValueError, r"weight .* shape \(48,\), got \(47,\)", op, good, weight=randn(47))
    raises(ValueError, "bias must have shape", op, good, bias=randn(1, 48))
    rule = r"scale .* \(2, 48\) or \(2, 5, 48\) or \(2, 1, 48\), got \(1, 1, 48\)"
    raises(ValueError, rule, op, good, scale=randn(1, 1, 48))
    raises(ValueError, "shift must have shape", op, good, shift=randn(1, 48))
    raises(ValueError, "shift must be on .*, got meta", op, good, shift=randn(2, 48).to("meta"))
    raises(ValueError, "kind must be one of rms, layer, got 'batch'", op, good, kind="batch")
    raises(ValueError, "unknown", op, good, backend="numpy")
