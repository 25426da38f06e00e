"""RoPE layout and extrapolation, against the formulas as the papers write them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from lumina.models.parts.rope import KINDS, RopeScaling, positions, rope_axes, rope_frequencies

AXES = (("h", "w"), ("t", "h", "w"), ("w",))
HW = ("h", "w")
ULP = 2.0**-23  # of float32

quick = settings(max_examples=40, deadline=None)

layouts = st.tuples(st.integers(1, 64).map(lambda n: 2 * n), st.sampled_from(AXES))
scales = st.floats(1, 16)
times = st.floats(0, 1)


def exponents(K, n):
    """e_k of every pair, as Python floats."""
    return [2 * n * (j // n) / K for j in range(K // 2)]


def literal(K, n, theta, s, d):
    """max((theta s^(K / d))^(-e), theta^(-e) / s): too large for float32, not for float64 here."""
    base = theta * s ** (K / d)
    return torch.tensor(
        [max(base**-e, theta**-e / s) for e in exponents(K, n)], dtype=torch.float64
    )


def close(got, want, rtol):
    torch.testing.assert_close(got, want.expand_as(got), rtol=rtol, atol=0, check_dtype=False)


def test_axes():
    assert rope_axes(8, HW).tolist() == [1, 2, 1, 2]
    assert rope_axes(12, ("t", "h", "w")).tolist() == [0, 1, 2, 0, 1, 2]
    assert rope_axes(10, ("t", "h", "w")).tolist() == [0, 1, 2, 0, 1]  # need not divide
    assert rope_axes(6, ("w",)).tolist() == [2, 2, 2]
    assert rope_axes(72, HW).dtype == torch.int64


def test_positions():
    want = [(t, h, w) for t in range(2) for h in range(3) for w in range(4)]
    assert positions(2, 3, 4).tolist() == [list(p) for p in want]
    with pytest.raises(ValueError, match=r"at least 1, got \(1, 0, 4\)"):
        positions(1, 0, 4)


@quick
@given(layouts, st.floats(1.5, 1e6))
def test_unscaled(layout, theta):
    K, axes = layout
    want = torch.tensor([theta**-e for e in exponents(K, len(axes))], dtype=torch.float64)
    close(rope_frequencies(K, axes, theta, dtype=torch.float64), want, 1e-13)
    got = rope_frequencies(K, axes, theta)
    assert got.shape == (K // 2,) and got.dtype == torch.float32
    close(got.double(), want, ULP)
    none = rope_frequencies(K, axes, theta, scaling=RopeScaling("none", base_size=4), tokens=99)
    assert torch.equal(none, got)


@quick
@given(layouts, scales, times)
def test_time_aware_is_the_papers_maximum(layout, s, t):
    K, axes = layout
    time = torch.tensor([t], dtype=torch.float64)
    got = rope_frequencies(
        K, axes, scaling=RopeScaling("time_aware", s), t=time, dtype=torch.float64
    )
    close(got, literal(K, len(axes), 10000.0, s, (K - 1) * t + 1), 1e-12)


@quick
@given(layouts, scales, st.integers(7, 4096))
def test_frequency_aware_is_the_papers_maximum(layout, s, base_size):
    K, axes = layout
    scaling = RopeScaling("frequency_aware", s, base_size)
    got = rope_frequencies(K, axes, scaling=scaling, dtype=torch.float64)
    target = K * math.log(base_size / (2 * math.pi), 10000.0)
    close(got, literal(K, len(axes), 10000.0, s, target), 1e-12)


def test_numbers_of_the_real_model():
    """head_dim 72 at twice the side: s^(-min(1, 4 k / d_t)) worked out by hand."""
    t = torch.tensor([0.3, 0.5, 1.0])
    f = rope_frequencies(72, HW)
    stretch = rope_frequencies(72, HW, scaling=RopeScaling("time_aware", 2.0), t=t) / f
    assert torch.equal(stretch[:, ::2], stretch[:, 1::2])  # h and w share their frequencies
    stretch = stretch[:, ::2].double()
    want = torch.tensor([1, 0.883, 0.780, 0.689, 0.608, 0.537] + 12 * [0.5])
    torch.testing.assert_close(stretch[0], want.double(), rtol=0, atol=6e-4)
    assert stretch[1, 9] > 0.504 and abs(stretch[1, 10] - 0.5) < 1e-6
    torch.testing.assert_close(
        stretch[2], 0.96223 ** torch.arange(18, dtype=torch.float64), rtol=2e-4, atol=0
    )
    for base_size, d_target in ((128, 23.56), (64, 18.14)):
        scaling = RopeScaling("frequency_aware", 2.0, base_size)
        ratio = rope_frequencies(72, HW, scaling=scaling)[0, 2] / f[2]
        assert abs(ratio - 2 ** (-4 / d_target)) < 1e-4


@quick
@given(layouts, times, st.integers(1, 64))
def test_scale_one_changes_no_bit(layout, t, base_size):
    K, axes = layout
    time = torch.tensor([t, 0.0, 1.0])
    for kind in KINDS[1:]:
        plain = rope_frequencies(K, axes)
        one = RopeScaling(kind, 1.0, base_size=16)
        assert torch.equal(rope_frequencies(K, axes, scaling=one, t=time), plain.expand(3, -1))
        if kind != "frequency_aware":  # a smaller image is never squeezed
            auto = RopeScaling(kind, base_size=base_size)
            got = rope_frequencies(K, axes, scaling=auto, t=time, tokens=base_size)
            assert torch.equal(got, plain.expand(3, -1))


@quick
@given(layouts, st.floats(1, 1000))
def test_time_aware_runs_from_linear_to_ntk(layout, s):
    K, axes = layout
    ends = rope_frequencies(
        K, axes, scaling=RopeScaling("time_aware", s), t=torch.tensor([0.0, 1.0])
    )
    linear = rope_frequencies(K, axes, scaling=RopeScaling("linear", s))
    ntk = rope_frequencies(K, axes, scaling=RopeScaling("ntk", s))
    n = len(axes)
    assert torch.equal(ends[0, n:], linear[0, n:]) and (ends[0, :n] == 1).all()
    assert torch.equal(ends[1], ntk[0])
    close(linear, rope_frequencies(K, axes) / s, 2 * ULP)
    close(ntk, rope_frequencies(K, axes, 10000.0 * s), 2 * ULP)


@quick
@given(layouts, st.floats(1, 1000), st.lists(times, min_size=1, max_size=4))
def test_no_overflow(layout, s, t):
    K, axes = layout
    plain = rope_frequencies(K, axes)
    for kind in KINDS[1:]:
        f = rope_frequencies(K, axes, scaling=RopeScaling(kind, s, 16), t=torch.tensor(t))
        assert f.dtype == torch.float32 and f.shape == (len(t), K // 2)
        assert (f <= plain).all() and (f * (1 + 2 * ULP) >= plain / s).all()  # NaN fails both


def test_literal_form_would_overflow():
    """What the closed form is for: head_dim 72, s = 4, t = 0."""
    assert torch.isinf(torch.tensor(10000.0) * torch.tensor(4.0) ** 72)
    f = rope_frequencies(72, HW, scaling=RopeScaling("time_aware", 4.0), t=torch.zeros(1))
    close(f[:, 2:], rope_frequencies(72, HW)[2:] / 4, ULP)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_watershed_switches_per_sample(dtype):
    t = torch.tensor([0.0, 0.69, 0.7, 1.0], dtype=dtype)
    scaling = RopeScaling("watershed", 2.0, watershed=0.7)
    got = rope_frequencies(72, HW, scaling=scaling, t=t)
    linear, ntk = (rope_frequencies(72, HW, scaling=RopeScaling(k, 2.0)) for k in ("linear", "ntk"))
    assert torch.equal(got, torch.cat([linear, linear, ntk, ntk]))


@pytest.mark.parametrize("kind", ("linear", "ntk"))
def test_smaller_images_may_be_squeezed(kind):
    f, half = rope_frequencies(8, HW), rope_frequencies(8, HW, scaling=RopeScaling(kind, 0.5))
    p = torch.ones(4) if kind == "linear" else torch.tensor([0, 0, 0.5, 0.5])
    close(half, f * 2**p, 2 * ULP)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_scale_per_image(kind):
    """Each image takes the scale of its own grid: 8 x 8 is 1, 16 x 64 is 4, 24 x 24 is 3."""
    t, tokens = torch.tensor([0.2, 0.4, 0.9]), torch.tensor([64, 1024, 576])
    got = rope_frequencies(24, HW, scaling=RopeScaling(kind, base_size=8), t=t, tokens=tokens)
    for i, s in enumerate((1.0, 4.0, 3.0)):
        alone = RopeScaling(kind, s, base_size=8)
        assert torch.equal(got[i : i + 1], rope_frequencies(24, HW, scaling=alone, t=t[i : i + 1]))
    assert torch.equal(
        rope_frequencies(24, HW, scaling=RopeScaling(kind, base_size=8), t=t, tokens=576),
        rope_frequencies(24, HW, scaling=RopeScaling(kind, 3.0, base_size=8), t=t),
    )


def test_scale_of_a_sequence_is_a_ratio_of_lengths():
    got = rope_frequencies(24, ("w",), scaling=RopeScaling("linear", base_size=10), tokens=40)
    close(got, rope_frequencies(24, ("w",)) / 4, ULP)


@pytest.mark.parametrize(("linear", "ntk"), ((1.0, 1.0), (2.0, 1.0), (0.5, 1.0), (1.0, 3.0)))
def test_rotations_are_those_of_diffusers(linear, ntk):
    """cos and sin of all tokens of a 6 x 9 grid, to float32 roundings of angles up to 16."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    want = embeddings.get_2d_rotary_pos_embed_lumina(72, 6, 9, linear_factor=linear, ntk_factor=ntk)
    scaling = RopeScaling("linear", linear) if ntk == 1 else RopeScaling("ntk", ntk)
    angle = positions(1, 6, 9)[:, rope_axes(72, HW)] * rope_frequencies(72, HW, scaling=scaling)
    got = torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(got, want.flatten(0, 1), rtol=0, atol=16 * 4 * ULP)


@pytest.mark.parametrize("factor", (None, 2.5))
@pytest.mark.parametrize("kind", KINDS[1:])
def test_compiles_whole_for_any_batch(kind, factor):
    scaling = RopeScaling(kind, factor, base_size=8)
    torch.compiler.reset()

    def angles(t, tokens, h, w):
        f = rope_frequencies(24, HW, scaling=scaling, t=t, tokens=tokens)
        g = rope_frequencies(24, HW, scaling=scaling, t=t, tokens=h * w)
        return f, g, positions(1, h, w), rope_axes(24, HW)

    compiled = torch.compile(angles, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, h, w in ((2, 8, 12), (3, 16, 9)):
            args = torch.rand(B), torch.randint(10, 999, (B,)), h, w
            for got, want in zip(compiled(*args), angles(*args), strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_never_reads_back_to_the_host(kind):
    with FakeTensorMode():  # has no values: .item() and a branch on a tensor raise
        t, tokens = torch.rand(2), torch.randint(10, 999, (2,))
        f = rope_frequencies(24, HW, scaling=RopeScaling(kind, base_size=8), t=t, tokens=tokens)
        assert f.shape == ((12,) if kind == "none" else (2, 12))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    (
        ({"kind": "yarn"}, "one of none, linear, ntk, .*got 'yarn'"),
        ({"kind": "none", "factor": 2.0}, "no meaning"),
        ({"kind": "linear"}, "needs a factor or a base_size"),
        ({"kind": "linear", "factor": 0.0}, "positive, got 0.0"),
        ({"kind": "ntk", "factor": math.inf}, "finite and positive, got inf"),
        ({"kind": "ntk", "factor": math.nan}, "finite and positive, got nan"),
        ({"kind": "time_aware", "factor": 0.5}, "at least 1 .*got 0.5"),
        ({"kind": "frequency_aware", "factor": 0.5, "base_size": 64}, "at least 1 .*got 0.5"),
        ({"kind": "frequency_aware", "factor": 2.0}, "> 2 pi, got None"),
        ({"kind": "frequency_aware", "base_size": 6}, "> 2 pi, got 6"),
        ({"kind": "linear", "base_size": 0}, "at least 1 token, got 0"),
        ({"kind": "watershed", "factor": 2.0, "watershed": 1.5}, r"\[0, 1\], got 1.5"),
    ),
)
def test_scaling_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**kwargs)


AUTO = RopeScaling("time_aware", base_size=8)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    (
        ((7, HW), {}, "even and positive, got 7"),
        ((8, ()), {}, "distinct letters"),
        ((8, ("h", "h")), {}, "distinct letters"),
        ((8, ("h", "x")), {}, "distinct letters"),
        ((8, HW, 1.0), {}, "above 1, got 1.0"),
        ((8, HW), {"scaling": AUTO, "tokens": 64}, "'time_aware' needs t"),
        ((8, HW), {"scaling": AUTO, "t": torch.rand(2)}, "needs tokens"),
        ((8, HW), {"scaling": AUTO, "t": torch.tensor(0.5), "tokens": 64}, r"\(B,\), got \(\)"),
        (
            (8, HW),
            {"scaling": AUTO, "t": torch.rand(2), "tokens": torch.ones(3)},
            r"tokens must have shape \(2,\) as t has, got \(3,\)",
        ),
    ),
)
def test_frequency_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        rope_frequencies(*args, **kwargs)
