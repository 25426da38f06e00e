"""gqa_attention on every backend. In Triton's interpreter tiles are 16 x 16 and masks are read two
tiles at a time, so that few keys make many tiles; on the CPU tiles have 96 keys and 64 rows, in
CUDA 64, 32 or 16 keys."""

from functools import partial

import pytest
import torch
from attention import (
    eager,
    logsumexp_of,
    make_inputs,
    mask_of_ranges,
)
from common import (
    BACKENDS,
    DEVICE,
    IMPLEMENTATIONS,
    KERNELS,
    assert_accurate,
    assert_equal_results,
    cast,
    raises,
    randn,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_kernels import gqa_attention
from lumina_kernels.ops.gqa_attention import gqa_attention_fwd

every_backend = pytest.mark.parametrize("backend", ("torch", *BACKENDS))
every_implementation = pytest.mark.parametrize("backend, dtype", IMPLEMENTATIONS)
every_kernel = pytest.mark.parametrize("backend, dtype", KERNELS)


def assert_attention(backend, inputs, dtype=torch.float32, expected=eager):
    op = partial(gqa_attention, backend=backend)
    assert_accurate(op, expected, inputs, dtype)


def results_of(backend, inputs):
    return run(partial(gqa_attention, backend=backend), inputs)


def make_kernel_inputs(dtype=torch.float32, **sizes):
    """Several tiles of keys with holes in the mask."""
    return cast(make_inputs(**dict(B=2, L=5, L_kv=37, T=3, H=4, G=2, K=24) | sizes), dtype)


@every_implementation
@pytest.mark.parametrize(
    "K, H, G, L, L_kv",
    # head_dims of one part and of two, exact or not, unaligned too; groups of 1, 3, 4 and 8
    (
        (72, 8, 2, 9, 37),
        (96, 3, 1, 33, 105),
        (64, 4, 4, 1, 16),
        (24, 8, 1, 5, 49),
        (21, 2, 1, 3, 7),
    ),
)
def test_accuracy(backend, K, H, G, L, L_kv, dtype):
    inputs = make_inputs(B=2, L=L, L_kv=L_kv, T=6, H=H, G=G, K=K)
    assert_attention(backend, inputs, dtype)


@every_kernel
@pytest.mark.parametrize("K", (40, 48, 80, 88, 112, 120, 128, 256))
def test_other_head_dims(backend, K, dtype):
    inputs = make_inputs(B=1, L=2, L_kv=19, H=2, G=1, K=K) | {"key_mask": None, "scale": None}
    assert_attention(backend, inputs | {"text_mask": None}, dtype)


@every_kernel
def test_many_tiles(backend, dtype):
    """Several blocks of rows and tiles of keys, whole and cut ones, on every backend."""
    inputs = make_inputs(B=1, L=90, L_kv=203, T=99, H=3, G=1, K=12) | {"key_mask": None}
    assert_attention(backend, inputs, dtype)


@every_backend
@pytest.mark.parametrize(
    "ranges",
    (
        ((0, 100),),  # full tiles and a ragged last one
        ((0, 53),),  # a prefix: three full tiles, one cut, three off
        ((0, 16), (64, 70), (99, 100)),  # tiles off in the middle, one key in the last tile
        ((40, 43),),
    ),
)
def test_tiles_of_keys(backend, ranges):
    inputs = make_inputs(B=2, L=3, L_kv=100, T=40, H=2, G=1, K=8)
    inputs |= {"key_mask": mask_of_ranges(100, *ranges)}
    assert_attention(backend, inputs | {"text_mask": mask_of_ranges(40, (3, 5), (33, 40))})


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_mask(backend, data):
    """Where few keys are left gradients cancel to 0: measured against the largest result."""
    B, G, R = (data.draw(st.integers(1, 2 + i % 2)) for i in range(3))
    L, L_kv, T = (data.draw(st.integers(low, high)) for low, high in ((1, 9), (0, 35), (0, 20)))
    inputs = make_kernel_inputs(B=B, L=L, L_kv=L_kv, T=T, H=R * G, G=G, K=4)
    for name, length in (("key_mask", L_kv), ("text_mask", T)):
        bits = data.draw(st.lists(st.booleans(), min_size=B * length, max_size=B * length))
        inputs[name] = torch.tensor(bits, dtype=torch.bool, device=DEVICE).view(B, length)
    expected = run(gqa_attention, cast(inputs, torch.float64))
    largest = max(value.abs().max() for value in expected.values() if value.numel())
    for name, value in results_of(backend, inputs).items():
        assert (value - expected[name]).abs().le(2e-6 * largest).all(), name


@every_kernel
@pytest.mark.parametrize("text", (False, True))
def test_options_are_optional(backend, text, dtype):
    inputs = make_inputs(B=2, L=5, L_kv=17, H=4, K=24, text=text)
    plain = {name: None for name in inputs if name.endswith("mask") or name == "scale"}
    assert_attention(backend, inputs | plain, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", (-0.4, 0.0))
def test_scale_may_have_any_sign(backend, scale):
    inputs = make_inputs(B=2, L=3, L_kv=37, H=2, G=1, K=24) | {"scale": scale}
    assert_attention(backend, inputs, expected=partial(gqa_attention, backend="torch"))


@every_kernel
@pytest.mark.parametrize("shape", ((21,), (5, 21), (4, 1, 21), (2, 1, 1, 21), (2, 4, 5, 21)))
def test_bias(backend, shape, dtype):
    inputs = make_inputs(B=2, L=5, L_kv=21, H=4, G=2, K=24, text=len(shape) < 3)
    assert_attention(backend, inputs | {"bias": randn(*shape)}, dtype)


@every_implementation
@pytest.mark.parametrize("masked", (False, True))
def test_bias_that_all_queries_share(backend, masked, dtype):
    """Several blocks of rows and tiles of keys; keys of -inf, some of them a whole tile; a mask
    beside it, or not; as it is, and expanded."""
    inputs = make_inputs(B=2, L=40, L_kv=203, H=2, G=1, K=12, text=False)
    inputs["key_mask"] = mask_of_ranges(203, (3, 120), (130, 203)) if masked else None
    bias = randn(2, 1, 1, 203)
    bias[..., 20:150] = bias[..., ::5] = bias[1, ..., 190:] = -torch.inf
    assert_attention(backend, inputs | {"bias": bias}, dtype)
    inputs = cast(inputs | {"bias": bias}, dtype)
    expanded = inputs | {"bias": inputs["bias"].expand(2, 2, 40, 203)}
    found, same = (gqa_attention(**x, backend=backend) for x in (inputs, expanded))
    assert torch.equal(found, same)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ((74,), (2, 1, 1, 74), (4, 5, 74)))
def test_bias_with_a_stride_between_keys(backend, shape):
    inputs, bias = make_kernel_inputs(), randn(*shape).float()[..., ::2]
    found = results_of(backend, inputs | {"bias": bias})
    assert_equal_results(found, results_of(backend, inputs | {"bias": bias.contiguous()}))


@pytest.mark.parametrize("backend", ("torch", *BACKENDS))
@pytest.mark.parametrize("shape", ((37,), (2, 4, 5, 37)))
def test_bias_of_nan(backend, shape):
    inputs = make_kernel_inputs(text=False) | {"key_mask": None}
    bias = randn(*shape).float()
    bias[..., 3] = torch.nan
    assert gqa_attention(**inputs, bias=bias, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_of_minus_infinity(backend):
    """Rows that lose all keys, or those of the first tile; and no mask beside the bias."""
    inputs = make_inputs(B=2, L=4, L_kv=21, H=4, G=2, K=24) | {"key_mask": None}
    bias = randn(2, 4, 4, 21)
    bias[:, :, 1] = bias[:, 2, :, :17] = bias[1, :, :, 20] = -torch.inf
    definition = partial(gqa_attention, backend="torch")
    assert_attention(backend, inputs | {"bias": bias}, expected=definition)


@every_backend
def test_masked_rows_give_zero_and_zero_gradients(backend):
    for masked in (
        {"key_mask": torch.zeros(2, 37, dtype=torch.bool, device=DEVICE)},
        {"bias": torch.full((2, 1, 1, 37), -torch.inf, device=DEVICE)},
    ):
        results = results_of(backend, make_kernel_inputs(text=False) | masked)
        assert all(value.eq(0).all() for value in results.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("big", (1e3, 3e38))
def test_masked_keys_do_not_matter(backend, big):
    inputs = make_kernel_inputs()
    other = dict(inputs)
    for prefix, mask in (("", "key_mask"), ("text_", "text_mask")):
        for name in (prefix + "k", prefix + "v"):
            other[name] = inputs[name].masked_fill(~inputs[mask][:, :, None, None], big)
    assert_equal_results(results_of(backend, other), results_of(backend, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_logsumexp(backend):
    inputs = make_kernel_inputs()
    q, k, scale, mask = (inputs[name] for name in ("q", "k", "scale", "key_mask"))
    _, error, stats, text_stats = gqa_attention_fwd(
        q, k, inputs["v"], mask, scale, None, None, None, None, None, True, backend
    )
    scores = torch.einsum("blgrk,bmgk->bglrm", q.unflatten(2, (2, 2)), k) * scale
    scores = scores.masked_fill(~mask[:, None, None, None], -torch.inf)
    lse = logsumexp_of(stats, scale)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert lse[1].eq(-torch.inf).all() and text_stats.numel() == error.numel() == 0


@pytest.mark.parametrize("backend", ("torch", *BACKENDS))
def test_keys_with_a_mean_keep_dq_accurate(backend):
    """dq is the small difference of large sums: an error of dout . out, such as the rounding of
    out, would be multiplied by the mean of the keys."""
    inputs = make_inputs(B=1, L=4, L_kv=128, H=2, G=1, K=24, text=False) | {"key_mask": None}
    inputs |= {"k": 0.2 * inputs["k"] + 4, "v": inputs["v"] + 2, "q": 0.1 * inputs["q"]}
    rounded = cast(inputs, torch.float16)
    exact = run(gqa_attention, cast(rounded, torch.float64))
    error = results_of(backend, rounded)["dq"].double() - exact["dq"]
    assert error.square().mean().sqrt() < 0.01 * exact["dq"].square().mean().sqrt()


@pytest.mark.parametrize("backend", BACKENDS)
def test_views(backend):
    """Parts of one projection, heads first, a transposed mask, and a stride between channels."""
    inputs = make_kernel_inputs(K=16, L_kv=5)
    q, k, v = randn(2, 5, 8 * 16).float().split((4 * 16, 2 * 16, 2 * 16), -1)
    views = {"q": q.unflatten(-1, (4, 16)), "k": k.unflatten(-1, (2, 16))}
    views["v"] = v.unflatten(-1, (2, 16)).transpose(1, 2).contiguous().transpose(1, 2)
    views["key_mask"] = inputs["key_mask"].t().contiguous().t()
    packed = inputs | {name: view.contiguous() for name, view in views.items()}
    assert_equal_results(results_of(backend, inputs | views), results_of(backend, packed))
    views["k"] = packed["k"].repeat_interleave(2, -1)[..., ::2]
    assert_equal_results(results_of(backend, inputs | views), results_of(backend, packed))


@every_backend
def test_nothing_to_attend_to(backend):
    results = results_of(backend, make_kernel_inputs(L_kv=0, T=0))
    assert all(value.eq(0).all() for value in results.values())


@pytest.mark.parametrize("backend", ("torch", *BACKENDS))
def test_the_output_is_the_same_without_a_gradient(backend):
    """The rounding error of the output is kept for a gradient only."""
    inputs = make_kernel_inputs(torch.float16)
    out = gqa_attention(**inputs, backend=backend)
    assert torch.equal(out, results_of(backend, inputs)["out 0"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors(backend):
    good, op = make_kernel_inputs(), partial(gqa_attention, backend=backend)
    raises(TypeError, "no float64", op, good, bias=randn(37))
    raises(TypeError, "no float64", op, good, text_gate=randn(4))
    wide = make_kernel_inputs(K=257)
    raises(NotImplementedError, "head_dim of at most 256, got 257", op, wide)
    assert gqa_attention(**wide).shape == (2, 5, 4, 257)
