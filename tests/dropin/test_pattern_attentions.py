"""Attentions with the masks, repeated heads and arguments of models."""

import pytest
import torch
import torch.nn.functional as F
from function_blocks import B, D, H, K, L, check, half, layer, root, vectors
from torch import rand, randn


def ragged(*lengths):
    return torch.arange(L) < torch.tensor(lengths)[:, None]


def least(mask):
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)


MASKS = {
    "keys": lambda: ragged(5, 2)[:, None, None],
    "keys of one for all": lambda: ragged(3)[:, None, None],
    "two dimensions": lambda: rand(L, L) < 0.7,
    "rows": lambda: (rand(B, 1, L, L) < 0.7) | torch.eye(L).bool(),
    "heads": lambda: (rand(B, H, L, L) < 0.7) | torch.eye(L).bool(),
    "expanded": lambda: ragged(5, 2)[:, None, None].expand(B, H, L, L),
    "holes": lambda: (torch.arange(L) % 2 == 0).expand(B, 1, 1, L),
    "nothing for one sample": lambda: ragged(5, 0)[:, None, None],
    "nothing for one row": lambda: (torch.arange(L)[:, None] != 2).expand(B, 1, L, L),
    "ones and zeros": lambda: ragged(5, 2)[:, None, None].float(),
    "bias": lambda: randn(B, 1, L, L),
    "bias of heads": lambda: randn(1, H, L, L),
    "bias of keys": lambda: randn(B, 1, 1, L),
    "thousands": lambda: (1 - ragged(5, 2)[:, None, None].float()) * -1e4,
    "thousands for all": lambda: torch.full((B, 1, 1, L), -1e4) + randn(B, 1, 1, L),
    "least": lambda: least(ragged(5, 2))[:, None, None],
    "least for all": lambda: least(ragged(5, 0))[:, None, None],
    "infinite": lambda: torch.where(ragged(5, 2), 0.0, -torch.inf)[:, None, None],
}


@pytest.mark.parametrize("how", MASKS)
def test_mask(how):
    def function(p, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask)

    assert check(function, *randn(3, B, H, L, K), MASKS[how]()) == ["gqa_attention"]


def test_made_masks():
    """Masks that a block makes of lengths."""

    def function(p, q, k, v, lengths):
        keys = torch.arange(k.shape[2])[None] < lengths[:, None]
        bias = (1 - keys.float())[:, None, None] * -1e4
        both = keys[:, None, :, None] & keys[:, None, None]
        return [
            F.scaled_dot_product_attention(q, k, v, m) for m in (keys[:, None, None], bias, both)
        ]

    check(function, *randn(3, B, H, L, K), torch.tensor([5, 2]))


CALLS = {
    "causal": {"is_causal": True}, "scale": {"scale": 0.7}, "no scale": {"scale": 1.0},
    "grouped": {"enable_gqa": True}, "dropout": {"dropout_p": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("how", CALLS)
def test_arguments(how):
    def function(p, q, k, v):
        k, v = (x[:, : H // 2] if how == "grouped" else x for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, **CALLS[how])

    check(function, *randn(3, B, H, L, K), training=how == "dropout")


def test_dropout():
    """In training, at the same places."""

    def function(p, x, y, g):
        return F.dropout(layer(x) * (1 + g), 0.5) + F.dropout(x + g * y, 0.5, False)

    check(function, randn(B, L, D), randn(B, L, D), randn(B, 1, D), training=True)


@pytest.mark.parametrize("shape", ((B, H, L, K + 4), (B, 1, L, K), (1, H, L, K)))
def test_other_values(shape):
    """Of another head_dim, or of one head or sample for all."""

    def function(p, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    check(function, *randn(2, B, H, L, K), randn(shape))


def test_three_dimensions():
    def function(p, q, k, v):
        return F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v)))

    check(function, *randn(3, B, H, L, K))


REPEATS = {
    "interleaved": lambda x: x.repeat_interleave(2, 1),
    "expanded": lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(B, H, L, K),
    "stacked": lambda x: torch.stack((x, x), 2).flatten(1, 2),
    "in turns": lambda x: x.repeat(1, 2, 1, 1),
    "joined": lambda x: torch.cat((x, x), 1),
    "reversed": lambda x: x.repeat_interleave(2, 1).flip(1),
}


@pytest.mark.parametrize("how", REPEATS)
def test_repeated_heads(how):
    """Head 1 of four has the keys of head 0 of two, or of head 1."""

    def function(p, q, k, v):
        return F.scaled_dot_product_attention(q, REPEATS[how](k), REPEATS[how](v))

    check(function, randn(B, H, L, K), *randn(2, B, H // 2, L, K))


TEXTS = {
    "tanh": lambda a, b, g: a + b * g.tanh(),
    "bare": lambda a, b, g: a + b * g,
    "sigmoid": lambda a, b, g: a + b * g.sigmoid(),
    "minus": lambda a, b, g: a - b * g.tanh(),
    "gated both": lambda a, b, g: (a + b) * g.tanh(),
    "gated image": lambda a, b, g: a * g.tanh() + b,
}


@pytest.mark.parametrize("how", TEXTS)
@pytest.mark.parametrize("is_other", (False, True))
def test_text(how, is_other):
    """With the queries of the image, or with others."""

    def function(p, q, k, v, y, mask):
        q, k, v, y = (x.transpose(1, 2) for x in (q, k, v, y))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        b = F.scaled_dot_product_attention(k if is_other else q, y, y, mask).transpose(1, 2)
        return TEXTS[how](a, b, p["g"].view(1, 1, -1, 1))

    qkvy = randn(4, B, L, H, K)
    check(function, *qkvy, ragged(5, 2)[:, None, None], g=3 * randn(H))


def test_batch_grows():
    """A patched block runs with one sample and with three, few tokens and many."""

    def function(p, x, y, q, cos, sin, mask):
        h = x + p["g"] * y
        n = layer(h) * (1 + y[:, :1]) + y[:, 1:2]
        q = root(q) * cos + half(root(q)) * sin
        return h, n, F.scaled_dot_product_attention(q, q, q, mask[:, None, None])

    def inputs(batch, length):
        mask = torch.arange(length) < torch.arange(length, length - batch, -1)[:, None]
        tables = randn(2, length, K)
        return *randn(2, batch, length, D), randn(batch, H, length, K), *tables, mask

    sizes = (1, 5), (3, 5), (3, 9), (1, 9), (2, D), (D, K)
    first, *more = (inputs(*size) for size in sizes)
    check(function, *first, more=more, **vectors("g"))
