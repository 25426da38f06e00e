"""The kernels of gqa_attention. In Triton's interpreter tiles are 16 x 16 and masks are read two
tiles at a time, so that few keys make many tiles; those of the CPU are 96 keys and 64 rows."""

from functools import partial

import pytest
import torch
from common import (
    BACKENDS,
    CPU_LEVELS,
    DEVICE,
    DTYPES,
    KERNELS,
    assert_accurate,
    assert_as_accurate,
    assert_compiles,
    assert_equal_results,
    assert_strided_is_same,
    assert_threads_change_nothing,
    at_cpu_level,
    raises,
    randn,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gqa_attention import make_inputs, make_mask

from lumina_kernels import gqa_attention
from lumina_kernels.ops.gqa_attention import (
    BACKENDS_WITH_GRADIENT,
    gqa_attention_bwd,
    gqa_attention_fwd,
)

EPS = torch.finfo(torch.float32).eps
OPS = [
    pytest.param(partial(gqa_attention, backend=name), id=name)
    for name in BACKENDS
    if name in BACKENDS_WITH_GRADIENT
]
OPS_AND_DTYPES = [
    pytest.param(partial(gqa_attention, backend=name), dtype, id=f"{name}-{dtype}")
    for name, dtype in KERNELS
    if name in BACKENDS_WITH_GRADIENT
]


definition = partial(gqa_attention, backend="torch")


def eager(
    q, k, v, key_mask=None, scale=None, text_k=None, text_v=None, text_mask=None, text_gate=None,
    bias=None,
):  # fmt: skip
    """Products and softmax as separate operations, each rounded to the dtype."""

    def attend(k, v, mask, scale, bias):
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (k, v))
        scores = q.transpose(1, 2) @ k.transpose(2, 3) * scale
        scores = scores if bias is None else scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
        return (weights @ v).transpose(1, 2)

    plain = q.shape[-1] ** -0.5
    out = attend(k, v, key_mask, plain if scale is None else scale, bias)
    if text_k is None:
        return out
    return out + torch.tanh(text_gate)[:, None] * attend(text_k, text_v, text_mask, plain, None)


def make_kernel_inputs(dtype=torch.float32, **sizes):
    """Several tiles of keys with holes in the mask; rounded to `dtype`."""
    inputs = make_inputs(**dict(B=2, L=5, L_kv=37, T=3, H=4, G=2, K=24) | sizes)
    return {n: v.to(dtype) if _is_float(v) else v for n, v in inputs.items()}


def _is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@pytest.mark.parametrize("op, dtype", OPS_AND_DTYPES)
@pytest.mark.parametrize(
    "K, H, G, L, L_kv",
    # head_dims of one part and of two, exact or not, unaligned too; groups of 1, 3, 4 and 8
    ((72, 8, 2, 9, 37), (96, 3, 1, 33, 5), (64, 4, 4, 1, 16), (24, 8, 1, 5, 49), (21, 2, 1, 3, 7)),
)
def test_accuracy(op, K, H, G, L, L_kv, dtype):
    inputs = make_inputs(B=2, L=L, L_kv=L_kv, T=6, H=H, G=G, K=K)
    assert_accurate(op, eager, inputs, dtype)


@pytest.mark.parametrize("op, dtype", OPS_AND_DTYPES)
@pytest.mark.parametrize("K", (40, 48, 80, 88, 112, 120, 128, 256))
def test_other_head_dims(op, K, dtype):
    inputs = make_inputs(B=1, L=2, L_kv=19, H=2, G=1, K=K) | {"key_mask": None, "scale": None}
    assert_accurate(op, eager, inputs | {"text_mask": None}, dtype)


@pytest.mark.parametrize("backend, dtype", KERNELS)
@pytest.mark.parametrize("K", (24, 72, 96, 128, 21))
def test_forward_alone(K, backend, dtype):
    """Without gradients, which not every backend has."""
    inputs = make_inputs(B=2, L=19, L_kv=70, T=6, H=4, G=2, K=K)
    low = {n: v.to(dtype) if _is_float(v) else v for n, v in inputs.items()}
    high = {n: v.double() if _is_float(v) else v for n, v in low.items()}
    with torch.no_grad():
        out = gqa_attention(**low, backend=backend)
        assert_as_accurate("out", out, eager(**low), eager(**high))


@pytest.mark.parametrize("op, dtype", OPS_AND_DTYPES)
def test_many_tiles(op, dtype):
    """Several blocks of rows and tiles of keys, whole and cut ones, on every backend."""
    inputs = make_inputs(B=1, L=90, L_kv=203, T=99, H=3, G=1, K=12) | {"key_mask": None}
    assert_accurate(op, eager, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", CPU_LEVELS)
def test_every_instruction_set_is_accurate(level, dtype):
    inputs = make_inputs(B=2, L=33, L_kv=105, T=6, H=6, G=2, K=72)
    with at_cpu_level(level):
        assert_accurate(partial(gqa_attention, backend="cpu"), eager, inputs, dtype)


def make_wholes(L_kv, *ranges):
    """Two samples whose valid keys are `ranges`, in the second one turned round."""
    mask = torch.zeros(2, L_kv, dtype=torch.bool, device=DEVICE)
    for first, last in ranges:
        mask[0, first:last] = True
    mask[1] = mask[0].flip(0)
    return mask


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "ranges",
    (
        ((0, 100),),  # full tiles and a ragged last one
        ((0, 53),),  # a prefix: three full tiles, one cut, three off
        ((0, 16), (64, 70), (99, 100)),  # tiles off in the middle, one key in the last tile
        ((40, 43),),
    ),
)
def test_tiles_of_keys(op, ranges):
    inputs = make_inputs(B=2, L=3, L_kv=100, T=40, H=2, G=1, K=8)
    inputs |= {
        "key_mask": make_wholes(100, *ranges),
        "text_mask": make_wholes(40, (3, 5), (33, 40)),
    }
    assert_accurate(op, eager, inputs, torch.float32)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_mask(op, data):
    """Where few keys are left gradients cancel to 0: measured against the largest result."""
    B, G, R = (data.draw(st.integers(1, 2 + i % 2)) for i in range(3))
    L, L_kv, T = (data.draw(st.integers(low, high)) for low, high in ((1, 9), (0, 35), (0, 20)))
    inputs = make_inputs(B, L, L_kv, T, R * G, G, 4)
    for name, length in (("key_mask", L_kv), ("text_mask", T)):
        bits = data.draw(st.lists(st.booleans(), min_size=B * length, max_size=B * length))
        inputs[name] = torch.tensor(bits, dtype=torch.bool, device=DEVICE).view(B, length)
    inputs = {n: v.float() if _is_float(v) else v for n, v in inputs.items()}
    expected = run(gqa_attention, {n: v.double() if _is_float(v) else v for n, v in inputs.items()})
    largest = max(value.abs().max() for value in expected.values() if value.numel())
    for name, value in run(op, inputs).items():
        assert (value - expected[name]).abs().le(16 * EPS * largest).all(), name


@pytest.mark.parametrize("text", (False, True))
@pytest.mark.parametrize("op, dtype", OPS_AND_DTYPES)
def test_options_are_optional(op, text, dtype):
    inputs = make_inputs(B=2, L=5, L_kv=17, H=4, K=24, text=text)
    plain = {name: None for name in inputs if name.endswith("mask") or name == "scale"}
    assert_accurate(op, eager, inputs | plain, dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("scale", (-0.4, 0.0))
def test_scale_may_have_any_sign(op, scale):
    inputs = make_inputs(B=2, L=3, L_kv=37, H=2, G=1, K=24) | {"scale": scale}
    assert_accurate(op, definition, inputs, torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_a_large_negative_scale_does_not_overflow(op):
    inputs = make_kernel_inputs(text=False) | {"scale": -40.0, "key_mask": None}
    torch.testing.assert_close(
        op(**inputs), gqa_attention(**inputs, backend="torch"), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("op, dtype", OPS_AND_DTYPES)
@pytest.mark.parametrize("shape", ((21,), (5, 21), (4, 1, 21), (2, 1, 1, 21), (2, 4, 5, 21)))
def test_bias(op, shape, dtype):
    inputs = make_inputs(B=2, L=5, L_kv=21, H=4, G=2, K=24, text=len(shape) < 3)
    inputs |= {"bias": randn(*shape)}
    assert_accurate(op, eager, inputs, dtype)


@pytest.mark.parametrize("op", OPS)
def test_bias_of_minus_infinity(op):
    """Rows that lose all keys, or those of the first tile; and no mask beside the bias."""
    inputs = make_inputs(B=2, L=4, L_kv=21, H=4, G=2, K=24) | {"key_mask": None}
    bias = randn(2, 4, 4, 21)
    bias[:, :, 1] = bias[:, 2, :, :17] = bias[1, :, :, 20] = -torch.inf
    assert_accurate(op, definition, inputs | {"bias": bias}, torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_bias_may_have_another_dtype(op):
    inputs = make_kernel_inputs(torch.float16) | {"bias": randn(1, 1, 1, 37).float()}
    results = run(op, inputs)
    assert results["dbias"].dtype == torch.float32 and results["dq"].dtype == torch.float16


@pytest.mark.parametrize("op", OPS)
def test_masked_rows_give_zero_and_zero_gradients(op):
    for masked in (
        {"key_mask": torch.zeros(2, 37, dtype=torch.bool, device=DEVICE)},
        {"bias": torch.full((2, 1, 1, 37), -torch.inf, device=DEVICE)},
    ):
        results = run(op, make_kernel_inputs(text=False) | masked)
        assert all(value.eq(0).all() for value in results.values())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("big", (1e3, 3e38))
def test_masked_keys_do_not_matter(op, big):
    inputs = make_kernel_inputs()
    other = dict(inputs)
    for prefix, mask in (("", "key_mask"), ("text_", "text_mask")):
        for name in (prefix + "k", prefix + "v"):
            other[name] = inputs[name].masked_fill(~inputs[mask][:, :, None, None], big)
    assert_equal_results(run(op, other), run(op, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_logsumexp(backend):
    inputs = make_kernel_inputs()
    q, k, scale, mask = (inputs[name] for name in ("q", "k", "scale", "key_mask"))
    _, error, lse, text_lse = gqa_attention_fwd(
        q, k, inputs["v"], mask, scale, None, None, None, None, None, True, backend
    )
    scores = torch.einsum("blgrk,bmgk->bglrm", q.unflatten(2, (2, 2)), k) * scale
    scores = scores.masked_fill(~mask[:, None, None, None], -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1) * 1.4426950408889634)
    assert lse[1].eq(-torch.inf).all() and text_lse.numel() == error.numel() == 0


@pytest.mark.parametrize("op", OPS)
def test_keys_with_a_mean_keep_dq_accurate(op):
    """dq is the small difference of large sums: an error of dout . out, such as the rounding of
    out, would stand before the mean of the keys."""
    inputs = make_inputs(B=1, L=4, L_kv=128, H=2, G=1, K=24, text=False) | {"key_mask": None}
    inputs |= {"k": 0.2 * inputs["k"] + 4, "v": inputs["v"] + 2, "q": 0.1 * inputs["q"]}
    rounded = {n: v.half() if _is_float(v) else v for n, v in inputs.items()}
    exact = run(gqa_attention, {n: v.double() if _is_float(v) else v for n, v in rounded.items()})
    error = run(op, rounded)["dq"].double() - exact["dq"]
    assert error.square().mean().sqrt() < 0.01 * exact["dq"].square().mean().sqrt()


@pytest.mark.parametrize("op", OPS)
def test_strided(op):
    assert_strided_is_same(op, make_kernel_inputs())
    inputs = make_kernel_inputs(K=16)  # as a fused projection and a transpose give them
    q, k, v = randn(2, 5, 8 * 16).float().split((4 * 16, 2 * 16, 2 * 16), -1)
    views = {"q": q.unflatten(-1, (4, 16)), "k": k.unflatten(-1, (2, 16))}
    views["v"] = v.unflatten(-1, (2, 16)).transpose(1, 2).contiguous().transpose(1, 2)
    views["key_mask"] = make_mask(5, 2).t()
    inputs |= views
    contiguous = inputs | {name: view.contiguous() for name, view in views.items()}
    assert_equal_results(run(op, inputs), run(op, contiguous))


@pytest.mark.parametrize("op", OPS)
def test_a_last_dimension_with_a_step(op):
    inputs = make_kernel_inputs(text=False)
    wide = inputs["k"].repeat_interleave(2, -1)[..., ::2]
    assert_equal_results(run(op, inputs | {"k": wide}), run(op, inputs))


@pytest.mark.parametrize("op", OPS)
def test_nothing_to_attend_from_or_to(op):
    results = run(op, make_kernel_inputs(B=0))
    assert results["out 0"].shape == (0, 5, 4, 24) and results["dtext_gate"].eq(0).all()
    results = run(op, make_kernel_inputs(L=0))
    assert all(value.eq(0).all() for value in results.values())
    results = run(op, make_kernel_inputs(L_kv=0, T=0))
    assert all(value.eq(0).all() for value in results.values())


@pytest.mark.parametrize("op", OPS)
def test_deterministic(op):
    inputs = make_kernel_inputs(torch.float16) | {"bias": randn(1, 4, 1, 37).half()}
    assert_equal_results(run(op, inputs), run(op, inputs))


@pytest.mark.skipif(not CPU_LEVELS, reason="the C++ kernels are not built")
def test_threads_change_no_bit():
    """One block of rows or keys becomes several where several threads want work."""
    inputs = make_inputs(B=1, L=150, L_kv=300, T=70, H=2, G=1, K=24)
    inputs = {n: v.bfloat16() if _is_float(v) else v for n, v in inputs.items()}
    inputs["key_mask"] = inputs["text_mask"] = None
    assert_threads_change_nothing(partial(gqa_attention, backend="cpu"), inputs)


@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(op):
    inputs = make_kernel_inputs(torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = op(**inputs)
    assert torch.equal(out, op(**inputs))


@pytest.mark.parametrize("op", OPS)
def test_the_error_is_kept_for_a_gradient_only(op):
    inputs = make_kernel_inputs(torch.float16)
    with torch.no_grad():
        out = op(**inputs)
    assert torch.equal(out, run(op, inputs)["out 0"])


@pytest.mark.parametrize("backend", [n for n in BACKENDS if n in BACKENDS_WITH_GRADIENT])
@pytest.mark.parametrize("options", ((), ("text",), ("bias",), ("text", "bias")))
def test_opcheck(options, backend):
    dtype = torch.float16 if options else torch.float32
    inputs = make_kernel_inputs(dtype, L_kv=5, text="text" in options)
    names = "q k v key_mask scale text_k text_v text_mask text_gate bias".split()
    if "bias" in options:
        inputs["bias"] = randn(1, 4, 1, 5).half()
    args = [inputs.get(name) for name in names]
    leaves = [x.requires_grad_() if _is_float(x) else x for x in args]
    torch.library.opcheck(gqa_attention_fwd.overload, (*leaves, True, backend))
    args = [x.detach() if _is_float(x) else x for x in leaves]
    saved = gqa_attention_fwd(*args, True, backend)
    given = (torch.ones_like(saved[0]), *saved, *args, "bias" in options, backend)
    torch.library.opcheck(gqa_attention_bwd.overload, given)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("text", (False, True))
def test_compile(op, text):
    sizes = ((2, 3, 9, 5, 8, 4, 12), (3, 5, 11, 7, 8, 4, 12), (4, 5, 19, 7, 6, 3, 20))
    examples = (make_inputs(*size, text=text) for size in sizes)
    examples = ({n: v.float() if _is_float(v) else v for n, v in x.items()} for x in examples)
    assert_compiles(op, *examples)


@pytest.mark.parametrize("op", OPS)
def test_errors(op):
    raises(TypeError, "no float64", op, make_inputs())
    good = make_kernel_inputs()
    raises(TypeError, "no float64", op, good, bias=randn(37))
    raises(TypeError, "no float64", op, good, text_gate=randn(4))
    raises(ValueError, "head_dim of at most 256, got 257", op, make_kernel_inputs(K=257))
    wide = {n: v for n, v in make_kernel_inputs(K=257).items()}
    assert op(**wide, backend=None).shape == (2, 5, 4, 257)
