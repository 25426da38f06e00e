"""Writes in place between what a pattern joins, which nothing may move past."""

import pytest
import torch
import torch.nn.functional as F
from function_blocks import B, D, L, check, half, layer, root
from torch import randn


def before_the_use(p, x, y, g):
    n = layer(x)
    x.add_(3)
    return n * (1 + g), root(x)


def view_of_the_input(p, x, y, g):
    n = root(x[:, 1:])
    x[:, 2].mul_(2)
    return n * (1 + g), x + g * y


def base_of_a_view(p, x, y, g):
    part = x[:, :3]
    x.mul_(2)
    return root(part) * (1 + g)


def residual_then_norm(p, x, y, g):
    h = x + g * y
    n = root(h)
    h.mul_(2)
    return h, n * (1 + g)


def row_of_the_residual(p, x, y, g):
    """Between the sum and its norm."""
    h = x + g * y
    h[:, 0].zero_()
    return h, root(h) * (1 + g)


def row_of_the_norm(p, x, y, g):
    """Between it and its modulation."""
    n = layer(x)
    n[:, 0].zero_()
    return n * (1 + g)


def row_of_the_rotated(p, x, y, g):
    """Between the norm and the rotation."""
    q = root(x)[:, None]
    q[:, :, 1].zero_()
    q = q * g[:, None] + half(q) * g[:, None].roll(1, -1)
    return F.scaled_dot_product_attention(q, q, y[:, None])


def slice_of_the_residual(p, x, y, g):
    h = x + g * y
    h[:, :2] = y[:, :2]
    return h, layer(h) * (1 + g)


def slice_before_the_norm(p, x, y, g):
    h = x + g * y
    n = layer(h) * (1 + g)
    h[:, 1:3] *= 2
    return h, n


def gate_between(p, x, y, g):
    term = g.tanh() * root(y)
    y.zero_()
    g.add_(1)
    return x + term, root(x + term) * (1 + g)


def filled(p, x, y, g):
    out = torch.empty_like(x)
    out[:, :2] = root(x[:, :2])
    out[:, 2:] = layer(x[:, 2:]) * (1 + g)
    return root(out), x + g * out


def read_while_filled(p, x, y, g):
    out = torch.zeros_like(x)
    out[:, :2] = layer(x[:, :2])
    early = out * 1.0
    out[:, 2:] = y[:, 2:]
    return early, root(out)


def filled_by_another_name(p, x, y, g):
    out = torch.zeros_like(x)
    rows = out.view(-1, out.shape[-1])
    out[:, :2] = layer(x[:, :2])
    return root(rows), out


def overlapping(p, x, y, g):
    out = x.clone()
    out[:, 1:] = out[:, :-1] + y[:, 1:]
    out[:, :3] += 1
    return layer(out) * (1 + g)


def of_the_copy(p, x, y, g):
    kept = x.clone()
    x.zero_()
    return (kept * torch.rsqrt(kept.square().mean(-1, keepdim=True) + 1e-6)) * (1 + g), kept + g * y


def result_is_written(p, x, y, g):
    """And what it was made of stays."""
    n = layer(x) * (1 + g)
    n[:, 0].fill_(1)
    h = x + g * n
    h += 1
    return n, h, x + y


def dropped(p, x, y, g):
    x.copy_(layer(x) * (1 + g))
    return x + g * y


def mask_that_was_filled(p, x, y, g):
    """Before it is read: the attention may be replaced, and is."""
    mask = torch.zeros(B, L, dtype=torch.bool)
    mask.select(0, 0)[:3].fill_(True)
    mask.select(0, 1).fill_(True)
    q, k, v = x[:, None], y[:, None], (x + y)[:, None]
    return F.scaled_dot_product_attention(q, k, v, mask[:, None, None])


def mask_between(p, x, y, g):
    mask = torch.ones(B, 1, 1, L, dtype=torch.bool)
    view = mask.expand(B, 1, L, L)
    mask[0].select(-1, 1).fill_(False)
    out = F.scaled_dot_product_attention(x[:, None], y[:, None], x[:, None], view)
    mask.fill_(True)
    return out + F.scaled_dot_product_attention(x[:, None], y[:, None], x[:, None], view)


def copy_before_a_row(p, x, y, g):
    h = layer(x) * (1 + g)
    kept = h.clone()
    h[:, 0].zero_()
    return kept + h


def another_name_of_the_norm(p, x, y, g):
    n = layer(x) * (1 + g)
    rows = n.flatten(1)
    n[:, :2].fill_(1)
    return rows * 2


def slice_and_row(p, x, y, g):
    """The second between the first and the norm, which is of the first."""
    h = x * 2
    h[:, :2].fill_(1)
    inverse = torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)
    h.select(0, 0).mul_(3)
    return h * inverse * (1 + g)


def residual_and_row(p, x, y, g):
    h = x + g * y
    n = layer(h) * (1 + g)
    inverse = torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)
    h.select(0, 0).mul_(3)
    return n, h * inverse * (1 + g)


def copy_by_its_name(p, x, y, g):
    n = layer(x) * (1 + g)
    kept = torch.ops.aten._to_copy(n)
    n.mul_(3)
    return kept + n


def slice_of_another(p, x, y, g):
    a, b = x * 1, x * 2
    a[:, :2].copy_(b[:, :2])
    b[:, 2:].mul_(3)
    return layer(a) * (1 + g), b


def scale_after_a_write(p, x, y, g):
    """By another name, which does not come from the write."""
    scale = g * 1
    rows = scale.flatten(1)
    h = x + g * y
    scale.mul_(2)
    return h, layer(h) * (1 + rows.sin()[:, None])


def filled_in_turns(p, x, y, g):
    mask = torch.zeros(B, L, dtype=torch.bool)
    mask[:, :2] = True
    mask[0, :1] = False
    return torch.where(mask[..., None], root(x) * (1 + g), y)


def filled_by_a_later_name(p, x, y, g):
    h = x * 2
    h[:, :1] = g
    rows = h.view(-1, D)
    rows[1:2] = y[0, :1]
    return root(h) * (1 + g)


def in_turns(p, x, y, g):
    x += g * y
    n = layer(x) * (1 + g)
    x += g * n
    return root(x) * (1 + g), n


WRITES = (
    before_the_use, view_of_the_input, base_of_a_view, residual_then_norm, row_of_the_residual,
    row_of_the_norm, row_of_the_rotated,
    slice_of_the_residual, slice_before_the_norm, gate_between, filled, read_while_filled,
    filled_by_another_name, overlapping, of_the_copy, result_is_written, dropped, in_turns,
    mask_that_was_filled, mask_between, copy_before_a_row, another_name_of_the_norm, slice_and_row,
    residual_and_row, copy_by_its_name, slice_of_another, scale_after_a_write,
    filled_in_turns, filled_by_a_later_name,
)  # fmt: skip


@pytest.mark.parametrize("function", WRITES)
def test_write(function):
    """Nothing moves past one, and the caller sees what is written to the inputs."""
    check(function, randn(B, L, D), randn(B, L, D), randn(B, 1, D))


@pytest.mark.parametrize(("function", "attentions"), ((mask_that_was_filled, 1), (mask_between, 2)))
def test_a_mask_that_was_written_before(function, attentions):
    ops = check(function, randn(B, L, D), randn(B, L, D), randn(B, 1, D))
    assert ops == ["gqa_attention"] * attentions
