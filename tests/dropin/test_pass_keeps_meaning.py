"""What a block means beyond its numbers stays: the modes that it sets, the memory and layout of its
results, the state that it changes. Gradients are in test_pass_keeps_gradients.py."""

import pytest
import torch
import torch.nn.functional as F
from checks import deviation
from function_blocks import layer
from small_blocks import called, heads, pair
from torch import randn


def in_autocast(w, x):
    with torch.autocast("cpu", torch.bfloat16):
        h = x @ x.mT
    return h.float() @ layer(x)


def attention_out_of_autocast(w, x):
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(*[heads(x)] * 3)


def norm_out_of_autocast(w, x):
    with torch.autocast("cpu", enabled=False):
        n = layer(x) * (1 + w[None])
    return n + x


@pytest.mark.parametrize("ambient", (False, True))
@pytest.mark.parametrize("f", (in_autocast, attention_out_of_autocast, norm_out_of_autocast))
@torch.no_grad()
def test_autocast_inside(f, ambient):
    model, patched, report = pair(f)
    x = randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
        got, want = called(patched, x), model(x)
    assert got.dtype == want.dtype and deviation(got, want) <= 2e-5
    is_left = f is in_autocast and not ambient or f is attention_out_of_autocast and ambient
    assert is_left == (report.fused == 0)


def written(write):
    def function(w, x):
        out = x * 1
        write(out[:, 1:3], w)
        return layer(out) * w, out

    return function


WRITES = {
    "add": lambda part, w: part.add_(1, alpha=5),
    "sub": lambda part, w: part.sub_(w, alpha=3),
    "div": lambda part, w: part.div_(0.3, rounding_mode="floor"),
    "zero": lambda part, w: part.zero_(),
    "fill": lambda part, w: part.fill_(2),
    "relu": lambda part, w: part.relu_(),
    "clamp": lambda part, w: part.clamp_(min=0.1),
    "index_add": lambda part, w: part.index_add_(
        1, torch.zeros(1, dtype=torch.long), w.expand(2, 1, 8), alpha=7
    ),
    "scatter": lambda part, w: part.scatter_(
        2, torch.ones(2, 2, 1, dtype=torch.long), 3.0, reduce="multiply"
    ),
    "normal": lambda part, w: part.normal_(3, 4),
    "bernoulli": lambda part, w: part.bernoulli_(0.3),
    "swapped": lambda part, w: part.transpose_(1, 2),
}


@pytest.mark.parametrize("name", WRITES)
@torch.no_grad()
def test_writes_with_their_options(name):
    model, patched, report = pair(written(WRITES[name]))
    x, states = randn(2, 5, 8), []
    outs = []
    for one in (model, patched):
        torch.manual_seed(1)
        outs.append(called(one, x))
        states.append(torch.get_rng_state())
    for want, got in zip(*outs, strict=True):
        assert deviation(got, want) <= 2e-5
    assert torch.equal(*states)
    assert report.fused == 1


def incremented(w, x):
    y = x / 1.0
    y += 1
    return x * w, y


def incremented_view(w, x):
    y = (x / 1.0).view(-1)
    y += 1
    return layer(x) * w


def incremented_source(w, x):
    y = x / 1.0
    x += 1
    return layer(y) * w


def the_same_again(w, x):
    return x * w, x * w, x.clone(), x.clone(), x / 1, layer(x)


@pytest.mark.parametrize("f", (incremented, incremented_view, incremented_source, the_same_again))
@torch.no_grad()
def test_results_have_memory_of_their_own(f):
    model, patched, _ = pair(f)
    x = randn(2, 5, 8)
    outs, inputs = [], [x.clone() for _ in range(2)]
    for one, x in zip((model, patched), inputs, strict=True):
        out = called(one, x)
        out = out if isinstance(out, tuple) else (out,)
        for i, result in enumerate(out):
            result.add_(i)
        outs.append(out)
    assert torch.equal(*inputs)
    for want, got in zip(*outs, strict=True):
        assert deviation(got, want) <= 2e-5


@torch.no_grad()
def test_results_are_tensors_of_their_own():
    """Also those that share memory: a caller may change the shape of one in place."""

    def f(w, x):
        n = layer(x) * w
        return n, n.view(2, 5, 8), x.view(2, 5, 8), torch.relu(x), torch.relu(x), layer(x.relu())

    patched, report = pair(f)[1:]
    outs = patched(x := randn(2, 5, 8))
    assert len({id(x), *map(id, outs)}) == 7 and report.fused == 2
    storages = [out.untyped_storage().data_ptr() for out in (x, *outs)]
    assert storages[1] == storages[2] and storages[0] == storages[3]
    assert len({*storages}) == 5


def twice(x):
    x.mul_(2)


@torch.no_grad()
def test_a_write_by_an_op_of_the_users():
    with torch.library._scoped_library("test_pass_writes", "FRAGMENT") as library:
        library.define("twice(Tensor(a!) x) -> ()")
        library.impl("twice", twice, "CPU")
        library._register_fake("twice", twice)

        def f(w, x):
            out = x * 1
            torch.ops.test_pass_writes.twice(out[:, :2])
            return layer(out) * w

        model, patched, report = pair(f)
        x = randn(2, 5, 8)
        assert deviation(patched(x), model(x)) <= 2e-5 and report.fused == 1


@torch.no_grad()
def test_division_by_one_that_rounds():
    model, patched, report = pair(lambda w, x: torch.div(layer(x), 1, rounding_mode="floor") * w)
    x = randn(2, 5, 8)
    assert deviation(patched(x), model(x)) <= 2e-5 and report.fused == 1


def integer_norm(w, x, g):
    return layer(3 * x).to(torch.int32).to(torch.float32) * w


def integer_scale(w, x, g):
    return layer(x) * (1 + 3 * g).to(torch.int32)


def integer_activation(w, x, g):
    return F.silu(3 * x).int().float() * x.flip(1)


def integer_term(w, x, g):
    return layer(x + (3 * g * x.flip(1)).long())


def integer_statistics(w, x, g):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True).int().float() + 1e-6)


def integer_sum(w, x, g):
    return x * torch.rsqrt((3 * x).square().sum(-1, keepdim=True, dtype=torch.int32) / 72 + 1e-6)


def integer_gate(w, x, g):
    q, gate = x.unflatten(-1, (2, 4)).transpose(1, 2), (3 * w[:2]).tanh().int().float()
    a, b = (F.scaled_dot_product_attention(q, k, k).transpose(1, 2) for k in (q, q.flip(2)))
    return a + gate.view(1, 1, 2, 1) * b


INTEGERS = (
    integer_norm, integer_scale, integer_activation, integer_term, integer_statistics, integer_sum,
    integer_gate,
)  # fmt: skip


@pytest.mark.parametrize("f", INTEGERS)
@torch.no_grad()
def test_casts_to_integers(f):
    model, patched, _ = pair(f)
    x, g = randn(2, 5, 8) + 0.5, randn(2, 1, 8)
    assert deviation(called(patched, x, g), model(x, g)) <= 2e-5


@torch.no_grad()
def test_a_size_that_another_has_by_chance():
    """Eight tokens of eight channels."""
    f = lambda w, x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) / x.shape[1] + 1e-6) * w  # noqa: E731
    model, patched, _ = pair(f)
    for tokens in (6, 8, 11, 13, 17):
        x = randn(2, tokens, 8)
        assert deviation(patched(x), model(x)) <= 2e-5


@torch.no_grad()
def test_a_norm_of_any_number_of_tokens():
    f = lambda w, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w  # noqa: E731
    model, patched, report = pair(f)
    for calls, tokens in enumerate((6, 8, 11), 1):
        x = randn(2, tokens, 8)
        assert deviation(patched(x), model(x)) <= 2e-5 and report.fused == calls


@torch.no_grad()
def test_a_memory_format():
    def f(w, x):
        rows = x.view(2, 5, 2, 4).to(memory_format=torch.channels_last)
        return torch.as_strided(rows, (2, 5, 8), (40, 8, 1)) * w, F.gelu(x)

    model, patched, _ = pair(f)
    x = randn(2, 5, 8)
    assert torch.equal(called(patched, x)[0], model(x)[0])
    f = lambda w, x: (x.view(2, 5, 2, 4).to(memory_format=torch.channels_last), F.gelu(x))  # noqa: E731
    model, patched, _ = pair(f)
    assert patched(x)[0].stride() == model(x)[0].stride() == (40, 1, 20, 5)


def test_statistics_of_a_norm_without_a_user():
    def f(w, x, mean, var):
        F.batch_norm(x, mean, var, training=True)
        return F.gelu(x + 1)

    model, patched, report = pair(f)
    x = randn(2, 5, 8) + 3
    own, other = ([torch.zeros(5), torch.ones(5)] for _ in range(2))
    assert deviation(patched(x, *other), model(x, *own)) <= 2e-5 and report.fused == 1
    assert torch.equal(other[0], own[0])
    assert other[0].abs().max() > 0.1


def test_random_numbers_without_a_user():
    f = lambda w, x: (F.dropout(x, 0.5), F.gelu(x))[1]  # noqa: E731
    states = []
    for one in pair(f)[:2]:
        torch.manual_seed(0)
        one(randn(2, 5, 8))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def split(x):
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


STRIDES = {
    "gelu": lambda w, x: F.gelu(x.mT).mT,
    "gelu of a transposed": lambda w, x: F.gelu(x.mT),
    "product after it": lambda w, x: F.gelu(x.mT) * 2,
    "attention": lambda w, x: F.scaled_dot_product_attention(*[split(x)] * 3),
    "rotated axes": lambda w, x: F.gelu(x.unflatten(-1, (2, 4)).permute(3, 0, 2, 1)),
    "norm": lambda w, x: x.flip(0).mT.contiguous().mT + w * layer(x),
}


@pytest.mark.parametrize("name", STRIDES)
@torch.no_grad()
def test_strides_of_results(name):
    model, patched, report = pair(STRIDES[name])
    for tokens in (5, 6, 7):
        x = randn(2, tokens, 8)
        got, want = patched(x), model(x)
        assert got.stride() == want.stride() and deviation(got, want) <= 2e-5
    assert report.fused > 0


@torch.no_grad()
def test_the_backend_of_each_site():
    """A head_dim of 320 has no kernel."""
    f = lambda w, a, b: tuple(F.scaled_dot_product_attention(x, x, x) for x in (a, b))  # noqa: E731
    for widths, backends in (((8, 320), ["cpu", "torch"]), ((320, 8), ["torch", "cpu"])):
        patched, report = pair(f)[1:]
        patched(*(randn(1, 1, 5, width) for width in widths))
        assert [row["backend"] for row in report.rows()] == backends
