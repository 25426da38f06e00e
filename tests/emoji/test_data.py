"""The emoji data set: what is shipped, what the loader refuses, and what rebuilding from the font
reproduces."""

import json
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lumina.emoji import data


@pytest.fixture(scope="module")
def emoji_set():
    return data.load_emoji()


@pytest.fixture
def copy(tmp_path):
    for name in ("emoji.png", "emoji.json"):
        shutil.copy(data.FOLDER / name, tmp_path)
    return tmp_path


def tile(emoji_set, character):
    return emoji_set.images[emoji_set.characters.index(character)]


def test_all_of_emoji_0_6_is_there(emoji_set):
    assert len(emoji_set) == len(emoji_set.characters) == 698
    assert emoji_set.images.shape == (698, 3, 32, 32) and emoji_set.images.dtype == torch.uint8
    assert emoji_set.characters == sorted(set(emoji_set.characters))
    assert all(len(c.replace("\ufe0f", "")) == 1 for c in emoji_set.characters)
    assert tuple(emoji_set.captions) == data.LANGUAGES and len(data.LANGUAGES) == 14
    assert sum((data.FOLDER / f"emoji.{kind}").stat().st_size for kind in ("png", "json")) <= 2e6


@pytest.mark.parametrize(
    "character, language, caption",
    [
        ("🍎", "en", "red apple"),
        ("🍎", "de", "roter apfel"),
        ("🍎", "ja", "赤リンゴ"),
        ("🍎", "fr", "pomme rouge"),
        ("🍎", "fa", "سیب سرخ"),
        ("🐘", "ru", "слон"),
        ("🚲", "es", "bicicleta"),
        ("❤️", "en", "red heart"),
    ],
)
def test_captions(emoji_set, character, language, caption):
    assert emoji_set.captions[language][emoji_set.characters.index(character)] == caption


@pytest.mark.parametrize("language", data.LANGUAGES)
def test_every_emoji_has_its_own_plain_caption(emoji_set, language):
    captions = emoji_set.captions[language]
    assert len(captions) == 698 and all(captions)
    assert [c for c, count in Counter(map(str.casefold, captions)).items() if count > 1] == []
    for caption in captions:
        assert unicodedata.is_normalized("NFC", caption) and caption == " ".join(caption.split())
        assert not set(caption) & set(":_")


def test_pictures_are_the_named_things(emoji_set):
    red, green, blue = tile(emoji_set, "🍎")[:, 12:20, 12:20].float().mean((1, 2))
    assert red > 240 and green < 100 and blue < 60
    red, green, blue = tile(emoji_set, "🍏")[:, 12:20, 12:20].float().mean((1, 2))
    assert green > red + 30 and green > blue + 80
    assert tile(emoji_set, "⬛")[:, 8:24, 8:24].float().mean() < 80
    # The hands of 3 and 9 o'clock, the stem of an apple: left is left and up is up.
    three, nine = tile(emoji_set, "🕒").float().mean(0), tile(emoji_set, "🕘").float().mean(0)
    assert three[15:18, 18:25].mean() < nine[15:18, 18:25].mean() - 40
    assert three[15:18, 7:14].mean() > nine[15:18, 7:14].mean() + 40
    red = tile(emoji_set, "🍎")[0]
    assert red[2:7, 13:19].min() < 120 and red[25:30, 13:19].min() > 180


def test_pictures_fill_a_white_square(emoji_set):
    ink = emoji_set.images.amin(1) < 250  # (N, 32, 32)
    height = ink.any(2).sum(1).float()
    width = ink.any(1).sum(1).float()
    assert torch.maximum(height, width).median() >= 29
    assert torch.minimum(height, width).min() >= 2
    corners = emoji_set.images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners >= 250).all((1, 2)).float().mean() > 0.9
    assert len(torch.unique(emoji_set.images.flatten(1), dim=0)) == 698


def test_files_that_do_not_belong_together(copy):
    assert torch.equal(data.load_emoji(copy).images, data.load_emoji().images)
    with Image.open(copy / "emoji.png") as sheet:
        changed = sheet.convert("RGB")
    changed.putpixel((5, 5), (1, 2, 3))
    changed.save(copy / "emoji.png")
    with pytest.raises(ValueError, match="emoji.png is not the sheet"):
        data.load_emoji(copy)


def test_captions_that_do_not_fit(copy):
    table = json.loads((copy / "emoji.json").read_text(encoding="utf-8"))
    table["captions"]["de"].pop()
    (copy / "emoji.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(ValueError, match="'de' must be 698, got 697"):
        data.load_emoji(copy)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="emoji.json"):
        data.load_emoji(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"captions": {}}, "must hold captions, the English among them"),
        ({"captions": 3}, "must hold captions, the English among them"),
        ({"captions": {"en": 3}}, "captions in 'en' must be 698, got 3"),
        ({"captions": {"en": [3] * 698}}, "captions in 'en' must be 698, got "),
        ({"characters": []}, "must hold a list of characters"),
        ({"characters": "abc"}, "must hold a list of characters"),
        ({"characters": ["a"] * 703, "captions": {"en": ["a"] * 703}}, "must have 703 tiles"),
        ({"pixels_sha256": None}, "emoji.png is not the sheet"),
    ],
)
def test_tables_of_another_form(copy, change, message):
    table = json.loads((copy / "emoji.json").read_text(encoding="utf-8"))
    (copy / "emoji.json").write_text(json.dumps(table | change), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        data.load_emoji(copy)
    assert str(error.value).startswith(str(copy)) and message in str(error.value)


def test_damaged_files_of_the_set(copy):
    sheet = (copy / "emoji.png").read_bytes()
    for content, message in ((b"", "is not a picture"), (sheet[:9999], "cannot be read")):
        (copy / "emoji.png").write_bytes(content)
        with pytest.raises(ValueError, match=f"emoji.png {message}"):
            data.load_emoji(copy)
    (copy / "emoji.png").unlink()
    with pytest.raises(FileNotFoundError, match="emoji.png does not exist"):
        data.load_emoji(copy)
    for content, message in ((b"", "holds no valid JSON"), (b"[]", "must hold a JSON object")):
        (copy / "emoji.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"emoji.json {message}"):
            data.load_emoji(copy)


def test_a_sheet_of_other_tiles(copy):
    pixels = np.zeros((32, 40, 3), np.uint8)
    Image.fromarray(pixels).save(copy / "emoji.png")
    digest = data.hashlib.sha256(pixels.tobytes()).hexdigest()
    table = {"pixels_sha256": digest, "characters": ["a"], "captions": {"en": ["a"]}}
    (copy / "emoji.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="must have 1 tiles of 32 pixels, got 40x32 pixels"):
        data.load_emoji(copy)


def test_tiles_lie_on_the_sheet_in_reading_order(emoji_set):
    with Image.open(data.FOLDER / "emoji.png") as sheet:
        pixels = torch.from_numpy(np.array(sheet.convert("RGB")))
    for n in (0, 1, 26, 27, 697):
        row, column = divmod(n, 27)
        part = pixels[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
        assert torch.equal(part.permute(2, 0, 1), emoji_set.images[n])


def test_building_again_gives_the_shipped_set(emoji_set, tmp_path):
    pytest.importorskip("emoji")
    try:
        data.find_font()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert data.main(["build", "--out", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["emoji.json", "emoji.png"]
    shipped, rebuilt = (
        json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
        for folder in (data.FOLDER, tmp_path)
    )
    if rebuilt["emoji_package"] == shipped["emoji_package"]:
        assert rebuilt["captions"] == shipped["captions"]
    if rebuilt["font_sha256"] != shipped["font_sha256"]:
        pytest.skip("another release of Noto Color Emoji is installed: its drawings may differ")
    assert rebuilt["characters"] == shipped["characters"]
    # The font's own bitmaps at their own size: only the blending with white can round differently.
    difference = data.load_emoji(tmp_path).images.int() - emoji_set.images.int()
    assert difference.abs().max() <= 2


def test_build_reports_a_bad_font_in_one_line(tmp_path, capsys):
    pytest.importorskip("emoji")
    assert data.main(["build", "--font", str(tmp_path / "none.ttf"), "--out", str(tmp_path)]) == 2
    assert data.main(["build", "--font", __file__, "--out", str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: no Noto Color Emoji font at ") and "none.ttf" in first
    assert second.startswith("error: ") and Path(__file__).name in second
    assert list(tmp_path.iterdir()) == []


class _OneBox:
    """A font that draws every text as one grey rectangle; `drawn` keeps the texts."""

    def __init__(self, box):
        self.box, self.drawn = box, []

    def getbbox(self, text):
        self.drawn.append(text)
        return self.box


def test_render_refuses_another_font_and_strips_the_variation_selector(monkeypatch):
    font = _OneBox((0, 0, 136, 128))

    def text(self, position, text, **kwargs):
        assert position == (-4, 0) and text == "❤"
        self.rectangle((0, 0, 63, 127), "black")

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    picture = data.render("❤️", font)
    assert font.drawn == ["❤"] and picture.shape == (32, 32, 3)
    assert (picture[:, :16] == 0).all() and (picture[:, 16:] == 255).all()
    with pytest.raises(ValueError, match=r"this font in \(0, 0, 80, 90\)"):
        data.render("❤️", _OneBox((0, 0, 80, 90)))
