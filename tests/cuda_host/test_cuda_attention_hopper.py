"""The forward of gqa_attention for Hopper. Tiles are 128 keys, blocks 192 or 128 rows."""

import pytest
import torch
from common import assert_as_accurate, cast, randn
from cuda_host.attention import (
    assert_forward,
    assert_masked_tiles_are_not_read,
    op,
    saved,
    useful_fraction,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.attention import eager, make_inputs, mask_of_ranges

from lumina_kernels import gqa_attention

KERNEL, OTHER = "gqa_attention_hopper_fwd_kernel", "gqa_attention_fwd_kernel"
DTYPES = (torch.float16, torch.bfloat16)
both = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def ran(cuda_host, monkeypatch):
    """Asked for and without gradients; returns the name of the kernel that ran last."""
    monkeypatch.setenv("LUMINA_KERNELS_HOPPER", "1")
    with torch.no_grad():
        yield cuda_host.latest


def assert_hopper(ran, inputs, dtype):
    assert_forward(inputs, dtype)
    assert ran() == KERNEL


@both
@pytest.mark.parametrize("K", (64, 72, 96, 120, 128))
def test_head_dims(K, dtype, ran):
    """Several tiles of keys with holes, the last ones cut; the last sample has none."""
    assert_hopper(ran, make_inputs(B=2, L=9, L_kv=300, T=137, H=8, G=2, K=K), dtype)


@both
@pytest.mark.parametrize(
    "H, G, L, L_kv, T, K",
    (
        (3, 1, 70, 129, 1, 72),
        (2, 2, 65, 128, 127, 72),
        (4, 1, 48, 1, 128, 64),
        (8, 1, 17, 127, 5, 96),
    ),
)
def test_groups_and_lengths(H, G, L, L_kv, T, K, dtype, ran):
    """210, 65, 192 and 136 rows: the last block has one group, with few rows, or is full."""
    inputs = make_inputs(B=1, L=L, L_kv=L_kv, T=T, H=H, G=G, K=K)
    inputs |= {"scale": None, "key_mask": None, "text_mask": torch.rand(1, T) < 0.7}
    assert_hopper(ran, inputs, dtype)


@both
@pytest.mark.parametrize(
    "ranges",
    (
        ((0, 1200),),  # full tiles, more than there are stages, and more than a window of the mask
        ((0, 131),),  # a prefix
        ((0, 16), (256, 263), (1199, 1200)),  # tiles off in between, one key in the last one
        ((31, 33), (64, 96), (1000, 1030)),  # bits on both sides of a word and of the window
        (),
    ),
)
def test_tiles_of_keys(ranges, dtype, ran):
    inputs = make_inputs(B=2, L=3, L_kv=1200, T=270, H=2, G=1, K=72)
    inputs |= {"key_mask": mask_of_ranges(1200, *ranges), "text_mask": mask_of_ranges(270, (3, 5))}
    assert_hopper(ran, inputs, dtype)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_shape_and_mask(ran, data):
    B, G, R = (data.draw(st.integers(1, 2 + i % 2)) for i in range(3))
    L, L_kv, T = (data.draw(st.integers(1, high)) for high in (9, 280, 140))
    inputs = make_inputs(B, L, L_kv, T, R * G, G, data.draw(st.sampled_from((64, 72))))
    for name, length in (("key_mask", L_kv), ("text_mask", T)):
        bits = data.draw(st.lists(st.booleans(), min_size=B * length, max_size=B * length))
        inputs[name] = torch.tensor(bits, dtype=torch.bool).view(B, length)
    dtype = data.draw(st.sampled_from(DTYPES))
    rounded = cast(inputs, dtype)
    # As for the other kernel: of few numbers eager's may be exact by chance.
    high = gqa_attention(**cast(rounded, torch.float64))
    largest = max(1.0, high.abs().max().item())
    assert (op(**rounded) - high).abs().max() <= 2 * torch.finfo(dtype).eps * largest + 1e-5
    assert ran() == KERNEL


@both
def test_scores_that_rise_tile_by_tile(dtype, ran):
    """Every tile takes over from those before it, up to exponents far out of float32's range."""
    inputs = make_inputs(B=1, L=5, L_kv=600, H=2, G=1, K=72, text=False) | {"key_mask": None}
    inputs["q"] = inputs["q"].abs()
    rising = torch.linspace(-30, 30, 600, dtype=torch.float64)[None, :, None, None]
    inputs["k"] = rising.expand(1, 600, 1, 72)
    assert_hopper(ran, inputs, dtype)
    assert_hopper(ran, inputs | {"k": inputs["k"].flip(1)}, dtype)
    slowly = inputs | {"k": inputs["k"] / 100 + randn(1, 600, 1, 72) / 20}
    assert_hopper(ran, slowly, dtype)


@both
@pytest.mark.parametrize("scale", (0.0, -0.0, -1e-50, 1e-310, 1e-45))
def test_scales_of_nothing(scale, dtype, ran):
    """A key that is masked, or beyond the last one, has a score of -inf with any of them."""
    assert_hopper(
        ran, make_inputs(B=2, L=5, L_kv=140, T=9, H=2, G=1, K=72) | {"scale": scale}, dtype
    )


@both
def test_rows_without_keys_give_zero(dtype, ran):
    inputs = cast(make_inputs(B=2, L=5, L_kv=140, T=9, H=4, G=2, K=72), dtype)
    inputs |= {"key_mask": torch.zeros(2, 140, dtype=torch.bool)}
    inputs |= {"text_mask": torch.zeros(2, 9, dtype=torch.bool)}
    out, error, lse, text_lse = saved(inputs)
    assert out.eq(0).all() and error.eq(0).all()
    assert lse.eq(-torch.inf).all() and text_lse.eq(-torch.inf).all()
    assert ran() == KERNEL


@both
def test_error_is_what_rounding_lost(dtype, ran):
    """One key and one token of text: weights of 1, and no error but that of the last rounding."""
    inputs = cast(make_inputs(B=2, L=9, L_kv=1, T=1, K=72), dtype)
    inputs |= {"key_mask": None, "text_mask": None}
    out, error, *_ = saved(inputs)
    v, text = (inputs[n].float().repeat_interleave(4, 2) for n in ("v", "text_v"))
    exact = v + inputs["text_gate"].float().tanh()[:, None] * text
    unit = out.float().abs() * torch.finfo(dtype).eps / 2 / 127
    assert (out.float() + error * unit - exact).abs().le(0.51 * unit + 1e-6).all()
    assert (error != 0).float().mean() > 0.9 and ran() == KERNEL


def test_strided(ran):
    """Every way to lie in memory that TMA takes, and any for the queries, gives the same bits."""
    inputs = cast(make_inputs(B=2, L=5, L_kv=140, T=9, H=4, G=2, K=72), torch.bfloat16)
    expected = saved(inputs)
    heads = ("k", "v", "text_k", "text_v")

    def shifted(x):
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    for way in (
        lambda x: torch.cat((x, torch.full_like(x, torch.nan)), 2).chunk(2, 2)[0],
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat((x, torch.full_like(x, torch.nan)), -1)[..., :72],
        lambda x: torch.cat((torch.full_like(x, torch.nan), x), 1)[:, len(x[0]) :],
    ):
        strided = inputs | {name: way(inputs[name]) for name in heads} | {"q": shifted(inputs["q"])}
        for value, other in zip(saved(strided), expected, strict=True):
            assert torch.equal(value, other)
        assert ran() == KERNEL


def test_broadcast_keys(ran):
    inputs = cast(make_inputs(B=2, L=5, L_kv=140, T=9, H=4, G=2, K=72), torch.float16)
    for name in ("k", "v", "text_k", "text_v"):
        inputs[name] = inputs[name][:1, :, :1].expand(2, -1, 2, -1)
    expected = saved({n: x.contiguous() if torch.is_tensor(x) else x for n, x in inputs.items()})
    for value, other in zip(saved(inputs), expected, strict=True):
        assert torch.equal(value, other)
    assert ran() == KERNEL


def test_the_rest_is_left_to_the_other_kernel(ran, monkeypatch):
    inputs = cast(make_inputs(B=2, L=5, L_kv=70, T=9, H=4, G=2, K=72), torch.float16)
    own = torch.rand(2, 5, 9) < 0.5
    step = torch.cat((inputs["v"], inputs["v"][..., :4]), -1)[..., :72]  # of 152 bytes
    for other in (
        {"scale": -0.3},
        {"bias": randn(5, 70).half()},
        {"text_mask": own},
        {"v": step},
        {"k": inputs["k"][:, :1].expand(-1, 70, -1, -1)},
        {"k": inputs["k"][:, :0], "v": inputs["v"][:, :0], "key_mask": None},
    ):
        given = inputs | other
        assert_as_accurate(
            "out", op(**given), eager(**given), gqa_attention(**cast(given, torch.float64))
        )
        assert ran() == OTHER
    op(**cast(make_inputs(K=80), torch.float16))
    assert ran() == OTHER
    monkeypatch.delenv("LUMINA_KERNELS_HOPPER")
    op(**inputs)
    assert ran() == OTHER


def test_masked_tiles_are_not_read(cuda_host):
    assert_masked_tiles_are_not_read(cuda_host, lambda x: op(**x), L=16, L_kv=1024, valid=512)


@pytest.mark.parametrize(
    "K, expected", ((64, 1), (72, 144 / 152), (96, 1), (120, 240 / 256), (128, 1))
)
def test_useful_fraction(K, expected, cuda_host, ran):
    """Of what runs. Products for 120 columns are those for 128."""
    rows = 192 if K <= 72 else 128
    found = useful_fraction(cuda_host, lambda x: op(**x), rows, 128, K, products=2)
    assert found == pytest.approx(expected) and ran() == KERNEL
