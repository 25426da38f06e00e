"""Nearest neighbours, and the evaluation on a data set of the pictures that a network draws."""

import dataclasses
import math

import pytest
import torch
from common import DEVICE
from networks import config, randomise

from lumina import NextDiT, sample
from lumina.emoji.data import EmojiSet
from lumina.emoji.encoder import CaptionEncoder
from lumina.emoji.evaluate import evaluate, nearest
from lumina.emoji.pictures import to_float, to_uint8

WORDS = ["apple", "pear", "house", "red car", "moon", "sun", "fish", "tree", "boat"]
SETTINGS = dict(steps=2, solver="euler", guidance=30.0)
SEED = 5


@pytest.fixture(scope="module")
def world():
    """A random network, its encoder, and the 8x8 pictures it draws of WORDS, as the data set."""
    torch.manual_seed(0)
    model = randomise(NextDiT(config(dim=48, n_layers=1)).to(DEVICE)).float().eval()
    encoder = CaptionEncoder(dim=24, width=16, heads=2).eval()
    pictures = [draw(model, encoder, word, i) for i, word in enumerate(WORDS)]
    captions = {"en": WORDS, "de": ["Apfel", *[""] * (len(WORDS) - 1)]}
    return model, encoder, EmojiSet(to_uint8(torch.stack(pictures)), list("abcdefghi"), captions)


def draw(model, encoder, word, i, size=(8, 8)):
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + i)
    pair = *encoder([word]), *encoder([""])
    return sample(model, *pair, size=size, generator=generator, **SETTINGS).latents[0].cpu()


def run(world, data=None, **changes):
    model, encoder, own = world
    return evaluate(
        model, encoder, data or own, **{"size": (8, 8), "seed": SEED, **SETTINGS, **changes}
    )


def test_nearest_finds_what_was_planted():
    images = torch.rand(50, 3, 8, 8) * 2 - 1
    order = torch.randperm(50)[:20]
    noisy = images[order] + 0.3 * torch.randn(20, 3, 8, 8)
    assert nearest(noisy, images).tolist() == order.tolist()
    # Only the nearest by L2 over all channels and pixels, after the clip.
    images = torch.tensor([[0.9, 0.9], [-0.5, 1.0]]).view(2, 1, 1, 2)
    assert nearest(torch.tensor([[[[0.0, 9.0]]], [[[0.3, 0.9]]]]), images).tolist() == [1, 0]
    assert nearest(images, images).tolist() == [0, 1]


@pytest.mark.parametrize("factor", [2, 3])
def test_nearest_averages_larger_pictures(factor):
    images = torch.rand(30, 3, 4, 6) * 1.6 - 0.8
    large = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    noise = 0.2 * torch.rand(large.shape) - 0.1
    assert nearest(large + noise, images).tolist() == list(range(30))
    # One pixel of a square says nothing.
    misled = large.clone()
    misled[..., ::factor, ::factor] = images.roll(1, 0)
    assert nearest(misled, images).tolist() == list(range(30))


def test_nearest_refuses():
    images = torch.zeros(2, 3, 8, 8)
    for shape in ((1, 3, 17, 17), (1, 3, 16, 8), (1, 3, 4, 4), (1, 1, 8, 8), (1, 3, 8, 9)):
        with pytest.raises(ValueError, match=r"whole multiple of \(3, 8, 8\), got \("):
            nearest(torch.zeros(shape), images)
    with pytest.raises(ValueError, match="NaN"):
        nearest(torch.full((1, 3, 8, 8), math.nan), images)


def test_own_pictures_are_found(world):
    assert run(world).tolist() == [True] * len(WORDS)
    model, encoder, data = world
    swapped = data.images[[1, 0, *range(2, len(WORDS))]]
    wrong = dataclasses.replace(data, images=swapped)
    assert run(world, wrong).tolist() == [False, False, *[True] * (len(WORDS) - 2)]
    # Another seed draws other pictures, and so do other captions and other settings.
    assert not run(world, seed=SEED + 1).all()
    assert not run(world, guidance=1.0).all()
    assert not run(world, dataclasses.replace(data, captions={"en": WORDS[::-1]})).all()


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_the_batch_does_not_matter(world, batch):
    mixed = dataclasses.replace(world[2], images=world[2].images[[1, 0, *range(2, len(WORDS))]])
    expected = run(world, mixed)
    assert torch.equal(run(world, mixed, batch=batch), expected)
    indices = [7, 0, 3]
    assert run(world, mixed, batch=batch, indices=indices).tolist() == expected[indices].tolist()


def test_a_missing_caption_is_drawn_from_the_english(world):
    right = run(world, language="de")
    assert right[1:].all()
    model, encoder, data = world
    found = nearest(draw(model, encoder, "Apfel", 0)[None], to_float(data.images))
    assert right[0] == (found == 0)


def test_larger_pictures(world):
    model, encoder, data = world
    expected = [
        nearest(draw(model, encoder, word, i, (16, 16))[None], to_float(data.images)) == i
        for i, word in enumerate(WORDS)
    ]
    assert run(world, size=(16, 16)).tolist() == [bool(e) for e in expected]


def test_errors(world):
    with pytest.raises(ValueError, match="language must be one of en, de, got 'xx'"):
        run(world, language="xx")
    for indices in ([], [0, 9], [-1]):
        with pytest.raises(ValueError, match=r"indices must be some of 0..8, got \["):
            run(world, indices=indices)
    with pytest.raises(ValueError, match="whole multiple"):
        run(world, size=(12, 12))
    with pytest.raises(ValueError, match="solver must be one of"):
        run(world, solver="nonsense")
