"""Rotary frequencies, and how to stretch them beyond the training resolution.

Pair j (channels 2j, 2j+1) is rotated by position[axes[j % n]] * f_k, with k = j // n,
f_k = theta^(-e_k) and e_k = 2 n k / K, for n axes and head width K. Where every axis has a block of
its own of a channels (Lumina-Image 2.0, Z-Image), k counts the pairs within it and e_k = 2 k / a.
At s times the trained side length each rule multiplies f_k by s^(-p_k):

    none             p = 0
    linear           p = 1                          position interpolation
    ntk              p = e_k                        base theta * s, as the released Lumina-Next
    frequency_aware  p = min(1, e_k K / d_target)   d_target = K log_theta(base_size / 2 pi)
    time_aware       p = min(1, e_k K / d_t)        d_t = (K - 1) t + 1
    watershed        p = 1 if t < watershed else e_k

time_aware equals ntk at t = 1, and linear at t = 0 except for k = 0, which it never stretches.

The paper writes the two aware rules as max((theta s^(K / d))^(-e_k), f_k / s). For s >= 1 that is
the same, but s^K overflows float32 from s = 4 on, and the exponents above cannot.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("none", "linear", "ntk", "frequency_aware", "time_aware", "watershed")
_COLUMNS = {"t": 0, "h": 1, "w": 2}  # of the position table


@dataclass(frozen=True)
class RopeScaling:
    """How to stretch the rotary frequencies for images larger than those of training.

    Args:
        kind: one of `KINDS`; the table at the top of this module has the formulas.
        factor: linear scale s, 2.0 for twice the trained side length. None takes it per image,
            s = max(1, side / base_size), with side = sqrt(h w) tokens (w for sequences).
        base_size: tokens per side in training. Needed where factor is None, and by frequency_aware.
        watershed: time below which kind "watershed" is linear, and ntk from there on.

    One s applies to all axes. linear, ntk and watershed allow a factor below 1: faster rotations.

    Raises:
        ValueError: an unknown kind or a value out of range, the message says which.

    Source: Lumina-Next, on context extrapolation; "ntk" and "watershed" as in the released code.
    """

    kind: str
    factor: float | None = None
    base_size: int | None = None
    watershed: float = 0.3

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        aware = self.kind in ("frequency_aware", "time_aware")
        if self.kind == "none" and self.factor is not None:
            raise ValueError(f"factor has no meaning for kind 'none', got {self.factor}")
        if self.factor is not None and not (math.isfinite(self.factor) and self.factor > 0):
            raise ValueError(f"factor must be finite and positive, got {self.factor}")
        if aware and self.factor is not None and self.factor < 1:
            raise ValueError(f"factor must be at least 1 for kind {self.kind!r}, got {self.factor}")
        if self.base_size is not None and self.base_size < 1:
            raise ValueError(f"base_size must be at least 1 token, got {self.base_size}")
        if self.base_size is None and self.kind != "none" and self.factor is None:
            raise ValueError(f"kind {self.kind!r} needs a factor or a base_size, got neither")
        if self.kind == "frequency_aware" and (self.base_size or 0) <= 2 * math.pi:
            raise ValueError(f"frequency_aware needs base_size > 2 pi, got {self.base_size}")
        if not 0 <= self.watershed <= 1:
            raise ValueError(f"watershed must lie in [0, 1], got {self.watershed}")

    @property
    def needs_t(self) -> bool:
        """Whether the frequencies change over time."""
        return self.kind in ("time_aware", "watershed")

    @property
    def needs_tokens(self) -> bool:
        """Whether the scale is taken from the size of each image."""
        return self.kind != "none" and self.factor is None


def rope_axes(head_dim: int, axes: Sequence[str], *, device=None) -> Tensor:
    """Column of the position table that rotates each pair of channels: 0 = t, 1 = h, 2 = w.

    Args:
        head_dim: K, even.
        axes: distinct letters out of "t", "h", "w"; pair j takes axes[j % len(axes)].

    Returns:
        (K/2,) int64.

    Raises:
        ValueError: head_dim is not even and positive, or axes are not as above.
    """
    _check_layout(head_dim, axes)
    return _pairs(head_dim, axes, device)[1]


def rope_frequencies(
    head_dim: int,
    axes: Sequence[str],
    theta: float = 10000.0,
    *,
    scaling: RopeScaling | None = None,
    t: Tensor | None = None,
    tokens: int | Tensor | None = None,
    device=None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Radians per position of each pair: theta^(-2 n k / K) * s^(-p), see the top of this module.

    Args:
        head_dim: K, even.
        axes: the n axes of the pairs, as in `rope_axes`.
        theta: base, above 1.
        scaling: None, or the rule for p and s.
        t: (B,) times, 0 = noise, 1 = data. Needed where scaling.needs_t.
        tokens: h * w of the token grid (frames not counted), one int for all or (B,). Needed where
            scaling.needs_tokens.
        device: where None, that of t or of tokens.
        dtype: of the result. Computed in float64 and rounded once (MPS has float32 only).

    Returns:
        (K/2,) without scaling; with it (B, K/2), or (1, K/2) if neither t nor tokens has a batch.
        No tensor is read back to the host.

    Raises:
        ValueError: a bad layout or theta, t or tokens missing, or not of shape (B,).
    """
    _check_layout(head_dim, axes)
    if not 1 < theta < math.inf:  # dynamo cannot trace isfinite of a symbolic float
        raise ValueError(f"theta must be finite and above 1, got {theta}")
    if device is None:
        device = next((x.device for x in (t, tokens) if isinstance(x, Tensor)), None)
    device = torch.get_default_device() if device is None else torch.device(device)
    acc = torch.float32 if device.type == "mps" else torch.float64

    index, _ = _pairs(head_dim, axes, device)
    numerator = (2 * len(axes) * index).to(acc)  # (K/2,)  e_k K, exact
    base = theta ** -(numerator / head_dim)
    if scaling is None or scaling.kind == "none":
        return base.to(dtype)
    batch = _check_batch(scaling, t, tokens)
    s = _linear_scale(scaling, axes, tokens, device, acc).expand(batch)
    p = _exponent(scaling, numerator, head_dim, theta, t)  # (K/2,) or (B, K/2)
    return (base * s[:, None] ** -p).to(dtype)  # (B, K/2)


def block_axes(dims: Sequence[int], *, device=None) -> Tensor:
    """`rope_axes` where the i-th axis rotates a block of dims[i] channels: (K/2,) int64."""
    return torch.cat(
        [torch.full((dim // 2,), i, dtype=torch.int64, device=device) for i, dim in enumerate(dims)]
    )


def block_frequencies(
    dims: Sequence[int],
    theta: float,
    *,
    scaling: RopeScaling | None = None,
    t: Tensor | None = None,
    tokens: int | Tensor | None = None,
    device=None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`rope_frequencies` where the axes (t, h, w) rotate blocks of dims[i] channels.

    Only h and w are stretched: t holds the places of the text.
    """
    acc = torch.float32 if torch.device(device).type == "mps" else torch.float64
    e = torch.cat([torch.arange(0, a, 2, device=device).to(acc) / a for a in dims])  # (K/2,)
    base = theta**-e
    if scaling is None or scaling.kind == "none":
        return base.to(dtype)
    batch = _check_batch(scaling, t, tokens)
    s = _linear_scale(scaling, ("h", "w"), tokens, device, acc).expand(batch)
    K = sum(dims)
    p = _exponent(scaling, e * K, K, theta, t)  # (K/2,) or (B, K/2)
    p = torch.where(block_axes(dims, device=device) == 0, 0.0, p)
    return (base * s[:, None] ** -p).to(dtype)  # (B, K/2)


def positions(t: int, h: int, w: int, device=None) -> Tensor:
    """Coordinates of the tokens of a t x h x w grid, row by row (w runs fastest).

    Returns:
        (t h w, 3) int64, columns t, h, w, each counted from 0.

    Raises:
        ValueError: a side is below 1.
    """
    if min(t, h, w) < 1:
        raise ValueError(f"the sides of the grid must be at least 1, got {(t, h, w)}")
    sides = [torch.arange(n, device=device) for n in (t, h, w)]
    return torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 3)  # (t h w, 3)


def _check_layout(head_dim: int, axes: Sequence[str]) -> None:
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    if len(axes) == 0 or len(set(axes)) != len(axes) or not set(axes) <= set(_COLUMNS):
        raise ValueError(f"axes must be distinct letters out of 't', 'h', 'w', got {tuple(axes)}")


def _pairs(head_dim: int, axes: Sequence[str], device) -> tuple[Tensor, Tensor]:
    """Frequency index and position column of each pair, (K/2,) both."""
    pair = torch.arange(head_dim // 2, device=device)
    column = torch.zeros_like(pair)
    for i, axis in enumerate(axes):  # indexing a table would copy it from the host each time
        column = torch.where(pair % len(axes) == i, _COLUMNS[axis], column)
    return pair // len(axes), column


def _check_batch(scaling: RopeScaling, t: Tensor | None, tokens: int | Tensor | None) -> int:
    """B, as t and tokens agree on it."""
    if scaling.needs_t and t is None:
        raise ValueError(f"kind {scaling.kind!r} needs t")
    if scaling.needs_tokens and tokens is None:
        raise ValueError("scaling without a factor needs tokens")
    batch = None
    for name, x in (("t", t), ("tokens", tokens)):
        if not isinstance(x, Tensor):
            continue
        if x.ndim != 1 or (batch is not None and x.shape[0] != batch):
            rule = "(B,)" if batch is None else f"({batch},) as t has"
            raise ValueError(f"{name} must have shape {rule}, got {tuple(x.shape)}")
        batch = x.shape[0]
    return 1 if batch is None else batch


def _linear_scale(scaling: RopeScaling, axes, tokens, device, acc) -> Tensor:
    """s, (B,) or (1,)."""
    if scaling.factor is not None:
        return torch.full((1,), scaling.factor, dtype=acc, device=device)
    if isinstance(tokens, Tensor):
        tokens = tokens.to(device, acc)
    else:
        tokens = torch.full((1,), tokens, dtype=acc, device=device)
    side = tokens.sqrt() if "h" in axes and "w" in axes else tokens
    return (side / scaling.base_size).clamp(min=1)


def _exponent(scaling: RopeScaling, numerator: Tensor, head_dim: int, theta: float, t) -> Tensor:
    """p of the table at the top; numerator = e_k K."""
    if scaling.kind == "linear":
        return torch.ones_like(numerator)
    ntk = numerator / head_dim
    if scaling.kind == "ntk":
        return ntk
    if scaling.kind == "frequency_aware":
        target = math.log(scaling.base_size / (2 * math.pi), theta)  # d_target / K
        return (ntk / target).clamp(max=1)
    if scaling.kind == "time_aware":
        width = (head_dim - 1) * t.to(numerator) + 1  # (B,)  d_t
        return (numerator / width[:, None]).clamp(max=1)
    early = (
        t.to(numerator.device) < scaling.watershed
    )  # in the dtype of t: float32(0.7) is not < 0.7
    return torch.where(early[:, None], torch.ones_like(numerator), ntk)
