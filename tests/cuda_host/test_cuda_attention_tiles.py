"""The forward kernels of gqa_attention. Tiles are 64, 32 or 16 keys; masks are read 1024 keys at a
time."""

import ctypes

import pytest
import torch
from common import DTYPES, assert_as_accurate, cast, randn
from cuda_host.attention import (
    assert_forward,
    assert_masked_tiles_are_not_read,
    op,
    saved,
    useful_fraction,
)
from cuda_host.build import CSRC, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.attention import eager, make_inputs, mask_of_ranges

from lumina_kernels import gqa_attention

HEAD_DIMS = (24, 40, 48, 64, 72, 80, 88, 96, 112, 120, 128)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", (*HEAD_DIMS, 1, 21, 100, 256))
def test_head_dims(K, dtype):
    """Several tiles, the last ones cut, of keys with holes; the last sample has none."""
    inputs = make_inputs(B=2, L=9, L_kv=150, T=37, H=8, G=2, K=K)
    inputs["text_mask"] = None
    assert_forward(inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "H, G, L, L_kv, T", ((3, 1, 55, 64, 5), (4, 4, 65, 65, 1), (8, 1, 5, 63, 64), (4, 1, 33, 1, 65))
)
def test_groups_and_lengths(H, G, L, L_kv, T, dtype):
    """165, 65, 40 and 132 rows of a kv head, where blocks have 128, 64 or 32."""
    inputs = make_inputs(B=2, L=L, L_kv=L_kv, T=T, H=H, G=G, K=72)
    assert_forward(inputs | {"scale": None}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "ranges",
    (
        ((0, 300),),  # full tiles and a ragged last one
        ((0, 131),),  # a prefix: full tiles, one cut, others off
        ((0, 128),),
        ((0, 16), (128, 135), (299, 300)),  # tiles off in the middle, one key in the last tile
        ((150, 152),),
    ),
)
def test_tiles_of_keys(ranges, dtype):
    inputs = make_inputs(B=2, L=3, L_kv=300, T=140, H=2, G=1, K=72)
    inputs |= {"key_mask": mask_of_ranges(300, *ranges), "text_mask": mask_of_ranges(140, (3, 5))}
    assert_forward(inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("L_kv, masked", ((2208, True), (2205, True), (2205, False)))
def test_windows_of_masks(L_kv, masked, dtype):
    """16-byte reads of the mask, and single bytes where rows are not aligned."""
    inputs = make_inputs(B=2, L=2, L_kv=L_kv, H=2, G=1, K=24, text=False) | {"key_mask": None}
    if masked:
        inputs["key_mask"] = mask_of_ranges(L_kv, (1000, 1030), (2047, 2049), (L_kv - 1, L_kv))
    assert_forward(inputs, dtype)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_shape_and_mask(data):
    B, G, R = (data.draw(st.integers(1, 2 + i % 2)) for i in range(3))
    L, L_kv, T = (data.draw(st.integers(low, high)) for low, high in ((1, 9), (0, 140), (0, 70)))
    inputs = make_inputs(B, L, L_kv, T, R * G, G, data.draw(st.sampled_from((5, 8, 72))))
    for name, length in (("key_mask", L_kv), ("text_mask", T)):
        bits = data.draw(st.lists(st.booleans(), min_size=B * length, max_size=B * length))
        inputs[name] = torch.tensor(bits, dtype=torch.bool).view(B, length)
    dtype = data.draw(st.sampled_from(DTYPES))
    rounded = cast(inputs, dtype)
    # Of few numbers eager's may be exact by chance: two roundings of the largest instead, for the
    # weights and for the result.
    high = gqa_attention(**cast(rounded, torch.float64))
    largest = max(1.0, high.abs().max().item())
    assert (op(**rounded) - high).abs().max() <= 2 * torch.finfo(dtype).eps * largest + 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", (*HEAD_DIMS, 21, 256))
def test_bias_at_other_head_dims(K, dtype):
    inputs = make_inputs(B=1, L=40, L_kv=70, H=2, G=1, K=K, text=False) | {"key_mask": None}
    assert_forward(inputs | {"bias": randn(2, 40, 70)}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_of_minus_infinity_and_of_another_dtype(dtype):
    """Rows that lose all keys, or those of the first tile; and no mask beside the bias."""
    inputs = make_inputs(B=2, L=4, L_kv=81, H=4, G=2, K=24) | {"key_mask": None}
    bias = randn(2, 4, 4, 81)
    bias[:, :, 1] = bias[:, 2, :, :70] = bias[1, :, :, 80] = -torch.inf
    for bias_dtype in DTYPES:
        inputs["bias"] = bias.to(bias_dtype).double()
        given = cast(inputs, dtype) | {"bias": bias.to(bias_dtype)}
        exact = gqa_attention(**cast(given, torch.float64))
        assert_as_accurate("out", op(**given), eager(**cast(inputs, dtype)), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", (-0.4, -0.0, -40.0))
def test_scale_may_have_any_sign(scale, dtype):
    inputs = make_inputs(B=2, L=3, L_kv=80, H=2, G=1, K=72) | {"scale": scale}
    inputs["q"] = inputs["q"] / max(1, abs(scale))
    assert_forward(inputs, dtype)
    assert_forward(inputs | {"bias": randn(2, 3, 80)}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_rise_tile_by_tile(dtype):
    """Every tile takes over from those before it, up to exponents far out of float32's range."""
    inputs = make_inputs(B=1, L=5, L_kv=200, H=2, G=1, K=24, text=False) | {"key_mask": None}
    inputs["q"] = inputs["q"].abs()
    inputs["k"] = torch.linspace(-30, 30, 200, dtype=torch.float64)[None, :, None, None].expand(
        1, 200, 1, 24
    )
    assert_forward(inputs, dtype)
    assert_forward(inputs | {"k": inputs["k"].flip(1)}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys_give_zero(dtype):
    for masked in (
        {"key_mask": torch.zeros(3, 70, dtype=torch.bool)},
        {"bias": torch.full((3, 1, 1, 70), -torch.inf, dtype=torch.float64)},
    ):
        inputs = make_inputs(L_kv=70, K=72, text=False) | {"key_mask": None} | masked
        out, error, lse, _ = saved(cast(inputs, dtype))
        assert out.eq(0).all() and error.eq(0).all() and lse.eq(-torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", (72, 64, 21))
def test_strided(K, dtype):
    """Every way to lie in memory gives the same bits: of one projection, heads first, with a step,
    or one element off from where 16-byte accesses may begin."""
    inputs = cast(make_inputs(B=2, L=5, L_kv=70, T=9, H=4, G=2, K=K), dtype)
    expected = saved(inputs)
    heads = [name for name in ("q", "k", "v", "text_k", "text_v")]

    def shifted(x):
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    def of_one_projection(x):
        return torch.cat((x, torch.full_like(x, torch.nan)), 2).chunk(2, 2)[0]

    ways = (
        of_one_projection,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        shifted,
        lambda x: torch.cat((x, torch.full_like(x, torch.nan)), -1)[..., :K],
    )
    for way in ways:
        strided = inputs | {name: way(inputs[name]) for name in heads}
        strided["key_mask"] = inputs["key_mask"].t().contiguous().t()
        strided["text_mask"] = shifted(inputs["text_mask"])
        strided["text_gate"] = inputs["text_gate"].repeat_interleave(2)[::2]
        for value, other in zip(saved(strided), expected, strict=True):
            assert torch.equal(value, other)


def test_expanded_and_strided_bias():
    inputs = cast(make_inputs(B=2, L=5, L_kv=7, H=4, G=2, K=24), torch.float32)
    bias = randn(7, 5).float().t().expand(2, 4, 5, 7)
    assert torch.equal(op(**inputs, bias=bias), op(**inputs, bias=bias.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_attend_from_or_to(dtype):
    for sizes in ({"B": 0}, {"L": 0}):
        out, error, lse, text_lse = saved(cast(make_inputs(**sizes), dtype))
        assert out.numel() == error.numel() == lse.numel() == text_lse.numel() == 0
    out, _, lse, text_lse = saved(cast(make_inputs(L_kv=0, T=0), dtype))
    assert out.eq(0).all() and lse.eq(-torch.inf).all() and text_lse.eq(-torch.inf).all()


@pytest.mark.parametrize("K", (72, 21))
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_error_is_what_rounding_lost(dtype, K):
    """One key and one token of text: weights of 1, and no error but that of the last rounding."""
    inputs = cast(make_inputs(B=2, L=9, L_kv=1, T=1, K=K), dtype)
    inputs |= {"key_mask": None, "text_mask": None}
    out, error, *_ = saved(inputs)
    v, text = (inputs[n].float().repeat_interleave(4, 2) for n in ("v", "text_v"))
    exact = v + inputs["text_gate"].float().tanh()[:, None] * text
    unit = out.float().abs() * torch.finfo(dtype).eps / 2 / 127
    assert (out.float() + error * unit - exact).abs().le(0.51 * unit + 1e-6).all()
    assert (error != 0).float().mean() > 0.9
    assert saved(inputs, False)[1].numel() == 0


def test_ldmatrix_has_no_bank_conflicts(cuda_host):
    before = cuda_host.count("bank_conflicts")
    for K in (*HEAD_DIMS, 256):
        for text in (False, True):
            op(**cast(make_inputs(B=1, L=9, L_kv=70, T=9, H=4, G=1, K=K, text=text), torch.float16))
    assert cuda_host.count("bank_conflicts") == before


def test_masked_tiles_are_not_read(cuda_host):
    assert_masked_tiles_are_not_read(cuda_host, lambda x: op(**x), L=32, L_kv=1024, valid=512)


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """Constants of the headers."""
    source = tmp_path_factory.mktemp("probe") / "probe.cu"
    source.write_text("""
        #include "cuda/gqa_attention.cuh"
        #pragma GCC visibility push(default)
        extern "C" double useful_fraction(int K) {
          return lumina_kernels::cuda::attention_useful_fraction(K);
        }
    """)
    library = ctypes.CDLL(str(build([source], CSRC)))
    library.useful_fraction.restype = ctypes.c_double
    return library


def test_useful_fraction(cuda_host, probe):
    """80 columns for q kᵀ and 72 for the product with v make 0.947: of what runs."""
    assert probe.useful_fraction(72) == 2 * 72 / (80 + 72) > 0.94
    for K in (*HEAD_DIMS, 100, 256):
        found = useful_fraction(cuda_host, lambda x: op(**x), 128, 64, K, products=2)
        assert found == pytest.approx(probe.useful_fraction(K)), K
        assert found > (0.85 if K in HEAD_DIMS else 0.8)


def test_all_kernels_ran(cuda_host):
    assert {"gqa_attention_fwd_kernel", "gqa_attention_float_fwd_kernel"} <= cuda_host.executed()
