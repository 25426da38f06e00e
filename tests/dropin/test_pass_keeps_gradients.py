"""What a block means for gradients beyond its numbers: what autograd was told stays."""

import pytest
import torch
import torch.nn.functional as F
from checks import deviation
from function_blocks import layer
from small_blocks import called, gradients, heads, pair
from torch import randn
from torch.utils.checkpoint import checkpoint


class Quarter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return d / 4


def function(w, x, g):
    return layer(Quarter.apply(x)) * w


def hook(w, x, g):
    h = x * w
    h.register_hook(lambda d: d / 4)
    return layer(h) * 2


def learned_rotation(w, x, g):
    q, angle = heads(x), torch.arange(5)[:, None] * w
    a, b = q.chunk(2, -1)
    q = q * angle.cos() + torch.cat((-b, a), -1) * angle.sin()
    return F.scaled_dot_product_attention(q, q, q)


def detached_statistics(w, x, g):
    return x * torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + 1e-6) * w


def statistics_without_gradient(w, x, g):
    with torch.no_grad():
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return x * inverse * w


def detached_scale(w, x, g):
    return x + layer(x) * (1 + g).detach() * w


def detached_activation(w, x, g):
    return F.silu(x).detach() * (w * x.flip(1))


def detached_term(w, x, g):
    return layer(x + (g * x.flip(1)).detach()) * w


def detached_rotation(w, x, g):
    q = heads(x)
    a, b = q.detach().chunk(2, -1)
    table = torch.arange(5.0)[:, None] * torch.ones(8)
    q = q.detach() * table.cos() + torch.cat((-b, a), -1) * table.sin()
    return F.scaled_dot_product_attention(q, heads(x * w), heads(x))


def detached_heads(w, x, g):
    q = x.unflatten(-1, (4, 2)).transpose(1, 2)
    k = (x * w).unflatten(-1, (4, 2))[:, :, :2].detach().repeat_interleave(2, 2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, k)


def checkpointed(w, x, g):
    return checkpoint(lambda h: layer(h) * w, x, use_reentrant=False)


def data(w, x, g):
    return layer(x * w.data) * w


GRADIENTS = (
    function, hook, learned_rotation, detached_statistics, statistics_without_gradient,
    detached_scale, detached_activation, detached_term, detached_rotation, detached_heads,
    checkpointed, data,
)  # fmt: skip


@pytest.mark.parametrize("function", GRADIENTS)
def test_gradients(function):
    model, patched, _ = pair(function)
    x, g = randn(2, 5, 8), randn(2, 1, 8)
    for got, want in zip(gradients(patched, x, g), gradients(model, x, g), strict=True):
        assert (got is None) == (want is None)
        assert want is None or not want.any() or deviation(got, want) <= 2e-5


def test_gradients_of_an_attention_have_its_error():
    """Its backward takes the rounding of the result into account, where one is asked for."""
    model, patched, report = pair(lambda w, q, k, v: F.scaled_dot_product_attention(q, k, v))
    torch.manual_seed(0)
    inputs = [(randn(1, 2, 128, 64) * s).bfloat16() for s in (2, 2, 1)]
    truth, eager, got = (
        gradients(m, *xs)[1:4]
        for m, xs in ((model, [x.double() for x in inputs]), (model, inputs), (patched, inputs))
    )
    assert report.rows()[0]["op"] == "gqa_attention"
    for own, other, exact in zip(got, eager, truth, strict=True):
        assert (own - exact).norm() <= 1.02 * (other - exact).norm()


def test_what_is_unusual_is_left_with_a_reason():
    patched = pair(function)[1]
    with pytest.warns(UserWarning, match="a graph is left as it is, the pass does not follow auto"):
        patched(randn(2, 5, 8).requires_grad_(), None)
    patched, report = pair(checkpointed)[1:]
    with pytest.warns(UserWarning, match="follow tag_activation_checkpoint, which around whole"):
        patched(randn(2, 5, 8), None)
    assert [(row["kind"], row["op"]) for row in report.rows()] == [("graph", None)]


def test_gradients_inside_no_grad():
    def guided(w, x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (d,) = torch.autograd.grad((layer(z) * z**2).sum(), z)
        return x - d

    model, patched, _ = pair(guided)
    x = randn(2, 5, 8)
    with torch.no_grad():
        assert deviation(called(patched, x), model(x)) <= 2e-5
