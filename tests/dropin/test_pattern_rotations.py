"""Rotations in the ways that models write them, and what is none."""

import pytest
import torch
import torch.nn.functional as F
from function_blocks import B, H, K, L, check, half, layer, root
from torch import randn


def pairs(x):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), -1).flatten(-2)


def complex_pairs(x, cos, sin):
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * torch.complex(cos, sin)).flatten(-2)


def of_halves(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def of_pairs(x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def written_pairs(x, cos, sin):
    out = torch.empty_like(x)
    out[..., ::2] = x[..., ::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 1::2] * cos + x[..., ::2] * sin
    return out


def partly(x, cos, sin):
    return torch.cat((of_halves(x[..., : K - 2], cos, sin), x[..., K - 2 :]), -1)


# name: rotation, width of its tables, whether there is an op for it
ROTATIONS = {
    "half": (lambda x, c, s: x * c + half(x) * s, K, True),
    "pairs": (lambda x, c, s: x * c + pairs(x) * s, K, True),
    "halves": (of_halves, K // 2, True),
    "even and odd": (of_pairs, K // 2, True),
    "complex": (complex_pairs, K // 2, True),
    "written": (written_pairs, K // 2, True),
    "partly": (partly, K // 2 - 1, True),
    "other sign": (lambda x, c, s: x * c - half(x) * s, K, False),
    "swapped": (lambda x, c, s: x * s + half(x) * c, K, True),
    "half of pairs": (lambda x, c, s: x * c + half(pairs(x)) * s, K, False),
    "not turned": (lambda x, c, s: x * c + x * s, K, False),
    "one sign": (lambda x, c, s: x * c + half(x).abs() * s, K, False),
    "of itself": (lambda x, c, s: x * c + half(x * c) * s, K, False),
    "twice": (lambda x, c, s: (y := x * c + half(x) * s) * c + half(y) * s, K, False),
}


@pytest.mark.parametrize("how", ROTATIONS)
@pytest.mark.parametrize("heads_first", (False, True))
def test_rotation(how, heads_first):
    """Tables of random numbers are no angles: their halves differ, and so do their rows."""
    rotate, width, is_one = ROTATIONS[how]

    def function(p, q, k, v, cos, sin):
        if heads_first:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            q, k = (rotate(x, cos, sin) for x in (q, k))
        else:
            q, k = (rotate(x, cos[:, None], sin[:, None]) for x in (q, k))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)

    qkv = randn(3, B, L, H, K)
    found = check(function, *qkv, *randn(2, L, width))
    assert "gqa_attention" in found and ("rope_table" in found) == is_one


TABLES = {
    "of samples": ((B, 1, L, K),) * 2,
    "of heads": ((H, L, K),) * 2,
    "of the channel": ((1, K),) * 2,
    "one for all": ((L, 1),) * 2,
    "of two shapes": ((L, K), (B, 1, L, K)),
}


@pytest.mark.parametrize("how", TABLES)
def test_tables(how):
    def function(p, q, k, v, cos, sin):
        q, k = (x * cos + half(x) * sin for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v)

    check(function, *randn(3, B, H, L, K), *(randn(shape) for shape in TABLES[how]))


def test_tables_of_each():
    """Queries and keys with tables of their own, and keys that are not turned."""

    def function(p, q, k, v, cos, sin, cos_k, sin_k):
        turned = q * cos + half(q) * sin
        both = F.scaled_dot_product_attention(turned, k * cos_k + half(k) * sin_k, v)
        return both, F.scaled_dot_product_attention(turned, k, v)

    assert "rope_table" in check(function, *randn(3, B, H, L, K), *randn(4, L, K))


@pytest.mark.parametrize("norm", (layer, root))
@pytest.mark.parametrize("across", (False, True))
def test_norm_and_rotation(norm, across):
    """Before the rotation, of each head or of all, with eps of its own; and after it."""

    def heads(x, weight):
        x = x if across else x.unflatten(-1, (H, K))
        x = norm(x, 0.03) * weight
        return x.unflatten(-1, (H, K)).transpose(1, 2) if across else x.transpose(1, 2)

    def function(p, q, k, v, cos, sin):
        q, k = heads(q, p["q"]), heads(k, p["k"])
        q, k = (x * cos + half(x) * sin for x in (q, k))
        v = v.unflatten(-1, (H, K)).transpose(1, 2)
        after = norm(v * cos + half(v) * sin, 0.03)
        return F.scaled_dot_product_attention(q, k, after)

    n = H * K if across else K
    qkv = 0.1 * randn(3, B, L, H * K)
    found = check(function, *qkv, *randn(2, L, K), q=randn(n), k=randn(n))
    assert ("qk_norm_rope_table" in found) == (across or norm is root)  # it has no other
