"""What looks like a pattern and is not, or is one in disguise: a small block for each, against
itself unpatched."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn, rand, randn
from torch.utils._pytree import tree_leaves, tree_map

from lumina_kernels.patching import patch

B, L, D = 2, 5, 8
H, K = 4, 8


class Block(nn.Module):
    def __init__(self, function, parameters):
        super().__init__()
        self.function = function
        self.p = nn.ParameterDict(parameters)
        self.idle = nn.Sequential(nn.Identity(), nn.Identity())

    def forward(self, *args):
        return self.function(self.p, *args)


class Model(nn.Module):
    def __init__(self, function, parameters):
        super().__init__()
        self.blocks = nn.ModuleList([Block(function, parameters)])

    def forward(self, *args):
        return self.blocks[0](*args)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch.set_num_threads(threads)


def outcome(model, inputs):
    """The results, and the inputs after the call. Random numbers are the same each time."""
    torch.manual_seed(1)
    inputs = tree_map(torch.clone, inputs)
    return [*tree_leaves(model(*inputs)), *inputs]


def to_dtype(inputs, dtype):
    return [x.to(dtype) if x.dtype == torch.float32 else x for x in inputs]


def rms(x):
    return x.double().square().mean().sqrt().item()


def ops_of(report):
    return sorted(row["op"] for row in report.rows() if row["op"])


@torch.no_grad()
def check(function, *inputs, training=False, more=(), **parameters):
    """Patched, a block computes the same in float32, from `inputs` and then from `more`. Returns
    the ops that do it."""
    model = Model(function, parameters).train(training)
    own = copy.deepcopy(model)
    report = patch(model)
    for given in (inputs, *more):
        got, want = outcome(model, given), outcome(own, given)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert torch.equal(a.isfinite(), b.isfinite())
            difference = torch.where(b.isfinite(), a.double() - b.double(), 0).abs().max()
            assert difference <= 2e-5 * rms(b.nan_to_num(0, 0, 0))
    return ops_of(report)


@torch.no_grad()
def check_bfloat16(function, *inputs, kept=(), **parameters):
    """The same in bfloat16, but for the inputs and parameters that are `kept` in float32: with the
    same dtypes, and as close to the truth."""
    inputs = [x if i in kept else x.bfloat16() for i, x in enumerate(inputs)]
    parameters = {n: p if n in kept else p.bfloat16() for n, p in parameters.items()}
    model = Model(function, parameters)
    truth = copy.deepcopy(model).float()(*(x.float() for x in inputs))
    want = outcome(model, inputs)
    report = patch(model)
    got = outcome(model, inputs)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    for a, b, exact in zip(got, want, tree_leaves(truth), strict=False):
        assert rms(a - exact) <= 1.15 * rms(b - exact) + 1e-6 * rms(exact)
    return ops_of(report)


def vectors(*names):
    return {name: randn(D) for name in names}


def layer(x, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def root(x, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], eps=eps)


# Norms


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


# Residuals


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


# Dtypes


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


# Writes in place


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
    return WRITTEN_OUT["rsqrt"](kept, 1e-6) * (1 + g), kept + g * y


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
)  # fmt: skip


@pytest.mark.parametrize("function", WRITES)
def test_write(function):
    """Nothing moves past one, and the caller sees what is written to the inputs."""
    check(function, randn(B, L, D), randn(B, L, D), randn(B, 1, D))


# Rotations


def half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


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


# Attentions


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


# Activations


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


# Sizes


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
