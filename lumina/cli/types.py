"""Types of arguments: what they read, or the rule that is broken."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

MAX_PIXELS = 50_000_000  # in a picture: some gigabytes of the network's activations


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Reads a whole number in this range."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {value}")
        return value

    number.__name__ = "int"  # in argparse's message about other texts
    return number


def seed(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"must fit in 64 bits, got {value}")
    return value


def size(text: str) -> tuple[int, int]:
    """ "64x32" (width x height) as (H, W)."""
    try:
        width, height = (int(n) for n in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, got {text!r}") from None
    if min(width, height) < 1:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, both positive, got {text!r}")
    if width * height > MAX_PIXELS:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_PIXELS} pixels, got {text!r}")
    return height, width


def device(text: str) -> str:
    try:
        device = torch.empty(1, device=text).device
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition(". ")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from None
    if device.type == "meta":  # tensors without numbers
        raise argparse.ArgumentTypeError("must be cpu or cuda, got 'meta'")
    return text
