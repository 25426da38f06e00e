"""Norms, residuals and activations that are one in disguise, or look like one and are not."""

import pytest
import torch
import torch.nn.functional as F
from function_blocks import B, D, L, check, check_bfloat16, layer, root, vectors
from torch import randn


@pytest.mark.parametrize("norm", (layer, root))
def test_kind_of_norm(norm):
    """The mean matters."""
    assert check(lambda p, x: norm(x), randn(B, L, D) + 2) == ["norm_modulate"]


WRITTEN_OUT = {
    "rsqrt": lambda x, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps),
    "root": lambda x, eps: x / torch.sqrt(eps + (x * x).mean(-1, keepdim=True)),
    "power": lambda x, eps: x * (x.square().mean(-1, True) + eps).pow(-0.5),
    "one over": lambda x, eps: x * (1 / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()),
    "sum": lambda x, eps: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / D + eps),
    "float": lambda x, eps: (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + eps)).to(x),
}


@pytest.mark.parametrize("how", WRITTEN_OUT)
@pytest.mark.parametrize("eps", (1e-6, 0.03))
def test_written_out(how, eps):
    x = 0.1 * randn(B, L, D)
    found = check(lambda p, x: WRITTEN_OUT[how](x, eps) * p["w"], x, **vectors("w"))
    assert found == ["norm_modulate"]


OTHER_NORMS = {
    "normalize": lambda x: F.normalize(x, dim=-1, eps=0.5) * D**0.5,
    "clamped": lambda x: x * x.pow(2).mean(-1, keepdim=True).clamp(min=0.02).rsqrt(),
    "bounded": lambda x: x / x.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12),
    "absolute": lambda x: x / (x.abs().mean(-1, keepdim=True) + 0.01),
    "eps outside": lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 0.1),
    "variance": lambda x: x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6),
    "of others": lambda x: x * torch.rsqrt(x.roll(1, 1).pow(2).mean(-1, keepdim=True) + 1e-6),
    "without one": lambda x: x * torch.rsqrt(x[..., 1:].pow(2).mean(-1, keepdim=True) + 1e-6),
    "weighted": lambda x: x * torch.rsqrt((x.square() * x.sigmoid()).mean(-1, True) + 1e-6),
    "negative": lambda x: -x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
}


@pytest.mark.parametrize("how", OTHER_NORMS)
def test_no_rms_norm(how):
    x = 0.1 * randn(B, L, D)
    x[0, 0] *= 1e-3  # where a bound would be reached
    x[1, 2] = 0
    check(lambda p, x: OTHER_NORMS[how](x), x)


AXES = {
    "tokens": lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
    "all": lambda x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-6),
    "two": lambda x: F.layer_norm(x, x.shape[-2:]),
    "two rms": lambda x: F.rms_norm(x, x.shape[-2:]),
    "transposed": lambda x: layer(x.transpose(1, 2)).transpose(1, 2),
}


@pytest.mark.parametrize("how", AXES)
def test_axis(how):
    check(lambda p, x: AXES[how](x), randn(B, D, D))


@pytest.mark.parametrize("norm", (layer, root))
def test_eps(norm):
    x = 0.1 * randn(B, L, D)
    assert check(lambda p, x: norm(x, 0.03) * (1 + p["s"]), x, **vectors("s")) == ["norm_modulate"]


@pytest.mark.parametrize("check", (check, check_bfloat16))
def test_eps_none(check):
    """It is that of a dtype."""
    x = 2e-4 * randn(B, L, D)
    assert check(lambda p, x: root(x, None), x) == ["norm_modulate"]


@pytest.mark.parametrize("norm", (layer, root))
def test_one_plus_weight(norm):
    def function(p, x):
        return norm(x) * (1 + p["w"]) + p["b"]

    assert check(function, randn(B, L, D), **vectors("w", "b")) == ["norm_modulate"]


MODULATIONS = {
    "one": lambda n, a, b: n * (1 + a) + b,
    "two": lambda n, a, b: n * (2 + a) + b,
    "minus": lambda n, a, b: n * (1 - a) - b,
    "times": lambda n, a, b: n * (1 + 3 * a) + b,
    "twice": lambda n, a, b: n * (1 + torch.add(a, a)) + b,
    "alpha": lambda n, a, b: torch.add(n * torch.add(a, 1, alpha=3), b, alpha=2),
    "bare": lambda n, a, b: n * a + b,
    "addcmul": lambda n, a, b: torch.addcmul(b, n, 1 + a),
    "value": lambda n, a, b: torch.addcmul(b, n, 1 + a, value=2),
    "shift first": lambda n, a, b: (n + b) * (1 + a),
    "same": lambda n, a, b: n * (1 + a) + a,
    "squared": lambda n, a, b: n * (1 + a) * (1 + a) + b,
    "one of itself": lambda n, a, b: n * (1 + n) + b,
}


@pytest.mark.parametrize("how", MODULATIONS)
def test_modulation(how):
    """Neither 2 + scale, nor one in the place of the other."""

    def function(p, x, a, b):
        return MODULATIONS[how](layer(x), a, b), MODULATIONS[how](root(x), a, b)

    x, a, b = randn(B, L, D), randn(B, 1, D), randn(B, 1, D)
    assert "norm_modulate" in check(function, x, a, b)


SHAPES = {
    "channels": (D,), "sample": (B, 1, D), "tokens": (1, D, D), "tokens of two": (D, D),
    "all": (B, D, D), "token": (B, D, 1), "token of two": (D, 1), "number": (1,), "none": (),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_modulation(shape):
    """As many tokens as channels."""

    def function(p, x, y, scale, shift, gate):
        h = x + gate * y
        return layer(x) * (1 + scale) + shift, h, root(h) * (1 + scale), x + gate * root(y)

    x, y = randn(2, B, D, D)
    assert "norm_modulate" in check(function, x, y, *(randn(SHAPES[shape]) for _ in range(3)))


GATES = {
    "none": lambda p, x, y, g: x + root(y),
    "bare": lambda p, x, y, g: x + g * root(y),
    "tanh": lambda p, x, y, g: x + g.tanh() * root(y),
    "tanh of channels": lambda p, x, y, g: x + p["g"].tanh() * root(y) * p["w"],
    "sigmoid": lambda p, x, y, g: x + g.sigmoid() * root(y),
    "plain": lambda p, x, y, g: x + g * y,
    "plain tanh": lambda p, x, y, g: x + g.tanh() * y,
    "one more": lambda p, x, y, g: x + (1 + g) * y,
    "minus": lambda p, x, y, g: x - g * y,
    "both": lambda p, x, y, g: g * x + (1 - g) * y,
    "alpha": lambda p, x, y, g: torch.add(x, g * y, alpha=2),
    "value": lambda p, x, y, g: torch.addcmul(x, g, y, value=-1),
    "of itself": lambda p, x, y, g: x + g * x,
    "layer": lambda p, x, y, g: x + g.tanh() * layer(y),
    "modulated": lambda p, x, y, g: x + g.tanh() * (root(y) * (1 + g)),
    "eps": lambda p, x, y, g: x + g.tanh() * root(0.1 * y, 0.03),
}


@pytest.mark.parametrize("how", GATES)
def test_gate(how):
    """A gate of 3 is far from its tanh. A norm follows, with another eps."""

    def function(p, x, y, g):
        h = GATES[how](p, x, y, g)
        return h, root(0.1 * h, 0.02) * (1 + g), layer(h) * p["w"] + p["g"]

    x, y, gate = randn(B, L, D), randn(B, L, D), 3 * randn(B, 1, D)
    assert check(function, x, y, gate, **vectors("w", "g"))


def test_two_norms_of_one_residual():
    def function(p, x, y, g):
        h = x + g * y
        return h, layer(h) * (1 + g), root(h) * p["w"], h + g * root(h)

    found = check(function, randn(B, L, D), randn(B, L, D), randn(B, 1, D), **vectors("w"))
    assert "norm_modulate" in found


def test_norm_of_a_part_of_the_residual():
    def function(p, x, y, g):
        h = x + g * y
        return h, layer(h[:, 2:]) * (1 + g)

    assert check(function, randn(B, L, D), randn(B, L, D), randn(B, 1, D))


def test_unrounded_residual():
    """The norm reads the sum before it is rounded."""

    def function(p, x, y, g):
        h = x.float() + g.float() * y.float()
        return h.to(x.dtype), (root(h) * (1 + g.float())).to(x.dtype)

    check_bfloat16(function, randn(B, 64, D), randn(B, 64, D), randn(B, 1, D))


PROMOTED = {
    "gate": lambda p, x, y, m: x + m * y,
    "addcmul": lambda p, x, y, m: torch.addcmul(x, m.to(x), y),
    "scale": lambda p, x, y, m: layer(x) * (1 + m),
    "shift": lambda p, x, y, m: root(x) + m,
    "weight": lambda p, x, y, m: root(x) * p["w"],
    "rounded weight": lambda p, x, y, m: WRITTEN_OUT["float"](x, 1e-6) * p["w"],
    "sandwich": lambda p, x, y, m: x + m.tanh() * root(y),
    "residual": lambda p, x, y, m: (h := x + y, layer(h) * (1 + m)),
    "all": lambda p, x, y, m: (h := x + m * y, layer(h).float() * (1 + m)),
    "back": lambda p, x, y, m: ((h := (x + m * y).to(x)), (layer(h.float()) * (1 + m)).to(x)),
}


@pytest.mark.parametrize("how", PROMOTED)
def test_float32_beside_bfloat16(how):
    """What is float32 makes its result float32."""
    x, y = randn(2, B, 64, D)
    check_bfloat16(PROMOTED[how], x, y, randn(B, 1, D), kept=(2, "w"), **vectors("w"))


UNITS = {
    "swiglu": lambda a, b: F.silu(a) * b,
    "other order": lambda a, b: b * F.silu(a),
    "both": lambda a, b: F.silu(a) * F.silu(b),
    "of itself": lambda a, b: F.silu(a) * a,
    "sigmoid": lambda a, b: torch.sigmoid(a) * a * b,
    "geglu": lambda a, b: F.gelu(a) * b,
    "tanh": lambda a, b: F.gelu(a, approximate="tanh") * b,
    "chunks": lambda a, b: F.silu(torch.cat((a, b), -1).chunk(2, -1)[1]) * a,
    "broadcast": lambda a, b: F.silu(a[:, :1]) * b,
}


@pytest.mark.parametrize("how", UNITS)
def test_activation(how):
    check(lambda p, a, b: UNITS[how](a, b), *(3 * randn(2, B, L, D)))
