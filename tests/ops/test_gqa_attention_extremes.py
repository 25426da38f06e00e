"""gqa_attention with scores, scales, biases and keys up to the largest finite numbers."""

import math
from functools import partial

import pytest
import torch
from attention import eager, make_inputs
from common import BACKENDS, DEVICE, IMPLEMENTATIONS, assert_accurate, cast, randn, run
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_kernels import gqa_attention

definition = partial(gqa_attention, backend="torch")
every_implementation = pytest.mark.parametrize("backend, dtype", IMPLEMENTATIONS)


def assert_attention(backend, inputs, dtype, wrt):
    """The accuracy rule for the output and some gradients."""
    op = partial(gqa_attention, backend=backend)
    assert_accurate(op, definition, inputs, dtype, wrt)


def assert_finite(backend, inputs, dtype):
    """All gradients, which float16 could not hold."""
    if dtype != torch.float16:
        results = run(partial(gqa_attention, backend=backend), cast(inputs, dtype))
        assert all(x.isfinite().all() for x in results.values())


def exact(x, largest, integers):
    """x as a power of two times integers, which go up to `integers`: products of such tensors have
    the same sum in any order of the terms, so that forward and backward, and keys that are equal,
    have equal scores also where a matrix product depends on the place in its tile (the
    interpreter's)."""
    whole = (x * (integers / x.abs().max())).round()
    return whole * 2.0 ** math.floor(math.log2(largest / integers))


def with_ties(inputs, **largest):
    """Every key twice, so that two share the largest score, and tensors of given magnitudes."""
    inputs = dict(inputs)
    for name in ("k", "text_k"):
        inputs[name] = inputs[name].repeat_interleave(2, 1)[:, : inputs[name].shape[1]]
    for name, most in largest.items():
        inputs[name] = exact(inputs[name], most, integers=100)
    return inputs


@every_implementation
@pytest.mark.parametrize("score", (1e5, 1.5e9, 1e20, 1e37))
def test_scores(backend, score, dtype):
    """One key, or two with the same score, get all the weight. The gradients of q and k cancel to
    0 there, so that they are only finite."""
    inputs = make_inputs(B=2, L=5, L_kv=37, T=7, H=4, G=2, K=24)
    inputs = with_ties(inputs, q=100.0, k=100.0) | {"scale": score / 1e5}
    assert_attention(backend, inputs, dtype, {"v", "text_v", "text_gate"})
    negative = inputs | {"scale": -score / 1e5}
    assert_attention(backend, negative, dtype, {"v", "text_v", "text_gate"})
    assert_finite(backend, inputs, dtype)
    assert_finite(backend, negative, dtype)


@every_implementation
def test_keys(backend, dtype):
    """As large as the dtype can be, without infinite products."""
    most = min(torch.finfo(dtype).max, 1e37) / 2
    inputs = make_inputs(B=2, L=5, L_kv=37, T=23, H=4, G=2, K=24)
    inputs = with_ties(inputs, q=1.0, k=most, text_k=most) | {"scale": None}
    assert_attention(backend, inputs, dtype, {"v", "text_v", "text_gate"})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("q, k", ((3e18, -4e18), (-1.0, 1e37), (1e37, 1.0)))
def test_small_scales(backend, q, k, biased):
    """The difference of products of opposite signs is beyond the largest number, and so are sums of
    queries or keys. Also a scale that is not normal."""
    inputs = make_inputs(B=2, L=5, L_kv=37, H=4, G=2, K=24, text=False)
    signs = inputs["k"].sign()
    signs[:, ::2] = torch.tensor((1, -1, 0)).repeat(7)[:19, None, None].to(signs)
    inputs |= {"q": inputs["q"].abs().clamp(0.5, 1) * q, "k": signs * k, "v": 9 * inputs["v"]}
    inputs["bias"] = randn(37) if biased else None
    for scale in (1e-38, -1e-40, 0.0):
        assert_attention(backend, inputs | {"scale": scale}, torch.float32, {*"qkv"})


@every_implementation
@pytest.mark.parametrize("scale", (1e-45, 1e-30, 2e38, 3.4e38, -3.4e38))
def test_scales(backend, scale, dtype):
    """With scores of about 10. In 16 bits the products would be smaller than the least normal
    number of float16 squared, or of float32, which is 0 where processors multiply bfloat16."""
    most = {torch.float32: 3.4e38, torch.bfloat16: 1e30, torch.float16: 1e8}[dtype]
    scale = max(-most, min(scale, most))
    inputs = make_inputs(B=2, L=5, L_kv=37, H=4, G=2, K=24, text=False)
    for name in "qk":
        inputs[name] = exact(inputs[name], 8 * min(1.0, abs(scale) ** -0.5), integers=8)
    assert_attention(backend, inputs | {"scale": scale}, dtype, {"v"})


@every_implementation
@pytest.mark.parametrize("scale", (0.0, -0.0, -1e-50, 1e-310, -1e-45))
def test_scales_of_nothing(backend, scale, dtype):
    """Zeros of both signs, and what is one in float32 or hardly more: a row is the mean of the
    valid values, whatever the sign, and a mask hides what it hid."""
    inputs = make_inputs(B=2, L=5, L_kv=37, T=7, H=4, G=2, K=24) | {"scale": scale}
    assert_attention(backend, inputs, dtype, {"q", "v", "text_k", "text_v"})
    closed = cast(inputs | {"text_gate": torch.zeros(4, device=DEVICE)}, dtype)
    out = gqa_attention(**closed, backend=backend).double()
    mean = closed["v"][0, inputs["key_mask"][0]].double().mean(0).repeat_interleave(2, 0)
    assert (out[0] - mean).abs().max() <= torch.finfo(dtype).eps * mean.abs().max() + 1e-6
    assert out[1].eq(0).all()


@every_implementation
@pytest.mark.parametrize("bias_dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_biases_of_finfo(backend, bias_dtype, dtype):
    """finfo.min stands for a mask: a row of it alone is the mean. finfo.max takes all weight."""
    inputs = make_inputs(B=2, L=6, L_kv=37, H=4, G=2, K=24) | {"key_mask": None}
    finfo = torch.finfo(bias_dtype)
    bias = randn(2, 1, 6, 37).to(bias_dtype)
    bias[:, :, 0] = bias[:, :, 1, 5:] = bias[0, :, 2, :30] = finfo.min
    bias[:, :, 3, 7:9] = bias[:, :, 4] = finfo.max
    bias[:, :, 5, ::2], bias[:, :, 5, 1::2] = finfo.max, finfo.min
    op = partial(_with_bias, bias=bias, backend=backend)
    wrt = {"v", "text_v", "text_gate"}
    assert_accurate(op, partial(eager, bias=bias.float()), inputs, dtype, wrt)
    mean = cast(inputs, dtype)["v"].double().mean(1).repeat_interleave(2, 1)
    rows = op(**cast(inputs | {"text_gate": torch.zeros(4, device=DEVICE)}, dtype))
    if bias_dtype != torch.float16:  # -65504 leaves differences of scores
        torch.testing.assert_close(rows[:, 0].double(), mean, rtol=0, atol=0.01)
    assert rows.isfinite().all()


@every_implementation
@pytest.mark.parametrize("bias_dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_biases_of_finfo_that_all_queries_share(backend, bias_dtype, dtype):
    """The same with one bias for every key."""
    inputs = make_inputs(B=4, L=6, L_kv=37, H=4, G=2, K=24) | {"key_mask": None}
    finfo = torch.finfo(bias_dtype)
    bias = randn(4, 1, 1, 37).to(bias_dtype)
    bias[0] = bias[1, ..., 5:] = finfo.min
    bias[2, ..., 7:9] = finfo.max
    bias[3, ..., ::2], bias[3, ..., 1::2] = finfo.max, finfo.min
    op = partial(_with_bias, bias=bias, backend=backend)
    wrt = {"v", "text_v", "text_gate"}
    assert_accurate(op, partial(eager, bias=bias.float()), inputs, dtype, wrt)
    rows = op(**cast(inputs | {"text_gate": torch.zeros(4, device=DEVICE)}, dtype))
    mean = cast(inputs, dtype)["v"][0].double().mean(0).repeat_interleave(2, 0)
    if bias_dtype != torch.float16:  # -65504 leaves differences of scores
        torch.testing.assert_close(rows[0].double(), mean.expand(6, 4, 24), rtol=0, atol=0.01)
    assert rows.isfinite().all()


def _with_bias(bias, backend, **inputs):
    return gqa_attention(**inputs, bias=bias, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(-120, 120), st.integers(-120, 120), st.integers(-126, 127), st.booleans())
def test_any_magnitudes(backend, q, k, scale, biased):
    """Of queries, keys, scale and bias, as powers of 2: right wherever the scores are finite."""
    if not -140 < q + k + scale < 120 or not -140 < q + k < 120:
        return
    inputs = make_inputs(B=1, L=3, L_kv=20, H=2, G=1, K=4, text=False)
    inputs |= {"q": inputs["q"] * 2.0**q, "k": inputs["k"] * 2.0**k, "scale": 2.0**scale}
    if biased:
        inputs["bias"] = randn(20) * 2.0 ** (q + k + scale)
    low, high = cast(inputs), cast(cast(inputs), torch.float64)
    out, exact = gqa_attention(**low, backend=backend), definition(**high)
    same = definition(**low)
    error, allowed = (out - exact).abs().max(), 2 * (same - exact).abs().max() + 1e-5
    assert error <= allowed
