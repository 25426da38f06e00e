"""Prompts to features, by a tokenizer and a language model of `transformers`."""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Text:
    """Features of some prompts, the text first and padding after it."""

    feats: Tensor  # (B, T, Y)
    mask: Tensor  # (B, T) bool, True where there is text

    def __len__(self) -> int:
        return len(self.mask)

    def repeated(self, n: int) -> Text:
        """Every prompt n times in a row."""
        return Text(self.feats.repeat_interleave(n, 0), self.mask.repeat_interleave(n, 0))

    def rows(self, rows: list[int]) -> Text:
        """Some of the prompts."""
        return Text(self.feats[rows], self.mask[rows])

    def padded(self, length: int) -> Text:
        more = length - self.mask.shape[1]
        return Text(F.pad(self.feats, (0, 0, 0, more)), F.pad(self.mask, (0, more)))

    def to(self, device: torch.device) -> Text:
        return Text(self.feats.to(device), self.mask.to(device))

    def as_list(self) -> list[Tensor]:
        """(T_i, Y) of each prompt, without padding."""
        return [feats[mask] for feats, mask in zip(self.feats, self.mask, strict=True)]


def text_of(name: str, feats, mask: Tensor | None, width: int) -> Text | None:
    """The features that a caller gave: a tensor and its mask, or a list of tensors without padding.

    Raises:
        TypeError: neither of these.
        ValueError: shapes that do not fit each other or the network; a tensor without a mask.
    """
    if feats is None:
        return None
    if isinstance(feats, (list, tuple)) and feats and mask is None:
        if any(not isinstance(f, Tensor) for f in feats):
            raise TypeError(f"{name} must be tensors, got {type(feats[0]).__name__}")
        if any(f.ndim != 2 or f.shape[1] != width for f in feats):
            shapes = [tuple(f.shape) for f in feats]
            raise ValueError(f"{name} must be of shapes (T, {width}), got {shapes}")
        mask = nn.utils.rnn.pad_sequence([f.new_ones(len(f)) for f in feats], batch_first=True)
        return Text(nn.utils.rnn.pad_sequence(list(feats), batch_first=True), mask.bool())
    if not isinstance(feats, Tensor):
        raise TypeError(f"{name} must be a tensor of features, got {type(feats).__name__}")
    if mask is None:
        raise ValueError(f"{name} need their attention mask, got None")
    if feats.ndim != 3 or feats.shape[2] != width or mask.shape != feats.shape[:2]:
        raise ValueError(
            f"{name} must have the shape (B, T, {width}) and their mask (B, T), "
            f"got {tuple(feats.shape)} and {tuple(mask.shape)}"
        )
    return Text(feats, mask.bool())


def same_length(*texts: Text | None) -> list[Text | None]:
    """All padded to the longest."""
    length = max(text.mask.shape[1] for text in texts if text is not None)
    return [text and text.padded(length) for text in texts]


@torch.no_grad()
def encode(
    tokenizer,
    encoder: nn.Module,
    texts: Sequence[str],
    prompts: Sequence[str],
    max_length: int,
    device: torch.device,
) -> Text:
    """Features of texts: the states before the last layer of a causal language model.

    A state sees the tokens before it alone: so padding, which comes after the text here whatever
    the tokenizer's side is, and the other texts of a batch have no influence on it.

    prompts: the part of each text that the user wrote, for the warning.

    Warns:
        UserWarning: a text of more than max_length tokens, which is cut.
    """
    distinct = list(dict.fromkeys(texts))
    tokens = tokenizer(
        distinct, padding=True, padding_side="right", truncation=True, max_length=max_length,
        return_tensors="pt",
    )  # fmt: skip
    ids, mask = tokens.input_ids.long(), tokens.attention_mask
    for text, prompt in zip(texts, prompts, strict=True):
        if mask[distinct.index(text)].all() and mask.shape[1] >= max_length:
            _warn_of_cut(tokenizer, text, prompt, max_length)
    if ids.shape[1] == 0:  # empty prompts, and a tokenizer that adds nothing
        ids, mask = ids.new_zeros(len(ids), 1), mask.new_zeros(len(ids), 1)
    states = encoder(
        input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True,
        use_cache=False,
    ).hidden_states  # fmt: skip
    if states is None or len(states) < 2:
        got = type(encoder).__name__
        raise ValueError(f"text_encoder must return its hidden states, a {got} did not")
    rows = [distinct.index(text) for text in texts]
    return Text(states[-2][rows], mask.bool()[rows].to(states[-2].device))


def clean(prompt: str) -> str:
    """A caption as it may be scraped from a page: no markup, no addresses, single spaces.

    What people write in any language stays.
    """
    prompt = html.unescape(prompt)
    prompt = re.sub(r"</?[a-zA-Z][^<>]*>", " ", prompt)
    prompt = re.sub(r"\b(?:https?://|www\.)\S+", " ", prompt)
    return " ".join(prompt.split())


def _warn_of_cut(tokenizer, text: str, prompt: str, max_length: int) -> None:
    whole = tokenizer(text).input_ids
    if len(whole) <= max_length:
        return
    if tokenizer.is_fast:
        kept = tokenizer(
            text, truncation=True, max_length=max_length, return_offsets_mapping=True
        ).offset_mapping
        end = max(stop for _, stop in kept)
    else:
        end = len(tokenizer.decode(whole[:max_length], skip_special_tokens=True))
    begin = text.find(prompt) if prompt else -1
    if begin < 0:
        begin, prompt = 0, text
    end = min(max(end - begin, 0), len(prompt))
    warnings.warn(
        f"a prompt is cut to {max_length} of {len(whole)} tokens, after {end} of its {len(prompt)} "
        f"characters: {prompt[max(end - 30, 0) : end]!r} is the last that counts, "
        f"{prompt[end : end + 30]!r} the first that is lost",
        stacklevel=5,
    )
