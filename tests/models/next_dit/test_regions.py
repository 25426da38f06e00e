"""Regional prompts: NextDiT with the text that each token sees, against the reference and against
the way of the released code; boxes to masks; a run of the sampler."""

import math

import pytest
import torch
from common import DEVICE, assert_as_accurate
from networks import IMAGE, MASK, cast, grouped, inputs, pair, randn, run, sizes_of

import lumina
from lumina import Guidance, place_captions

RAGGED = (3, 4, 6), (3, 2, 2), (3, 6, 2)


def masks(length):
    """(3, L, 5): a different pattern for every token; some see none."""
    rows = torch.arange(3 * length * 5).mul(7).remainder(11).view(3, length, 5) < 6
    rows[:, ::3] = False
    return (rows & (MASK[:, None] | (torch.arange(5) == 1))).to(DEVICE)


@pytest.mark.parametrize("pooled", [False, True], ids=["own mean", "global caption"])
@pytest.mark.parametrize("size", [(IMAGE,), RAGGED], ids=["tensor", "ragged"])
def test_float64_is_the_reference(size, pooled):
    (ours, theirs), (x, t, feats, _) = pair(), inputs(*(size[0] if len(size) == 1 else size))
    more = dict(pooled_feats=randn(1, 4, 24), pooled_mask=torch.ones(1, 4, dtype=torch.bool))
    arguments, more = (x, t, feats, masks(6)), more if pooled else {}
    expected, results = run(theirs, arguments, **more), run(ours, arguments, **more)
    for key, rms in sizes_of(expected).items():
        error = (results[key] - expected[key]).abs().max()
        assert error <= 1e-11 * rms, f"{key}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_as_accurate_as_eager(dtype):
    (ours, theirs), (x, t, feats, _) = pair(dtype, backend=None), inputs(*IMAGE, dtype=dtype)
    arguments = x, t, feats, masks(6)
    high = run(theirs, arguments)
    low = run(theirs.to(dtype), cast(arguments, dtype))
    out = run(ours.to(dtype), cast(arguments, dtype))
    out, low, high = (grouped(r, high) for r in (out, low, high))
    assert_as_accurate("all", *(torch.cat(list(r.values())) for r in (out, low, high)))


def released(theirs, x, t, feats, mask, pooled, split, ids):
    """The velocity by a loop over the captions, as the released code has it: a softmax for each,
    for the tokens of its cell of a grid of `split`; tokens beyond the cells see no text."""
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    h, w = rows // split[0], columns // split[1]
    cell = torch.full((rows, columns), -1)
    for r in range(split[0]):
        for c in range(split[1]):
            cell[r * h : (r + 1) * h, c * w : (c + 1) * w] = ids(r, c)
    cell = cell.flatten()

    attention = type(theirs.layers[0].attention)
    original = attention.forward

    def forward(self, h, y, y_mask, rotation, scale, pool):
        none, parts = torch.zeros_like(y_mask), []
        image = original(self, h, y[:1], none[:1], rotation, scale, pool)
        for i in range(len(y)):
            seen = (cell == i)[None, :, None] & y_mask[i : i + 1, None]
            parts.append(original(self, h, y[i : i + 1], seen, rotation, scale, pool) - image)
        return image + sum(parts)

    attention.forward = forward
    try:
        pooled = theirs.pooled(*pooled)
        return theirs.velocity(x, t, feats, mask, pooled, None, None, None)
    finally:
        attention.forward = original


@pytest.mark.parametrize("split", [(1, 4), (4, 1), (2, 2)], ids=str)
def test_grids_of_the_released_code(split):
    """Row by row; its number of a region, (r + 1)(c + 1) - 1, mixes up captions of a 2 x 2 grid."""
    (ours, theirs), x = pair(), randn(1, 3, 16, 16)
    feats, mask, t = randn(4, 5, 24), MASK[[0, 1, 0, 1]].to(DEVICE), randn(1).sigmoid()
    pooled = randn(1, 3, 24), torch.ones(1, 3, dtype=torch.bool, device=DEVICE)
    R, C = split
    boxes = [(c / C, r / R, (c + 1) / C, (r + 1) / R) for r in range(R) for c in range(C)]
    arguments = place_captions(feats, mask, boxes, (8, 8))
    more = dict(zip(("pooled_feats", "pooled_mask"), pooled, strict=True))
    with torch.no_grad():
        out = ours(x, t, *arguments, **more)
        right = released(theirs, x, t, feats, mask, pooled, split, lambda r, c: r * C + c)
        wrong = released(
            theirs, x, t, feats, mask, pooled, split, lambda r, c: (r + 1) * (c + 1) - 1
        )
        torch.testing.assert_close(out, right, rtol=0, atol=1e-11)
        assert torch.equal(wrong, right) == (min(split) == 1)
        if split == (2, 2):  # caption 1 in two places, caption 2 in none
            twice = place_captions(feats[[0, 1, 1, 3]], mask[[0, 1, 1, 3]], boxes, (8, 8))
            torch.testing.assert_close(ours(x, t, *twice, **more), wrong, rtol=0, atol=1e-11)


def test_boxes():
    feats, mask = torch.arange(24.0).view(3, 4, 2), torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2:] = False
    out, sees = place_captions(feats, mask, [(0, 0, 0.5, 1), (0.25, 0.5, 1, 1), None], (2, 4))
    assert torch.equal(out, feats.view(1, 12, 2)) and sees.shape == (1, 8, 12)
    regions = torch.stack([sees[0, :, i * 4] for i in range(3)])
    assert regions.int().tolist() == [
        [1, 1, 0, 0, 1, 1, 0, 0],  # the left half
        [0, 0, 0, 0, 0, 1, 1, 1],  # overlaps it
        [0, 0, 1, 1, 0, 0, 0, 0],  # wherever no box is
    ]
    assert not sees[..., 6:8].any()  # the second caption's padding


@pytest.mark.parametrize(
    "boxes, message",
    [
        ([(0, 0, 1, 1)], "there must be a box for each of the 2 captions, got 1"),
        ([(0, 0, 1, 1), (0.5, 0, 0.5, 1)], "a box must be left,top,right,bottom with"),
        ([(0, 0, 1, 1), (0, -0.1, 1, 1)], r"got \(0, -0.1, 1, 1\)"),
        ([(0, 0, 1, 1), (0, 0, math.nan, 1)], "a box must be"),
        ([(0, 0, 1, 1), (0, 0, 0.1, 1)], "holds no token of the 2 x 4 grid"),
    ],
)
def test_refused_boxes(boxes, message):
    with pytest.raises(ValueError, match=message):
        place_captions(torch.zeros(2, 3, 5), torch.ones(2, 3).bool(), boxes, (2, 4))


def test_refused_masks():
    ours, (x, t, feats, _) = pair()[0], inputs(*IMAGE)
    with pytest.raises(ValueError, match=r"cap_mask must be \(B, T\) or \(B, 6, T\) for this"):
        ours(x, t, feats, masks(7))
    with pytest.raises(ValueError, match=r"bool of shape \(3, 5\) or \(3, L, 5\), got tor"):
        ours(x, t, feats, masks(6)[..., 1:])
    with pytest.raises(ValueError, match="pooled_feats need a pooled_mask, got None"):
        ours(x, t, feats, masks(6), pooled_feats=randn(1, 2, 24))


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_a_run(solver):
    """The negative caption is seen everywhere; the global one conditions both halves."""
    ours = pair()[0]
    feats, mask = randn(2, 5, 24), torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    placed = place_captions(feats, mask, [(0, 0, 0.5, 1), (0.5, 0, 1, 1)], (3, 4))
    negative, everywhere = randn(1, 3, 24), torch.ones(1, 3, dtype=torch.bool, device=DEVICE)
    pooled = dict(pooled_feats=randn(1, 4, 24), pooled_mask=torch.ones(1, 4).bool().to(DEVICE))
    x = randn(1, 3, 6, 8)
    result = lumina.sample(
        ours, *placed, negative, everywhere, **pooled, size=(6, 8), steps=1, solver=solver,
        schedule="uniform", latents=x, guidance=Guidance(3.0),
    )  # fmt: skip

    def velocity(x, t):
        t = torch.full((1,), t, dtype=torch.float64, device=DEVICE)
        v_c, v_u = ours(x, t, *placed, **pooled), ours(x, t, negative, everywhere, **pooled)
        return v_u + 3 * (v_c - v_u)

    with torch.no_grad():
        k = velocity(x, 0.0)
        expected = x + (k if solver == "euler" else velocity(x + k / 2, 0.5))
    torch.testing.assert_close(result.latents, expected, rtol=0, atol=1e-10)
