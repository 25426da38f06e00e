"""The shape of a Next-DiT, and the shapes that were released."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from numbers import Integral, Real

AXES = (("h", "w"), ("t", "h", "w"), ("w",))
LARGEST = 2**24  # size that is no mistake; the bytes of every tensor stay countable in 64 bits


@dataclass(frozen=True)
class NextDiTConfig:
    """Sizes of a Next-DiT (Lumina-Next, arXiv 2406.18583).

    The defaults are the released text-to-image model.

    Args:
        patch_size: side of a square patch, in latent pixels; a patch spans one frame.
        in_channels: channels of the latent.
        dim: width D.
        n_layers: transformer blocks.
        n_heads: query heads H.
        n_kv_heads: key/value heads G; H must be a multiple of it.
        multiple_of: the FFN width is rounded up to a multiple of this.
        ffn_dim_multiplier: scales the FFN width before rounding; None leaves it.
        norm_eps: epsilon of the blocks' norms; the pooled caption's is 1e-5, the last norm's 1e-6.
        qk_norm: LayerNorm across heads on q, k and text k.
        learn_sigma: the network has twice the output channels; the second half is thrown away.
        cap_feat_dim: width of the text features.
        rope_theta: base of the rotary frequencies.
        axes: what rotates RoPE's pairs, alternating: ("h", "w") for images (B, C, H, W),
            ("t", "h", "w") for video and multi-view (B, C, T, H, W), ("w",) for audio (B, C, L).

    Raises:
        ValueError: a field of another type or out of its range; sizes that do not fit together.
    """

    patch_size: int = 2
    in_channels: int = 4
    dim: int = 2304
    n_layers: int = 24
    n_heads: int = 32
    n_kv_heads: int = 8
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = True
    learn_sigma: bool = True
    cap_feat_dim: int = 2048
    rope_theta: float = 10000.0
    axes: tuple[str, ...] = ("h", "w")

    def __post_init__(self):
        if isinstance(self.axes, list):  # JSON brings one
            object.__setattr__(self, "axes", tuple(self.axes))
        sizes = "patch_size in_channels dim n_layers n_heads n_kv_heads multiple_of cap_feat_dim"
        for name in sizes.split():
            self._check_number(name, Integral, 1, LARGEST)
        for name in ("qk_norm", "learn_sigma"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {self._shown(name)}")
        self._check_number("norm_eps", Real, 0, 1)
        self._check_number("rope_theta", Real, 1, 2.0**127)
        if self.rope_theta == 1:
            raise ValueError("rope_theta must be above 1, got 1.0")
        if self.ffn_dim_multiplier is not None:
            self._check_number("ffn_dim_multiplier", Real, 1 / LARGEST, LARGEST)
        for name, divisor in (("dim", "n_heads"), ("n_heads", "n_kv_heads")):
            a, b = getattr(self, name), getattr(self, divisor)
            if a % b:
                raise ValueError(f"{name} must be a multiple of {divisor}, got {a} and {b}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = dim / n_heads must be even, got {self.head_dim}")
        if self.axes not in AXES:
            raise ValueError(f"axes must be one of {AXES}, got {self._shown('axes')}")
        for name, width in (
            ("ffn_dim", self.ffn_dim),
            ("the width of a patch", self.patch_volume * self.out_channels),
        ):
            if not 1 <= width <= LARGEST:
                raise ValueError(f"{name} must lie in [1, {LARGEST}], got {width}")

    def _check_number(self, name: str, kind: type, low: float, high: float) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
            what = "whole number" if kind is Integral else "number"
            raise ValueError(f"{name} must be a {what} in [{low}, {high}], got {self._shown(name)}")
        object.__setattr__(self, name, (int if kind is Integral else float)(value))

    def _shown(self, name: str) -> str:
        return reprlib.repr(getattr(self, name))

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return -(-hidden // self.multiple_of) * self.multiple_of

    @property
    def cond_dim(self) -> int:
        """Width of the conditioning vector of time and pooled caption."""
        return min(self.dim, 1024)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Patch extent along (t, h, w)."""
        return (1, self.patch_size if "h" in self.axes else 1, self.patch_size)

    @property
    def patch_volume(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2]


PRESETS = {
    # The model that ships with the package: 32x32 RGB pictures, the real head_dim, 2:1 GQA.
    "compact": NextDiTConfig(
        patch_size=8,
        in_channels=3,
        dim=288,
        n_layers=6,
        n_heads=4,
        n_kv_heads=2,
        learn_sigma=False,
        cap_feat_dim=256,
    ),  # fmt: skip
    "600m": NextDiTConfig(dim=1536, n_layers=16, n_heads=32, n_kv_heads=32),
    "2b": NextDiTConfig(n_kv_heads=32),
    "2b-gqa": NextDiTConfig(),
}
