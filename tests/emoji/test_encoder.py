"""The caption encoder: what text becomes, and that a caption's features are its own alone."""

import math
import unicodedata
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.emoji.data import load_emoji
from lumina.emoji.encoder import (
    BUCKETS,
    MAX_BYTES,
    NGRAMS,
    PAD,
    REGISTERS,
    START,
    CaptionEncoder,
    _hash,
    to_bytes,
)

pytestmark = pytest.mark.filterwarnings("ignore:a caption is read up to")

CAPTIONS = [
    "a red apple",
    "",
    "ein roter Apfel",
    "赤いりんご",
    "красное яблоко",
    "تفاحة حمراء",
    "x",
    "a very long caption " * 10,
]


def encoder():
    torch.manual_seed(0)
    return CaptionEncoder(dim=24, width=16, heads=2).double()


def symbols(caption):
    (row,) = to_bytes([caption]).tolist()
    return [s for s in row if s != PAD]


def test_symbols():
    assert to_bytes(["ab", "abcdé"]).tolist() == [
        [START, *b"ab", *[PAD] * 5],
        [START, *b"abcd", 0xC3, 0xA9, PAD],
    ]
    assert to_bytes([""]).tolist() == [[START, PAD, PAD, PAD]]
    none = to_bytes([])
    assert none.shape == (0, 4) and none.dtype == torch.int64
    assert encoder()([])[0].shape == (0, REGISTERS + 1, 24)


@pytest.mark.parametrize(
    "texts",
    [
        ("Red APPLE", "red apple"),
        ("caf\u00e9", "cafe\u0301", "CAFE\u0301"),
        ("ein  grosser\tApfel\n", " ein grosser apfel", "ein grosser\u00a0Apfel"),
        ("Straße", "STRASSE", "strasse"),
        ("한국어", unicodedata.normalize("NFD", "한국어")),
        ("ΣΊΣΥΦΟΣ", "σίσυφος"),
        ("", "  ", "\n"),
    ],
)
def test_spellings_of_one_caption(texts):
    assert len({tuple(symbols(t)) for t in texts}) == 1


def test_different_captions_differ():
    features, mask = encoder()(
        ["red apple", "red appel", "rod apple", "red  applf", "赤い", "赤", ""]
    )
    pooled = (features * mask[..., None]).sum(1)
    assert (torch.cdist(pooled, pooled) + 10 * torch.eye(7)).min() > 0.1


@pytest.mark.parametrize("offset", range(4))
def test_cut_also_inside_a_character(offset):
    long = "a" * offset + "んだ" * 100
    row = symbols(long)
    assert row == [START, *long.encode()[:MAX_BYTES]]
    features, mask = encoder()([long])
    assert mask.all() and features.shape == (1, REGISTERS + (MAX_BYTES + 1) // 4, 24)
    same, _ = encoder()([long + "more"])
    assert torch.equal(features, same)


def test_a_cut_caption_warns():
    fitting = ["a" * MAX_BYTES, "ん" * (MAX_BYTES // 3), "  ".join("abc" * 21)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_bytes(fitting)
    with pytest.warns(UserWarning, match="'bbb.*bbb...' has 128"):
        to_bytes(["b" * (MAX_BYTES + 1)])
    with pytest.warns(UserWarning) as caught:
        to_bytes(["x", "b" * (MAX_BYTES + 1), "赤" * 50])
    assert [str(w.message) for w in caught] == [
        f"a caption is read up to 127 bytes of UTF-8, the rest is ignored; '{'赤' * 10}...' has 150"
    ]


def test_the_empty_caption_has_one_feature_after_the_registers():
    features, mask = encoder()(["", "abc", "abcd"])
    assert mask[:, :REGISTERS].all()
    assert mask[:, REGISTERS:].tolist() == [[True, False], [True, False], [True, True]]
    assert features.isfinite().all()


def test_features_do_not_depend_on_the_batch():
    model = encoder()
    with torch.no_grad():
        together, mask = model(CAPTIONS)
        assert mask.sum(1).tolist() == [
            REGISTERS + math.ceil(len(symbols(c)) / 4) for c in CAPTIONS
        ]
        for i, caption in enumerate(CAPTIONS):
            alone, valid = model([caption])
            assert valid.all()
            torch.testing.assert_close(together[i][mask[i]], alone[0], rtol=1e-12, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(caption=st.text(max_size=60), padding=st.integers(1, 8), data=st.data())
def test_padding_has_no_influence(caption, padding, data):
    """Any text, more padding, and other symbols never used: the features keep their values."""
    model = encoder()
    row = to_bytes([caption])
    longer = torch.nn.functional.pad(row, (0, 4 * padding), value=PAD)[:, : MAX_BYTES + 1]
    with torch.no_grad():
        expected, mask = model([caption])
        features, valid = model(longer)
    length = REGISTERS + math.ceil(len(symbols(caption)) / 4)
    assert mask.all() and int(valid.sum()) == mask.numel() == length
    assert expected.isfinite().all()
    torch.testing.assert_close(features[:, : mask.shape[1]], expected, rtol=1e-12, atol=1e-12)


def test_dtypes_and_tokens():
    model = encoder()
    for dtype in (torch.float32, torch.bfloat16):
        features, mask = model.to(dtype)(to_bytes(["red", "apple"]))
        assert (features.dtype, mask.dtype) == (dtype, torch.bool)
        assert features.isfinite().all()


def test_every_parameter_learns():
    model = encoder()
    features, mask = model(CAPTIONS)
    (features * mask[..., None]).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name
    # One row of each table for each symbol and n-gram that occurs.
    used = to_bytes(CAPTIONS).unique()
    assert model.byte.weight.grad.any(1).nonzero().flatten().tolist() == used[used != PAD].tolist()


@pytest.mark.parametrize("n", NGRAMS)
def test_hashes_collide_as_rarely_as_chance(n):
    """N n-grams fall into BUCKETS (1 - exp(-N / BUCKETS)) of the buckets if these are random."""
    rows = to_bytes([c for captions in load_emoji().captions.values() for c in captions])
    grams = rows.unfold(1, n, 1).flatten(0, 1).unique(dim=0)  # (N, n)
    grams = grams[(grams != PAD).all(1)]
    buckets = _hash(grams, n)[:, -1]
    assert 0 <= buckets.min() and buckets.max() < BUCKETS
    loads = torch.bincount(buckets, minlength=BUCKETS).double()
    assert loads.var() < 1.25 * loads.mean()  # equal for a Poisson distribution

    few = buckets[torch.randperm(len(buckets))[: BUCKETS // 2]]
    expected = BUCKETS * (1 - (1 - 1 / BUCKETS) ** len(few))
    assert abs(few.unique().numel() - expected) < 0.05 * expected


def test_hash_is_that_of_the_last_n_symbols():
    row = torch.tensor([[START, *b"banana", PAD]])
    for n in NGRAMS:
        bucket = _hash(row, n)[0].tolist()
        assert bucket[3] != bucket[4]
        assert (bucket[4] == bucket[6]) == (n <= 3)  # "ana" twice
        other = _hash(torch.tensor([[START, *b"xxanan", PAD]]), n)[0].tolist()
        assert (other[5] == bucket[4]) == (n == 3)


def test_errors():
    with pytest.raises(TypeError, match="captions must be a list of texts, got 'a red apple'"):
        to_bytes("a red apple")
    with pytest.raises(TypeError):
        encoder()([None])
