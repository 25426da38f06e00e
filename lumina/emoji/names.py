"""What the shipped model knows by name: it draws the captions it was trained on, nothing else."""

from __future__ import annotations

import difflib
import unicodedata

from lumina.emoji.data import EmojiSet
from lumina.emoji.encoder import spelled

# People write "a red apple" where the data says "red apple".
ARTICLES = {
    "en": ("a", "an", "the", "one"),
    "de": ("ein", "eine", "der", "die", "das"),
    "fr": ("un", "une", "le", "la"),
    "es": ("un", "una", "el", "la"),
    "it": ("un", "una", "il", "la"),
    "pt": ("um", "uma", "o", "a"),
    "tr": ("bir",),
}


def plain(text: str) -> str:
    """A text as `spelled`, without punctuation."""
    return spelled("".join(" " if unicodedata.category(c)[0] == "P" else c for c in text))


class Names:
    """The captions of a data set, found by whatever people type for them."""

    def __init__(self, data: EmojiSet):
        self.data = data
        self.captions: dict[str, str] = {}  # name, or the emoji itself -> caption
        self.articles: dict[str, set[str]] = {}  # name -> articles of its languages
        self.pictures: dict[str, int] = {}  # plain name -> number of its picture
        # Two captions can differ in punctuation alone: what is spelled as one of them means it.
        for form in (spelled, plain):
            for language, captions in data.captions.items():
                for caption in filter(form, captions):
                    self.captions.setdefault(form(caption), caption)
                    self.articles.setdefault(form(caption), set()).update(
                        ARTICLES.get(language, ())
                    )
        for captions in data.captions.values():
            for i, caption in enumerate(captions):
                if plain(caption):
                    self.pictures.setdefault(plain(caption), i)
        for character, caption in zip(data.characters, data.captions["en"], strict=True):
            for spelling in (character, character.replace("\ufe0f", "")):
                self.captions.setdefault(spelling, caption)

    def caption(self, prompt: str) -> str | None:
        """The caption that the model was trained on for what was typed; None: it knows none."""
        for name in (spelled(prompt), plain(prompt)):
            if name in self.captions:
                return self.captions[name]
            article, _, rest = name.partition(" ")
            if article in self.articles.get(rest, ()):
                return f"{article} {self.captions[rest]}"
        return None

    def nearest(self, prompt: str, count: int = 3) -> list[str]:
        """Captions of up to `count` pictures: those with the prompt in them, whole words before
        beginnings and the shortest first, then those that are spelled most like it."""
        words = plain(prompt)
        article, _, rest = words.partition(" ")
        if rest and any(article in articles for articles in ARTICLES.values()):
            words = rest
        within = [name for name in self.pictures if words and f" {words}" in f" {name}"]
        within.sort(key=lambda name: (f" {words} " not in f" {name} ", len(name)))
        found: dict[int, str] = {}
        for name in within + difflib.get_close_matches(words, self.pictures, 3 * count):
            found.setdefault(self.pictures[name], self.captions[name])
        return list(found.values())[:count]

    def containing(self, word: str) -> list[tuple[str, str, str]]:
        """(emoji, language, caption) of all captions with these letters; "": the English ones."""
        letters = plain(word)
        return [
            (self.data.characters[i], language, caption)
            for language, captions in self.data.captions.items()
            if letters or language == "en"
            for i, caption in enumerate(captions)
            if letters in plain(caption)
        ]
