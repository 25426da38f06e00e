"""What lumina.sample takes: sizes, noise, images, captions, schedules; and what it refuses."""

import math

import numpy as np
import pytest
import torch
from common import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_runs import SIZE, assert_same, captions, draw, loop, models, noise

from lumina import Guidance, RopeScaling
from lumina.emoji.encoder import CaptionEncoder
from lumina.sampling.schedules import rational, start_at, uniform
from lumina.sampling.solvers import SOLVERS


def test_sizes_as_a_list_are_each_alone():
    feats, mask, negative, negative_mask = captions()
    sizes = [(4, 6), (2, 8)]
    common = dict(
        solver="midpoint", base_seqlen=5, rope_scaling=RopeScaling("ntk", base_size=2),
        guidance=Guidance(renorm=1.0, until=0.6),
    )  # fmt: skip

    def generators():
        return [torch.Generator().manual_seed(i) for i in (7, 8)]

    together = draw(size=sizes, generator=generators(), **common)
    assert isinstance(together.latents, list) and together.nfe == 6
    for i, generator in enumerate(generators()):
        one = slice(i, i + 1)
        texts = feats[one], mask[one], negative[one], negative_mask[one]
        alone = draw(texts=texts, size=sizes[i], generator=[generator], **common).latents[0]
        assert_same(together.latents[i], alone)
        assert (alone - alone.mean()).abs().max() > 0.1


def test_a_list_of_one_size_is_the_batch():
    batch = draw().latents
    listed = draw(size=[SIZE, list(SIZE)], latents=list(noise())).latents
    assert_same(torch.stack(listed), batch)


# Where it starts


def test_generators():
    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    first = draw(generator=seeded(1, 2)).latents
    assert torch.equal(first, draw(generator=tuple(seeded(1, 2))).latents)
    second = draw(generator=seeded(1, 3)).latents
    assert_same(second[0], first[0])  # whatever else is in the batch
    assert (second[1] - first[1]).abs().max() > 0.1
    assert (first[0] - first[1]).abs().max() > 0.1

    shared = draw(generator=seeded(1)[0]).latents
    assert_same(shared[0], first[0])
    assert (shared[1] - shared[0]).abs().max() > 0.1

    torch.manual_seed(5)
    default = draw(generator=None).latents
    torch.manual_seed(5)
    assert torch.equal(draw(generator=None).latents, default)

    drawn = torch.stack([torch.randn(4, *SIZE, generator=g) for g in seeded(1, 2)])
    assert_same(draw(latents=drawn).latents, first)  # unit normal noise, on the CPU
    grown = draw(latents=list(drawn)).latents
    assert_same(grown, first)


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_image_to_image(solver):
    image = noise(B=3)[1:] / 2
    whole = draw(solver=solver, image=image, strength=1.0).latents
    assert torch.equal(whole, draw(solver=solver).latents)
    little = draw(solver=solver, image=image, strength=1e-3).latents
    assert 0 < (little - image).abs().max() < 0.02

    half = draw(solver=solver, steps=6, image=image, strength=0.6)
    grid = start_at(rational(6, 2.0), 0.6)
    assert half.nfe == (len(grid) - 1) * SOLVERS[solver] < 6 * SOLVERS[solver]
    start = 0.4 * image + 0.6 * noise()
    assert_same(half.latents, loop(models()[1], start, grid, solver))

    sizes = [SIZE, SIZE]
    listed = draw(
        solver=solver, steps=6, size=sizes, latents=list(noise()), image=image, strength=0.6
    )
    assert_same(torch.stack(listed.latents), half.latents)


@pytest.mark.parametrize("size", (np.int64(6), torch.tensor(6), 6, [6, 6], np.array([6, 6])))
def test_kinds_of_sizes(size):
    latents = noise(6, 6)
    expected = draw(size=(6, 6), latents=latents).latents
    assert torch.equal(draw(size=size, latents=latents).latents, expected)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_captions_no_pictures(solver):
    texts = tuple(x[:0] for x in captions())
    result = draw(texts=texts, generator=[], solver=solver)
    assert result.latents.shape == (0, 4, *SIZE) and result.nfe == 0
    assert draw(texts=texts, generator=None, size=[], solver=solver).latents == []
    feats, mask, *negative = texts
    for error, match, changed in (
        (ValueError, "solver must be one of", {"solver": "nonsense"}),
        (ValueError, "rtol must be finite", {"rtol": math.nan}),
        (ValueError, "schedule must be one of", {"schedule": "nonsense"}),
        (ValueError, "sides of size must be positive", {"size": 5}),
        (ValueError, "1 or 0 generators, got 1", {"generator": [torch.Generator()]}),
        (ValueError, "latents must have the shapes", {"latents": noise(B=1)}),
        (ValueError, "image must have the shapes", {"image": noise(B=1)}),
        (ValueError, "cap_mask must be bool", {"texts": (feats, mask.long(), *negative)}),
        (TypeError, "cap_feats must be floating", {"texts": (feats.long(), mask, *negative)}),
    ):
        with pytest.raises(error, match=match):
            draw(**{"texts": texts, "latents": [], "solver": solver} | changed)


# Captions


def test_without_a_mask_all_is_text():
    feats, _, negative, _ = captions()
    texts = (feats, feats[..., 0] == feats[..., 0], negative, negative[..., 0] == negative[..., 0])
    expected = draw(texts=texts).latents
    assert torch.equal(draw(texts=(feats, None, negative)).latents, expected)


def test_results_are_ordinary_tensors():
    """A loss on them has a gradient, and they may be written to."""
    latents = draw().latents
    weight = torch.ones((), requires_grad=True, dtype=latents.dtype, device=latents.device)
    (weight * latents).square().sum().backward()
    assert weight.grad.isfinite()
    latents.add_(1)


@pytest.mark.parametrize("listed", (False, True))
def test_dopri5_chooses_the_steps_of_each_picture(listed):
    """Whatever else is drawn: captions of other difficulty, other sizes."""
    feats, mask, negative, negative_mask = captions()
    texts = (torch.cat((feats, 9 * feats[:1])), torch.cat((mask, mask[:1])))
    sizes = [SIZE, (2, 8), SIZE] if listed else SIZE
    start = [noise(*size)[0] for size in (sizes if listed else [SIZE] * 3)]
    many = draw(
        texts=(*texts, negative[:1], negative_mask[:1]), size=sizes, solver="dopri5", latents=start
    )
    calls = 0
    for i, x in enumerate(start):
        one = (*(z[i : i + 1] for z in texts), negative[:1], negative_mask[:1])
        alone = draw(texts=one, size=[sizes[i]] if listed else SIZE, solver="dopri5", latents=[x])
        assert_same(many.latents[i], alone.latents[0])
        calls += alone.nfe
    assert many.nfe == calls


def test_one_negative_caption_serves_all():
    feats, mask, negative, negative_mask = captions()
    one = draw(texts=(feats, mask, negative[:1], negative_mask[:1])).latents
    twice = draw(
        texts=(feats, mask, negative[:1].repeat(2, 1, 1), negative_mask[:1].repeat(2, 1))
    ).latents
    assert_same(one, twice)
    assert (one - draw().latents).abs().max() > 1e-3


def test_length_of_the_texts_does_not_matter():
    """Captions or negative captions may be longer; what a mask excludes has no influence."""
    feats, mask, negative, negative_mask = captions()
    expected = draw().latents

    def longer(feats, mask):
        more = torch.cat([feats, torch.full_like(feats, torch.nan)], 1)
        return more, torch.cat([mask, torch.zeros_like(mask)], 1)

    assert_same(draw(texts=(feats, mask, *longer(negative, negative_mask))).latents, expected)
    assert_same(draw(texts=(*longer(feats, mask), negative, negative_mask)).latents, expected)


def test_no_text_gives_a_picture():
    feats, mask, negative, negative_mask = captions()
    for texts in (
        (feats, mask & False, negative, negative_mask),
        (feats, mask, negative, negative_mask & False),
        (feats, mask & False, negative, negative_mask & False),
        (feats[:, :0], mask[:, :0], negative, negative_mask),
    ):
        result = draw(texts=texts).latents
        assert result.isfinite().all() and result.std() > 0.1
    encode = CaptionEncoder(dim=24, width=16, heads=2).to(DEVICE)
    texts = *encode(["", " "]), *encode([""])
    # Guided from nothing to nothing; the encoder computes in float32.
    assert_same(draw(texts=texts).latents, draw(texts=texts, guidance=1.0).latents, 1e-4)


# Any schedule

SPECS = st.one_of(
    st.just("uniform"),
    st.floats(0.05, 20).map(lambda s: f"rational:{s}"),
    st.just("sigmoid"),
    st.tuples(st.floats(0.05, 0.95), st.floats(0.01, 20), st.floats(0.01, 20)).map(
        lambda p: "sigmoid:" + ",".join(map(str, p))
    ),
)


@settings(max_examples=40, deadline=None)
@given(
    schedule=SPECS,
    steps=st.integers(1, 7),
    solver=st.sampled_from([s for s in SOLVERS if s != "dopri5"]),
    strength=st.none() | st.floats(0.05, 1),
)
def test_any_schedule(schedule, steps, solver, strength):
    image = {} if strength is None else dict(image=noise(), strength=strength)
    result = draw(schedule=schedule, steps=steps, solver=solver, guidance=1.0, **image)
    assert result.latents.isfinite().all()
    assert result.latents.shape == (2, 4, *SIZE)
    assert SOLVERS[solver] <= result.nfe <= steps * SOLVERS[solver]


# Errors


def test_errors_of_guidance():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="guidance scale must be finite"):
            Guidance(value)
    with pytest.raises(ValueError, match="guidance until must be a time, got nan"):
        Guidance(until=math.nan)
    with pytest.raises(ValueError, match="guidance channels must be at least 1, got 0"):
        Guidance(channels=0)
    for renorm in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="guidance renorm must be positive"):
            Guidance(renorm=renorm)


def test_errors():
    feats, mask, negative, negative_mask = captions()

    def refuse(match, error=ValueError, texts=None, **changed):
        with pytest.raises(error, match=match):
            draw(texts=texts, **changed)

    refuse("guidance needs neg_feats", texts=(feats, mask))
    refuse("cap_feats must be a tensor of features, got str", TypeError, texts=("apple",))
    refuse("cap_feats must be floating, got torch.int64", TypeError, texts=(
        feats.long(), mask, negative, negative_mask))  # fmt: skip
    refuse("neg_feats must be floating, got torch.int64", TypeError, texts=(
        feats, mask, negative.long(), negative_mask))  # fmt: skip
    refuse("1 or 2 negative captions, got 3", texts=(
        feats, mask, negative[[0, 1, 1]], negative_mask[[0, 1, 1]]))  # fmt: skip
    refuse("cap_mask must be bool", texts=(feats, mask.long(), negative, negative_mask))
    refuse(r"cap_feats must have shape \(B, T, 24\)", texts=(
        feats[..., 1:], mask, negative, negative_mask))  # fmt: skip
    refuse("guidance scale must be finite", guidance=math.nan)
    refuse(r"guidance channels must lie in \[1, 4\], got 5", guidance=Guidance(channels=5))
    refuse(
        "must be a NextDiT or Lumina2 or ZImage or contain one, got Linear",
        model=torch.nn.Linear(1, 1),
    )
    refuse("strength 0.5 needs an image", strength=0.5)
    for strength in (0.0, -0.1, 1.1, math.nan):
        refuse(r"strength must lie in \(0, 1\]", image=noise(), strength=strength)
    refuse("one size or 2, one for each caption, got 3", size=[SIZE] * 3)
    for size in ((4.0, 6.0), 4.0, "46", [(4, 6), 4], [(4, "6"), (4, 6)], None, True):
        refuse("size must be a whole number, a tuple of them, or a list", size=size)
    for size in (-1, (5, 6), (0, 6), [(4, -6), (4, 6)], 2**70):
        refuse("sides of size must be positive multiples of the patch, 2, got", size=size)
    refuse("x must be", size=(3, 4, 6), latents=noise(3, 4, 6))
    refuse(r"latents must have the shapes .*got \[\(4, 6, 4\)", latents=noise(6, 4))
    refuse("latents must have the shapes", latents=noise(B=1))
    refuse("image must have the shapes", image=noise(6, 4))
    refuse("image must be floating, got torch.uint8", TypeError, image=noise().byte())
    refuse("1 or 2 generators, got 3", generator=[torch.Generator()] * 3)
    refuse("solver must be one of", solver="nonsense")
    refuse("schedule must be one of", schedule="nonsense")
    refuse("steps must be at least 1", steps=0)
    refuse("strictly increasing", schedule=lambda n: 1 - uniform(n))
    refuse("rtol must be finite", solver="dopri5", rtol=0.0)
