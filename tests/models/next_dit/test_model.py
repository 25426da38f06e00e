"""lumina.NextDiT against lumina.reference.NextDiT, in float64 to the last digits and in 32 and 16
bits by the accuracy rule; lists of images, axes, padding."""

import functools
import math

import pytest
import torch
from common import DEVICE, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import AUDIO, IMAGE, VIDEO, cast, grouped, inputs, pair, randn, run, sizes_of

from lumina import RopeScaling
from lumina.models.parts.geometry import key_scale
from lumina.models.parts.windows import DroppedLayers

DROP, UNWEIGHTED = DroppedLayers(2, (True, True)), DroppedLayers(2, (True, True), False)
RAGGED = (3, 4, 6), (3, 2, 2), (3, 6, 2)
BY_SIZE = dict(factor=None, base_size=2)
# name -> changes of the config, sizes of x, further arguments
CASES = {
    "2:1": ({}, IMAGE, {}),
    "4:1": (dict(dim=288, n_heads=4), IMAGE, {}),
    "1:1": (dict(dim=48, n_kv_heads=2), (3, 2, 8), {}),
    "no qk-norm": (dict(qk_norm=False), IMAGE, {}),
    "no sigma": (dict(learn_sigma=False), (3, 6, 2), {}),
    "one layer": (dict(n_layers=1, ffn_dim_multiplier=1.3, norm_eps=1e-2), IMAGE, {}),
    "video": (VIDEO, (3, 3, 2, 4), {}),
    "image by the video model": (VIDEO, IMAGE, {}),
    "audio": (AUDIO, (5, 7), {}),
    "proportional": ({}, IMAGE, dict(base_seqlen=3)),
    "proportional video": (VIDEO, (3, 3, 2, 4), dict(base_seqlen=50)),
    "linear": ({}, IMAGE, dict(rope_scaling=RopeScaling("linear", 2.0))),
    "ntk": ({}, IMAGE, dict(rope_scaling=RopeScaling("ntk", 0.7))),
    "watershed": ({}, IMAGE, dict(rope_scaling=RopeScaling("watershed", 3.0, watershed=0.5))),
    "frequency_aware": ({}, IMAGE, dict(rope_scaling=RopeScaling("frequency_aware", 2.0, 7))),
    "time_aware": ({}, IMAGE, dict(rope_scaling=RopeScaling("time_aware", 4.0))),
    "time_aware by size": ({}, IMAGE, dict(rope_scaling=RopeScaling("time_aware", **BY_SIZE))),
    "linear video": (VIDEO, (3, 2, 4, 4), dict(rope_scaling=RopeScaling("linear", 1.5))),
    "video by size": (VIDEO, (3, 3, 2, 6), dict(rope_scaling=RopeScaling("ntk", **BY_SIZE))),
    "audio by size": (AUDIO, (5, 7), dict(rope_scaling=RopeScaling("ntk", base_size=3))),
    "drop": ({}, IMAGE, dict(context_drop=DroppedLayers(2, (True, False)))),
    "drop the other": ({}, (3, 10, 14), dict(context_drop=DroppedLayers(3, (False, True)))),
    "drop at 4:1": (dict(dim=288, n_heads=4), (3, 8, 6), dict(context_drop=DROP, base_seqlen=5)),
    "drop unweighted": (dict(qk_norm=False), IMAGE, dict(context_drop=UNWEIGHTED)),
    "drop video": (VIDEO, (3, 3, 6, 10), dict(context_drop=DROP)),
    "drop audio": (AUDIO, (5, 7), dict(context_drop=DROP)),
    "ragged": ({}, RAGGED, dict(base_seqlen=3, rope_scaling=RopeScaling("time_aware", **BY_SIZE))),
    "ragged audio": (AUDIO, ((5, 7), (5, 2), (5, 4)), dict(base_seqlen=50)),
    "ragged video": (VIDEO, ((3, 2, 4, 2), (3, 1, 4, 4), (3, 3, 2, 2)), {}),
    "ragged drop": ({}, RAGGED, dict(base_seqlen=3, context_drop=DROP)),
    "ragged drop unweighted": ({}, RAGGED[:2] + RAGGED[:1], dict(context_drop=UNWEIGHTED)),
    "ragged drop video": (VIDEO, ((3, 2, 4, 6), (3, 4, 6), (3, 3, 2, 10)), dict(context_drop=DROP)),
    "ragged drop of one length": ({}, ((3, 4, 6), (3, 6, 4), (3, 12, 2)), dict(context_drop=DROP)),
}


@pytest.mark.parametrize("name", CASES)
def test_float64_is_the_reference(name):
    changes, size, settings = CASES[name]
    (ours, theirs), arguments = pair(**changes), inputs(*size)
    expected = run(theirs, arguments, **settings)
    results = run(ours, arguments, **settings)
    assert results.keys() == expected.keys()
    for key, rms in sizes_of(expected).items():
        error = (results[key] - expected[key]).abs().max() / rms
        assert error <= 1e-11, f"{key}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_eager(name, dtype):
    changes, size, settings = CASES[name]
    (ours, theirs), arguments = pair(dtype, **changes), inputs(*size, dtype=dtype)
    high = run(theirs, arguments, **settings)
    low = run(theirs.to(dtype), cast(arguments, dtype), **settings)
    out = run(ours.to(dtype), cast(arguments, dtype), **settings)
    assert all(out[key].dtype == dtype for key in out)
    out, low, high = (grouped(r, high) for r in (out, low, high))
    for key in high:  # the maximum of one gradient is luck too, that of all is not
        error, budget = ((r[key] - high[key]).square().mean().sqrt() for r in (out, low))
        assert error <= 2 * budget + 8 * torch.finfo(torch.float32).eps, f"{key}: {error / budget}"
    assert_as_accurate("all", *(torch.cat(list(r.values())) for r in (out, low, high)))


def test_as_accurate_as_eager_under_autocast():
    """As the training runs: float32 weights, products in bfloat16."""
    (ours, theirs), arguments = pair(torch.float32), inputs(*IMAGE, dtype=torch.float32)
    high = run(theirs, arguments)
    ours, theirs, arguments = ours.float(), theirs.float(), cast(arguments, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        low, out = run(theirs, arguments), run(ours, arguments)
        caption = ours.encode_caption(*arguments[2:])
    assert {caption.keys[0].dtype, caption.values[0].dtype} == {torch.bfloat16}
    assert out["out 0"].dtype == torch.float32
    out, low, high = (torch.cat(list(grouped(r, high).values())) for r in (out, low, high))
    assert_as_accurate("all", out, low, high)


# Lists of images


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("ragged")])
def test_a_list_is_its_images_alone(name):
    changes, size, settings = CASES[name]
    (ours, _), arguments = pair(**changes), inputs(*size)
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        ours = ours.to(dtype)
        x, t, feats, mask = cast(arguments, dtype)
        with torch.no_grad():
            for i, out in enumerate(ours(x, t, feats, mask, **settings)):
                alone = ours(x[i][None], t[i, None], feats[i, None], mask[i, None], **settings)[0]
                assert out.shape == x[i].shape
                assert (out - alone).abs().max() <= bound * alone.abs().max()


def test_proportional_attention_is_not_rounded_to_16_bits():
    """The factor of each image of a list; off by 1/512, every score would be."""
    like = torch.zeros(2, dtype=torch.bfloat16, device=DEVICE)
    factor = key_scale([(1, 2, 3), (1, 1, 2)], 50, like)
    expected = [math.sqrt(math.log(n) / math.log(50)) for n in (6, 2)]
    assert factor.shape == (2, 1, 1, 1)
    assert factor.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert key_scale([(1, 2, 3)], 50, like).item() == pytest.approx(expected[0], rel=1e-6)


def test_a_list_of_one_size_is_the_batch():
    (ours, _), (x, *rest) = pair(), inputs(*IMAGE)
    scaling = RopeScaling("time_aware", base_size=2)
    with torch.no_grad():
        batch = ours(x, *rest, base_seqlen=3, rope_scaling=scaling)
        for images in (list(x), tuple(x)):
            out = ours(images, *rest, base_seqlen=3, rope_scaling=scaling)
            torch.testing.assert_close(torch.stack(out), batch, rtol=1e-12, atol=1e-12)


def test_padding_has_no_influence():
    """Neither the pad token nor caption values beyond the mask have any influence."""
    (ours, _), (x, t, feats, mask) = pair(), inputs(*RAGGED)
    with torch.no_grad():
        expected = ours(x, t, feats, mask)
        for value in (0.0, 1e30, torch.nan):
            ours.pad_token.fill_(value)
            for out, same in zip(ours(x, t, feats, mask), expected, strict=True):
                torch.testing.assert_close(out, same, rtol=1e-13, atol=1e-13)
    for value in (1e30, torch.inf, torch.nan):
        padded = feats.masked_fill(~mask[..., None], value).requires_grad_()
        out = ours(x, t, padded, mask)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
        (grad,) = torch.autograd.grad(sum(o.sum() for o in out), padded)
        assert not grad[~mask].any() and grad[mask].abs().min() > 0


# Axes


def test_an_empty_batch_is_empty():
    (ours, _), (x, t, feats, mask) = pair(), inputs(*IMAGE)
    assert ours(x[:0], t[:0], feats[:0], mask[:0]).shape == (0, *IMAGE)


def test_one_frame_is_the_image():
    (ours, _), (x, *rest) = pair(**VIDEO), inputs(*IMAGE)
    with torch.no_grad():
        assert torch.equal(ours(x[:, :, None], *rest)[:, :, 0], ours(x, *rest))
        mixed = ours([x[0], x[1, :, None], x[2]], *rest)
        assert [o.ndim for o in mixed] == [3, 4, 3]
        torch.testing.assert_close(mixed[1][:, 0], ours(x, *rest)[1], rtol=1e-12, atol=1e-12)


def test_every_axis_counts():
    """Without positions a picture and its mirror image would look alike."""
    for changes, size, axes in (
        ({}, IMAGE, (-2, -1)),
        (VIDEO, (3, 3, 4, 6), (-3, -2, -1)),
        (AUDIO, (5, 7), (-1,)),
    ):
        (ours, _), (x, *rest) = pair(**changes), inputs(*size)
        p = ours.config.patch_size
        for axis in axes:
            # Whole patches change places, their insides stay.
            side = x.unflatten(axis, (-1, 1 if axis == -3 else p)).flip(axis - 1)
            mirrored = side.flatten(axis - 1, axis)
            with torch.no_grad():
                out = ours(mirrored, *rest)
                back = out.unflatten(axis, (-1, 1 if axis == -3 else p)).flip(axis - 1)
                assert (back.flatten(axis - 1, axis) - ours(x, *rest)).abs().max() > 1e-3, axis


def test_prepared_captions_are_forward():
    (ours, _), (x, t, feats, mask) = pair(), inputs(*IMAGE)
    with torch.no_grad():
        caption = ours.encode_caption(feats, mask)
        for time in (t, 1 - t):
            assert torch.equal(ours(x, time, caption), ours(x, time, feats, mask))


# Any grid, any mask


@functools.cache
def tiny(learn_sigma):
    torch.manual_seed(0)
    return pair(dim=8, n_layers=1, multiple_of=8, cap_feat_dim=6, learn_sigma=learn_sigma)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    mask=st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    t=st.floats(0, 1),
    learn_sigma=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_grid_and_mask(grid, mask, t, learn_sigma, seed):
    ours, theirs = tiny(learn_sigma)
    torch.manual_seed(seed)
    mask = torch.tensor(mask, device=DEVICE)
    B, tokens = mask.shape
    x, feats = randn(B, 3, 2 * grid[0], 2 * grid[1]), randn(B, tokens, 6)
    t = torch.full((B,), t, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        out, expected = ours(x, t, feats, mask), theirs(x, t, feats, mask)
    assert out.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(
    grids=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    base_seqlen=st.none() | st.integers(2, 20),
)
def test_any_list(grids, base_seqlen):
    ours, theirs = tiny(True)
    B = len(grids)
    x = [randn(3, 2 * h, 2 * w) for h, w in grids]
    rest = torch.rand(B, device=DEVICE).double(), randn(B, 3, 6), randn(B, 3) > 0
    with torch.no_grad():
        out = ours(x, *rest, base_seqlen=base_seqlen)
        for a, b in zip(out, theirs(x, *rest, base_seqlen=base_seqlen), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_several_captions_of_an_image():
    ours, (x, t, feats, mask) = pair()[0], inputs(*IMAGE)
    more = torch.cat([feats, feats.flip(0)]), torch.cat([mask, mask.flip(0)])
    expected = ours(torch.cat([x, x]), torch.cat([t, t]), *more)
    torch.testing.assert_close(ours(x, t, *more), expected, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.stack(ours(list(x), t, ours.encode_caption(*more))), expected, rtol=0, atol=1e-12
    )
