"""What people type for a caption finds it, without a change to the caption itself."""

import pytest
import torch

from lumina.emoji.data import EmojiSet, load_emoji
from lumina.emoji.encoder import to_bytes
from lumina.emoji.names import ARTICLES, Names, plain


@pytest.fixture(scope="module")
def names():
    return Names(load_emoji())


@pytest.mark.parametrize("language", load_emoji().captions)
def test_known_captions_stay_bit_for_bit(names, language):
    """With and without articles, as the model was trained."""
    for article in ("", *ARTICLES.get(language, ())):
        captions = [f"{article} {c}".strip() for c in names.data.captions[language]]
        found = [names.caption(c) for c in captions]
        assert torch.equal(to_bytes(found), to_bytes(captions))


def test_case_and_punctuation_do_not_matter(names):
    for language, captions in names.data.captions.items():
        for caption in captions:
            for typed in (caption.upper(), f"«{caption}»!", f" {caption.title()} ."):
                if plain(typed) == plain(caption):  # not so for "ß" and the Turkish i
                    assert plain(names.caption(typed)) == plain(caption), (language, typed)
    for typed, caption in {
        "A RED, apple!": "a red apple",
        "an-octopus": "an octopus",
        "Ein Kaktus.": "ein kaktus",
        "man's shoe": "man’s shoe",
        "NEW button?": "new button",
        "🍎": "red apple",
        "❤": "red heart",
        "❤️": "red heart",
    }.items():
        assert names.caption(typed).casefold() == caption.casefold()


def test_what_the_model_does_not_know(names):
    for prompt in ("purple aple", "", "!", "an", "der octopus", "red apple red apple"):
        assert names.caption(prompt) is None
    assert names.nearest("red aple")[:2] == ["red apple", "green apple"]
    assert names.nearest("CAT!")[0] == "cat face"
    assert names.nearest("a dog")[0] == "dog face"
    assert names.nearest("hund")[0] == "hundegesicht"
    assert names.nearest("qqqqqqqq") == names.nearest("") == names.nearest("?!") == []


def test_lists(names):
    english = names.containing("")
    assert [caption for _, _, caption in english] == names.data.captions["en"]
    assert {language for _, language, _ in english} == {"en"}
    assert names.containing("Red  APPLE!") == [("🍎", "en", "red apple")]
    assert ("🍎", "de", "roter apfel") in names.containing("apfel")
    assert names.containing("no such thing") == []


def test_a_caption_shared_by_languages_has_the_articles_of_both():
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    names = Names(EmojiSet(images, ["x"], {"en": ["kit"], "de": ["kit"], "ja": [""]}))
    assert names.caption("the kit") == "the kit" and names.caption("das kit") == "das kit"
    assert names.caption("le kit") is None
