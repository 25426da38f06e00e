"""The model that ships: what it draws, not only that it runs."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import lumina
from lumina.cli import main
from lumina.emoji.data import load_emoji
from lumina.emoji.evaluate import evaluate, nearest
from lumina.emoji.pictures import to_float

# The emoji that the prompts of `python -m lumina demo` ask for, in their order.
ASKED = "🍎 🐙 🌵 🐘 🍌 ❤️ 🚒 🐯 🍕 🐧 ⚽ 🌻".split()


@pytest.fixture(scope="module")
def loaded():
    return lumina.load(lumina.COMPACT), lumina.load_caption_encoder(lumina.COMPACT)


def test_weights_are_small_enough_to_ship():
    assert lumina.COMPACT.stat().st_size <= 25e6


def test_demo_draws_what_was_asked_for(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "grid.png")]) == 0
    said = capsys.readouterr().out
    difference = float(re.search(r"from the reference (\S+)", said)[1])
    assert difference < 1e-3 and "NFE 20" in said
    sheet = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))[::4, ::4]
    tiles = sheet.reshape(2, 32, 6, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    data = load_emoji()
    found = nearest(to_float(torch.from_numpy(tiles.copy())), to_float(data.images))
    assert [data.characters[i] for i in found] == ASKED


def test_draws_english_captions(loaded):
    data = load_emoji()
    right = evaluate(
        *loaded, data, indices=range(5, len(data), 14), **{**lumina.COMPACT_SETTINGS, "steps": 6}
    )
    assert right.float().mean() >= 0.8  # of 50; the README has the figure of all


@pytest.mark.filterwarnings("ignore:a caption is read up to")
def test_empty_and_fully_masked_captions_draw_something(loaded):
    model, encoder = loaded
    features, mask = encoder(["a red apple", "", "x" * 500])
    mask[0] = False
    pictures = lumina.sample(model, features, mask, *encoder([""]), size=(32, 32), steps=4).latents
    assert pictures.isfinite().all() and pictures.abs().max() < 5
    assert pictures.flatten(1).std(1).min() > 0.05
