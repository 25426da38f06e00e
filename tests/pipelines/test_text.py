"""Prompts: every language survives, what is cut is said, padding and company have no influence."""

import warnings

import pytest
import torch
from pipelines.runs import FAMILIES, draw, generator

from lumina.pipelines.text import Text, clean, encode, same_length, text_of

LANGUAGES = (
    "桌子上的红苹果，窗边的猫",
    "海の見える家とりんご",
    "나무 아래 고양이",
    "تفاحة حمراء على الطاولة",
    "תפוח אדום על השולחן",
    "Красное яблоко на столе",
    "सेब मेज पर",
    "ταξί στη θάλασσα",
    "🍎🐱 👨\u200d👩\u200d👧",
    "straße, naïve, Ağ",
    "x < y & z > 3 <3",
)


def features(pipe, texts, max_length=64, prompts=None):
    return encode(
        pipe.tokenizer, pipe.text_encoder, texts, prompts or texts, max_length, torch.device("cpu")
    )


@pytest.mark.parametrize("text", LANGUAGES)
def test_cleaning_keeps_what_people_write(text):
    assert clean(text) == text
    assert clean(f"<b>{text}</b>  https://example.org/a?b=c &amp; www.example.org\n") == f"{text} &"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_language_reaches_the_encoder(family, ours):
    seen, pipe = [], ours[family]
    hook = pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    try:
        pipe.encode_prompt(list(LANGUAGES), do_classifier_free_guidance=False)
    finally:
        hook.remove()
    (call,) = seen
    for text, ids, mask in zip(LANGUAGES, call["input_ids"], call["attention_mask"], strict=True):
        assert text.lower() in pipe.tokenizer.decode(ids[mask.bool()]).lower()


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_other_languages_differ(family, ours):
    pictures = draw(ours[family], list(LANGUAGES[:3]), latents=_noise(family, 3))
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (pictures[a] - pictures[b]).abs().max() > 1e-3


def _noise(family, n):
    shape = (1, 4 if family == "lumina_next" else 16, 8, 8)
    return torch.randn(shape, generator=generator()).expand(n, -1, -1, -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_10_000_characters_is_cut_where_the_warning_says(family, ours):
    pipe = ours[family]
    prompt = " ".join(f"word{i}" for i in range(2000))[:10_000]
    limit = 512 if family == "z_image" else 256
    with pytest.warns(UserWarning, match=f"cut to {limit} of") as caught:
        got = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    message = str(caught[0].message)
    assert len(caught) == 1 and "of its 10000 characters" in message
    end = int(message.split("after ")[1].split(" ")[0])
    kept, lost = prompt[max(end - 30, 0) : end], prompt[end : end + 30]
    assert f"{kept!r} is the last that counts, {lost!r} the first that is lost" in message
    feats = got[0][0]
    assert len(feats) == limit
    # What is after the cut has no influence, what is before it has; nothing is left to warn of.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = pipe.encode_prompt(prompt[:end] + "?" * 99, do_classifier_free_guidance=False)
        changed = pipe.encode_prompt(
            prompt[: end - 1] + "?" + prompt[end:], do_classifier_free_guidance=False
        )
    assert torch.equal(other[0][0], feats) and not torch.equal(changed[0][0], feats)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_tokens_is_honoured(family, ours):
    """LuminaPipeline of diffusers takes 256 whatever it is told."""
    prompt = " ".join(["apple"] * 200)
    for limit in (40, 300):
        with pytest.warns(UserWarning, match=f"cut to {limit} of"):
            got = ours[family].encode_prompt(prompt, max_sequence_length=limit)
        assert len(got[0][0]) == limit
    with pytest.warns(UserWarning, match="cut to 40 of"):
        ours[family](
            prompt, max_sequence_length=40, num_inference_steps=1, height=64, width=64,
            output_type="latent",
        )  # fmt: skip


def test_a_prompt_that_just_fits_is_not_warned_of(ours):
    pipe = ours["lumina_next"]
    n = len(pipe.tokenizer("a red apple").input_ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert features(pipe, ["a red apple"], n).mask.shape == (1, n)
    with pytest.warns(UserWarning, match=f"cut to {n - 1} of {n} tokens"):
        features(pipe, ["a red apple"], n - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_company_have_no_influence(family, ours):
    pipe = ours[family]
    pipe.tokenizer.padding_side = "left"
    texts = ["a red apple", "two cats sleep under an old tree by the sea", "a red apple"]
    together = features(pipe, texts)
    for i, text in enumerate(texts):
        alone = features(pipe, [text])
        assert alone.mask.all()
        n = alone.mask.shape[1]
        assert together.mask[i].tolist() == [j < n for j in range(together.mask.shape[1])]
        assert (together.feats[i, :n] - alone.feats[0]).abs().max() < 1e-5
    assert pipe.tokenizer.padding_side == "left"  # as it was


def test_empty_prompts_of_a_tokenizer_that_adds_nothing(ours):
    pipe = ours["z_image"]  # without its template
    text = features(pipe, ["", ""])
    assert text.mask.shape == (2, 1) and not text.mask.any() and len(text) == 2
    text = features(pipe, ["", "a"])
    assert text.mask.sum(1).tolist() == [0, 1]


def test_a_slow_tokenizer(ours):
    """Has no offsets: the place is counted in what the kept tokens decode to."""

    class Slow:
        is_fast = False

        def __init__(self, fast):
            self.fast = fast

        def __call__(self, *args, **kwargs):
            assert not kwargs.get("return_offsets_mapping")
            return self.fast(*args, **kwargs)

        def decode(self, *args, **kwargs):
            return self.fast.decode(*args, **kwargs)

    pipe, messages = ours["lumina_next"], []
    for tokenizer in (pipe.tokenizer, Slow(pipe.tokenizer)):
        with pytest.warns(UserWarning, match="cut to 5") as caught:
            prompts = ["a red apple on a wooden table"]
            encode(tokenizer, pipe.text_encoder, prompts, prompts, 5, torch.device("cpu"))
        messages.append(str(caught[0].message))
    assert messages[0] == messages[1]


def test_features_that_a_caller_gives():
    a, b = torch.randn(2, 8), torch.randn(5, 8)
    text = text_of("embeds", [a, b], None, 8)
    assert text.mask.sum(1).tolist() == [2, 5]
    for given, back in zip((a, b), text.as_list(), strict=True):
        assert torch.equal(given, back)
    again = text_of("embeds", text.feats, text.mask.long(), 8)
    assert torch.equal(again.mask, text.mask) and text_of("embeds", None, None, 8) is None
    longer, none = same_length(text, None)
    assert none is None and longer.mask.shape == (2, 5)
    longer, _ = same_length(text, Text(torch.ones(2, 7, 8), torch.ones(2, 7).bool()))
    assert longer.mask.sum(1).tolist() == [2, 5] and longer.feats.shape == (2, 7, 8)
    for error, given, mask, message in (
        (ValueError, text.feats, None, "embeds need their attention mask, got None"),
        (ValueError, torch.ones(2, 5, 9), torch.ones(2, 5), "shape .B, T, 8. .* got .2, 5, 9."),
        (ValueError, torch.ones(2, 5, 8), torch.ones(2, 4), "mask .B, T., got .2, 5, 8. and .2, 4"),
        (ValueError, [a, torch.ones(3, 9)], None, "of shapes .T, 8., got .*3, 9"),
        (TypeError, [a, "b"], None, "must be tensors"),
        (TypeError, "text", None, "embeds must be a tensor of features, got str"),
    ):
        with pytest.raises(error, match=message):
            text_of("embeds", given, mask, 8)
