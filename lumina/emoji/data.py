"""The emoji data set: 32x32 pictures with captions in 14 languages, shipped in `weights`.

`load_emoji` reads only the shipped files, so training and evaluation need no font.
`python -m lumina.emoji.data build` makes them again from Noto Color Emoji and the package `emoji`.
"""

import argparse
import hashlib
import json
import os
import sys
import unicodedata
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from lumina.checkpoints.files import parse_json
from lumina.emoji.pictures import opened
from lumina_kernels.output import replace

SIZE = 32
COLUMNS = 27  # 698 tiles fill 26 rows of 27 but for four
LANGUAGES = ("en", "es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")
FOLDER = Path(__file__).with_name("weights")

FONT_PLACES = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),  # Debian, Ubuntu
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),  # Arch
    Path("/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf"),  # Fedora
)
# The font holds one bitmap size: 136 x 128 at 109 pixels per em. No drawing enters the outer 4
# columns, so the middle 128 x 128 loses nothing and shrinks to 32 x 32 by exact 4 x 4 means.
FONT_SIZE, GLYPH = 109, (136, 128)


@dataclass(frozen=True)
class EmojiSet:
    """Pictures and captions, in the order of the code points.

    images: uint8 `(N, 3, 32, 32)`, RGB on white.
    characters: N emoji, fully qualified (followed by U+FE0F where Unicode asks for it).
    captions: language -> N captions in NFC, "" where the language has none.
    """

    images: torch.Tensor
    characters: list[str]
    captions: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.characters)


def load_emoji(path: str | os.PathLike | None = None) -> EmojiSet:
    """Read `emoji.png` and `emoji.json` from the folder `path` (default: the shipped ones).

    Raises FileNotFoundError where a file is absent, ValueError where one is damaged or the two do
    not match.
    """
    folder = FOLDER if path is None else Path(path)
    if not (folder / "emoji.json").is_file():
        raise FileNotFoundError(f"{folder / 'emoji.json'} does not exist")
    table = parse_json(folder / "emoji.json", (folder / "emoji.json").read_bytes())
    with opened(folder / "emoji.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))  # (rows * 32, columns * 32, 3)
    if hashlib.sha256(pixels.tobytes()).hexdigest() != table.get("pixels_sha256"):
        raise ValueError(f"{folder}: emoji.png is not the sheet that emoji.json was written with")
    characters, captions = table.get("characters"), table.get("captions")
    if not (_are_texts(characters) and characters):
        raise ValueError(f"{folder}: emoji.json must hold a list of characters")
    if not (isinstance(captions, dict) and "en" in captions):
        raise ValueError(f"{folder}: emoji.json must hold captions, the English among them")
    for language, texts in captions.items():
        if not _are_texts(texts) or len(texts) != len(characters):
            got = len(texts) if isinstance(texts, list) else texts
            raise ValueError(
                f"{folder}: captions in {language!r} must be {len(characters)}, got {got}"
            )
    rows, columns = pixels.shape[0] // SIZE, pixels.shape[1] // SIZE
    if pixels.shape[:2] != (rows * SIZE, columns * SIZE) or rows * columns < len(characters):
        raise ValueError(
            f"{folder}: emoji.png must have {len(characters)} tiles of {SIZE} pixels, "
            f"got {pixels.shape[1]}x{pixels.shape[0]} pixels"
        )
    tiles = pixels.reshape(rows, SIZE, columns, SIZE, 3).transpose(0, 2, 4, 1, 3)
    tiles = tiles.reshape(-1, 3, SIZE, SIZE)[: len(characters)]  # (N, 3, 32, 32)
    return EmojiSet(torch.from_numpy(tiles.copy()), characters, captions)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def find_font(path: str | os.PathLike | None = None) -> Path:
    """The Noto Color Emoji font: `path`, or where Linux distributions put it.

    Raises FileNotFoundError naming the places tried.
    """
    places = FONT_PLACES if path is None else (Path(path),)
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"no Noto Color Emoji font at {', '.join(map(str, places))}; "
        "install it (Debian: fonts-noto-color-emoji) or pass --font PATH"
    )


def render(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """One emoji on white, uint8 `(32, 32, 3)`.

    Raises ValueError where the font has no 136 x 128 bitmap for it.
    """
    glyph = character.replace("\ufe0f", "")  # a bare code point needs no text shaping library
    box = font.getbbox(glyph)
    if box != (0, 0, *GLYPH):
        raise ValueError(
            f"Noto Color Emoji draws {character!r} in {(0, 0, *GLYPH)}, this font in {box}"
        )
    width, height = GLYPH
    canvas = Image.new("RGB", (height, height), "white")
    ImageDraw.Draw(canvas).text(((height - width) // 2, 0), glyph, font=font, embedded_color=True)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))


def read_captions() -> dict[str, dict[str, str]]:
    """Emoji -> language -> caption, for the fully qualified emoji of Emoji 0.6 of one code point.

    From the `emoji` package, without colons, with blanks for underscores; "" where there is none.
    """
    import emoji  # only the build needs it

    for language in LANGUAGES:
        emoji.config.load_language(language)
    table = {}
    for character, entry in sorted(emoji.EMOJI_DATA.items()):
        single = len(character.replace("\ufe0f", "")) == 1
        if entry["E"] == 0.6 and entry["status"] == emoji.STATUS["fully_qualified"] and single:
            table[character] = {name: _plain(entry.get(name, "")) for name in LANGUAGES}
    return table


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", " ".join(name.strip(":").replace("_", " ").split()))


def build(folder: str | os.PathLike = FOLDER, font: str | os.PathLike | None = None) -> int:
    """Write `emoji.png` and `emoji.json` into `folder`; return the number of emoji.

    Of emoji that render to the same pixels the first is kept. The same font, `emoji` and Pillow
    give the same bytes. Raises FileNotFoundError without a font, ValueError for another font.
    """
    folder, font_path = Path(folder), find_font(font)
    try:
        face = ImageFont.truetype(font_path, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise ValueError(f"{font_path} is not Noto Color Emoji: {error}") from error
    table = read_captions()
    tiles: dict[bytes, str] = {}
    for character in table:
        tiles.setdefault(render(character, face).tobytes(), character)
    characters = list(tiles.values())
    pixels = _sheet(np.frombuffer(b"".join(tiles), np.uint8).reshape(-1, SIZE, SIZE, 3))
    content = {
        "font_sha256": hashlib.sha256(font_path.read_bytes()).hexdigest(),
        "emoji_package": version("emoji"),
        "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "characters": characters,
        "captions": {name: [table[c][name] for c in characters] for name in LANGUAGES},
    }
    text = json.dumps(content, ensure_ascii=False, indent=0) + "\n"

    def both(file: Path) -> None:
        # Both are whole before either takes its name; `load_emoji` notices a kill in between.
        file.write_bytes(text.encode("utf-8"))
        sheet = Image.fromarray(pixels)
        replace(folder / "emoji.png", lambda draft: sheet.save(draft, format="PNG", optimize=True))

    replace(folder / "emoji.json", both)
    return len(characters)


def _sheet(tiles: np.ndarray) -> np.ndarray:
    rows = -(-len(tiles) // COLUMNS)
    grid = np.full((rows * COLUMNS, SIZE, SIZE, 3), 255, np.uint8)
    grid[: len(tiles)] = tiles
    grid = grid.reshape(rows, COLUMNS, SIZE, SIZE, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(grid).reshape(rows * SIZE, COLUMNS * SIZE, 3)


def main(argv: list[str] | None = None) -> int:
    """`python -m lumina.emoji.data build [--font PATH] [--out FOLDER]`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lumina.emoji.data")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="make emoji.png and emoji.json")
    command.add_argument("--font", help="NotoColorEmoji.ttf (default: the system's)")
    command.add_argument("--out", default=FOLDER, help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        count = build(args.out, args.font)
    except ModuleNotFoundError as error:
        if error.name != "emoji":
            raise
        print("error: captions need the emoji package: pip install emoji", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} emoji in {len(LANGUAGES)} languages -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
