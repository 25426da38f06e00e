"""Checks of the fields of a config, which may come out of a file."""

from __future__ import annotations

import reprlib
from numbers import Integral, Real

LARGEST = 2**24  # size that is no mistake; the bytes of every tensor stay countable in 64 bits


def check_number(config, name: str, kind: type, low: float, high: float) -> None:
    """Refuse what is no number of this kind within [low, high], and make it an int or a float."""
    value = getattr(config, name)
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
        what = "whole number" if kind is Integral else "number"
        raise ValueError(f"{name} must be a {what} in [{low}, {high}], got {shown(config, name)}")
    object.__setattr__(config, name, (int if kind is Integral else float)(value))


def check_sizes(config, names: str) -> None:
    """The fields of these names must be sizes."""
    for name in names.split():
        check_number(config, name, Integral, 1, LARGEST)


def check_constants(config) -> None:
    """The fields norm_eps, rope_theta and, if there is one, ffn_dim_multiplier."""
    check_number(config, "norm_eps", Real, 0, 1)
    check_number(config, "rope_theta", Real, 1, 2.0**127)
    if config.rope_theta == 1:
        raise ValueError("rope_theta must be above 1, got 1.0")
    if getattr(config, "ffn_dim_multiplier", None) is not None:
        check_number(config, "ffn_dim_multiplier", Real, 1 / LARGEST, LARGEST)


def check_heads(config) -> None:
    """dim, n_heads and n_kv_heads must divide, and leave a head_dim of pairs."""
    for name, divisor in (("dim", "n_heads"), ("n_heads", "n_kv_heads")):
        a, b = getattr(config, name), getattr(config, divisor)
        if a % b:
            raise ValueError(f"{name} must be a multiple of {divisor}, got {a} and {b}")
    if config.head_dim % 2:
        raise ValueError(f"head_dim = dim / n_heads must be even, got {config.head_dim}")


def check_widths(config) -> None:
    """The widths that are computed must be sizes too."""
    for name, width in (
        ("ffn_dim", config.ffn_dim),
        ("the width of a patch", config.patch_volume * config.out_channels),
    ):
        if not 1 <= width <= LARGEST:
            raise ValueError(f"{name} must lie in [1, {LARGEST}], got {width}")


def shown(config, name: str) -> str:
    """The value of a field, short."""
    return reprlib.repr(getattr(config, name))
