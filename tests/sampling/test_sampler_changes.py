"""What a run of lumina.sample takes on the way: latents and captions from its callback, the part of
an image that stays; and the networks that it runs."""

import pytest
import torch
from common import DEVICE
from joint_networks import pair as joint_pair
from networks import randn
from sampling_runs import SIZE, assert_same, captions, draw, noise

import lumina
from lumina import ContextDrop, Guidance, RopeScaling
from lumina.sampling.schedules import rational

SOLVERS = ("euler", "midpoint", "ab2")


def steps_of(solver, starts, **changes):
    """The end of runs of a step each, from what `starts(i, x)` makes of the latents before."""
    grid, x = rational(3, 2.0), noise()
    for i in range(3):
        x = starts(i, x)
        part = grid[i : i + 2]
        x = draw(latents=x, solver=solver, steps=1, schedule=lambda _, p=part: p, **changes).latents
    return x


@pytest.mark.parametrize("solver", SOLVERS[:2])
def test_latents_of_the_callback(solver):
    seen = []

    def callback(i, t, latents):
        seen.append((i, t))
        return {"latents": latents.flip(-1)} if i == 0 else None

    out = draw(solver=solver, callback=callback).latents
    expected = steps_of(solver, lambda i, x: x.flip(-1) if i == 1 else x)
    assert_same(out, expected)
    assert [i for i, _ in seen] == [0, 1, 2] and seen[-1][1] == 1
    assert (out - draw(solver=solver).latents).abs().max() > 1e-3


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("solver", [*SOLVERS, "dopri5"])
def test_the_last_latents_are_the_callbacks(solver, ragged):
    """Whatever solver: what is returned after the last step is the result."""
    size = [SIZE, SIZE] if ragged else SIZE
    latents = list(noise()) if ragged else noise()
    given = dict(solver=solver, size=size, latents=latents)
    plain = draw(**given).latents

    def callback(i, t, x):
        if t == 1:
            return {"latents": [2 * z for z in x] if isinstance(x, list) else 2 * x}

    for a, b in zip(draw(**given, callback=callback).latents, plain, strict=True):
        assert_same(a, 2 * b)


def test_dopri5_starts_anew_from_other_latents():
    """The slope it kept from the step before belongs to the old ones."""
    changed = []

    def callback(i, t, x):
        if not changed and t < 1:
            changed.append(t)
            return {"latents": -x}

    tight = dict(solver="dopri5", rtol=1e-8, atol=1e-8, schedule="uniform")
    feats, mask, negative, negative_mask = captions()
    texts = feats[:1], mask[:1], negative[:1], negative_mask[:1]
    out = draw(texts=texts, latents=noise()[:1], callback=callback, **tight).latents
    middle = torch.tensor([0.0, changed[0]]), torch.tensor([changed[0], 1.0])
    x = noise()[:1]
    for sign, grid in zip((1, -1), middle, strict=True):
        grid = grid.double()
        given = dict(tight, schedule=lambda _, g=grid: g)
        x = draw(texts=texts, latents=sign * x, **given).latents
    torch.testing.assert_close(out, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["cap_feats", "neg_feats", "both with masks"])
def test_captions_of_the_callback(part):
    feats, mask, negative, negative_mask = captions()
    changes = {
        "cap_feats": dict(cap_feats=-feats),
        "neg_feats": dict(neg_feats=negative.flip(1)),
        "both with masks": dict(
            cap_feats=feats[:, :3], cap_mask=mask[:, :3].flip(0), neg_feats=feats[:1], neg_mask=None
        ),
    }[part]
    new = dict(cap_feats=feats, cap_mask=mask, neg_feats=negative, neg_mask=negative_mask) | changes
    out = draw(callback=lambda i, t, x: changes if i == 0 else None).latents
    grid = rational(3, 2.0)
    x = draw(steps=1, schedule=lambda _: grid[:2]).latents
    after = dict(latents=x, steps=2, schedule=lambda _: grid[1:])
    assert_same(out, draw(texts=tuple(new.values()), **after).latents)
    assert (out - draw(**after).latents).abs().max() > 1e-3


@pytest.mark.parametrize("solver", ["dopri5", "ab2", "heun"])
def test_no_slope_of_other_captions(solver):
    """Solvers that keep a slope from the step before start anew, at the callback's time."""
    feats, mask, negative, negative_mask = captions()
    texts = feats[:1], mask[:1], negative[:1], negative_mask[:1]
    changed = []

    def callback(i, t, x):
        if not changed and t < 1:
            changed.append(t)
            return {"cap_feats": -feats[:1]}

    given = dict(solver=solver, rtol=1e-8, atol=1e-8, schedule="uniform", steps=4)
    out = draw(texts=texts, latents=noise()[:1], callback=callback, **given)
    grids = torch.tensor([0.0, changed[0]]), torch.linspace(0, 1, 5)[1:]
    if solver == "dopri5":
        grids = grids[0], torch.tensor([changed[0], 1.0])
    x = noise()[:1]
    for sign, grid in zip((1, -1), grids, strict=True):
        grid = grid.double()
        given |= dict(schedule=lambda _, g=grid: g)
        x = draw(texts=(sign * texts[0], *texts[1:]), latents=x, **given).latents
    bound = 1e-5 if solver == "dopri5" else 1e-10
    torch.testing.assert_close(out.latents, x, rtol=0, atol=bound)


def test_refused_changes():
    for changes, match in (
        (True, "callback must return None or a dict, got bool"),
        (noise(), "callback must return None or a dict, got Tensor"),
        (
            {"cap_feats": torch.zeros(4, 5, 24), "neg_feats": None},
            "there must be 2 captions still, got 4",
        ),
        ({"text": 1}, r"callback may return cap_feats, .* got \['text'\]"),
        ({"latents": noise()[:1]}, "callback must return shapes"),
        ({"neg_feats": torch.zeros(3, 2, 24)}, "there must be 1 or 2 negative captions, got 3"),
        ({"cap_feats": torch.zeros(2, 5, 24).long()}, "cap_feats must be floating"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            draw(callback=lambda i, t, x, changes=changes: changes)


# Inpainting


@pytest.mark.parametrize("solver", SOLVERS[:2])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting(solver, strength):
    torch.manual_seed(5)
    image, mask = randn(2, 4, *SIZE), torch.rand(1, 1, *SIZE).round().double().to(DEVICE)
    given = dict(solver=solver, image=image, strength=strength)
    times = []
    out = draw(**given, mask=mask, callback=lambda i, t, x: times.append(t)).latents
    x, start = noise(), 1 - strength
    x = start * image + (1 - start) * x
    for before, t in zip([start, *times], times, strict=False):
        grid = torch.tensor([before, t], dtype=torch.float64)
        drawn = draw(latents=x, solver=solver, steps=1, schedule=lambda _, g=grid: g).latents
        x = mask * drawn + (1 - mask) * (t * image + (1 - t) * noise())
    assert_same(out, x)
    assert torch.equal(out[mask.expand_as(out) == 0], image[mask.expand_as(out) == 0])
    assert (out - draw(**given).latents).abs().max() > 1e-3


def test_masks():
    """All, none, a mask for each, of lists, and between 0 and 1."""
    image = randn(2, 4, *SIZE)
    plain, one = draw().latents, torch.ones(1, 1, *SIZE)
    assert_same(draw(image=image, mask=one).latents, plain)
    assert_same(draw(image=image, mask=one * 0).latents, image)
    each = torch.cat([one, one * 0]).bool()
    both = draw(image=image, mask=each).latents
    assert_same(both, torch.stack([plain[0], image[1]]))
    ragged = dict(size=[SIZE, SIZE], latents=list(noise()), image=list(image), mask=list(each))
    assert_same(torch.stack(draw(**ragged).latents), both)
    half = draw(image=image, mask=one / 2, steps=1, schedule="uniform").latents
    assert_same(half, (draw(steps=1, schedule="uniform").latents + image) / 2)


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(mask=torch.ones(1, 1, *SIZE)), "mask needs an image"),
        (dict(image=noise(), mask=torch.ones(2, 1, 4, 5)), "mask must have the shapes"),
        (dict(image=noise(), mask=torch.ones(3, 1, *SIZE)), "mask must have the shapes"),
        (dict(image=noise(), mask=2 * torch.ones(1, 1, *SIZE)), r"values in \[0, 1\]"),
        (dict(image=noise(), mask=torch.full((1, 1, *SIZE), torch.nan)), r"values in \[0, 1\]"),
    ],
)
def test_refused_masks(changes, match):
    with pytest.raises(ValueError, match=match):
        draw(**changes)


# The joint networks


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
@pytest.mark.parametrize("name", ["lumina2", "z_image"])
def test_joint_networks(name, solver):
    """Guided, of two sizes of text, as a loop of single pictures around the reference."""
    ours, theirs = joint_pair(name)
    feats, mask = randn(2, 35, 20), torch.ones(2, 35, dtype=torch.bool, device=DEVICE)
    mask[1, 9:] = False
    negative, seen = randn(1, 3, 20), torch.tensor([[True, True, False]], device=DEVICE)
    x, grid = randn(2, 4, 4, 6), rational(3, 2.0)
    options = dict(rope_scaling=RopeScaling("time_aware", 2.0), base_seqlen=3)
    drop = ContextDrop()
    out = lumina.sample(
        ours, feats, mask, negative, seen, size=(4, 6), steps=3, solver=solver, latents=x,
        schedule="rational:2", guidance=Guidance(3.0, until=0.7), context_drop=drop, **options,
    )  # fmt: skip
    assert out.nfe == 3 * (1 if solver == "euler" else 2)

    def velocity(t, x):
        time, pooled = torch.full((2,), t, dtype=torch.float64), drop.at(t, 3)
        given = dict(**options, context_drop=pooled)
        v = theirs(x, time, feats, mask, **given)
        if t >= 0.7:
            return v
        v_u = theirs(x, time, negative.expand(2, -1, -1), seen.expand(2, -1), **given)
        return v_u + 3 * (v - v_u)

    with torch.no_grad():
        for t, end in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
            k = velocity(t, x)
            if solver == "midpoint":
                k = velocity((t + end) / 2, x + (end - t) / 2 * k)
            x = x + (end - t) * k
    assert_same(out.latents, x)


def test_joint_pictures_of_several_sizes():
    """In one batch as one by one."""
    ours = joint_pair("z_image")[0]
    feats, mask = randn(2, 35, 20), torch.ones(2, 35, dtype=torch.bool, device=DEVICE)
    sizes = [(4, 6), (6, 10)]
    x = [randn(4, *size) for size in sizes]
    given = dict(steps=2, solver="euler", guidance=1.0)
    both = lumina.sample(ours, feats, mask, size=sizes, latents=x, **given).latents
    for i in range(2):
        alone = lumina.sample(
            ours, feats[i : i + 1], mask[i : i + 1], size=sizes[i], latents=x[i][None], **given
        )
        assert_same(both[i], alone.latents[0])


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
@pytest.mark.parametrize("negatives", [1, 2])
@pytest.mark.parametrize("pooled", [1, 2])
def test_pooled_captions(pooled, negatives, solver):
    """One for all or one for each, in any combination with the negative captions."""
    feats, mask, negative, negative_mask = captions()
    texts = feats, mask, negative[:negatives], negative_mask[:negatives]
    more, seen = randn(2, 4, 24)[:pooled], torch.ones(pooled, 4).bool().to(DEVICE)
    given = dict(solver=solver, rtol=1e-6, atol=1e-6)
    both = draw(texts=texts, pooled_feats=more, pooled_mask=seen, **given).latents
    for i in range(2):
        one = lambda z, i=i: z[i : i + 1] if len(z) == 2 else z  # noqa: E731
        alone = draw(
            texts=tuple(map(one, texts)), latents=noise()[i : i + 1], pooled_feats=one(more),
            pooled_mask=one(seen), **given,
        )  # fmt: skip
        assert_same(both[i : i + 1], alone.latents)
    with pytest.raises(ValueError, match="pooled_feats are for a NextDiT, got a Lumina2"):
        lumina.sample(
            joint_pair("lumina2")[0], randn(1, 3, 20), size=(4, 4), guidance=1.0,
            pooled_feats=randn(1, 3, 20),
        )  # fmt: skip


def test_regions_beside_a_mask_for_all():
    """The caption or the negative one by token, the other for all tokens."""
    feats, mask, negative, negative_mask = captions()
    by_token = torch.rand(2, 6, 5, device=DEVICE) < 0.6
    for texts in (
        (feats, by_token, negative, negative_mask),
        (negative, negative_mask, feats, by_token),
    ):
        expanded = [m if m.ndim == 3 else m[:, None].expand(-1, 6, -1) for m in texts[1::2]]
        same = (texts[0], expanded[0], texts[2], expanded[1])
        assert_same(draw(texts=texts).latents, draw(texts=same).latents)
