"""The shape of a Next-DiT, and the shapes that were released."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lumina.models.parts.fields import (
    check_constants,
    check_heads,
    check_sizes,
    check_widths,
    shown,
)

AXES = (("h", "w"), ("t", "h", "w"), ("w",))


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

    stacks: ClassVar[dict[str, str]] = {"layers": "n_layers"}  # lists of blocks, and their lengths
    channels_first: ClassVar[bool] = True  # see `lumina.models.parts.patches.Patched`

    def __post_init__(self):
        if isinstance(self.axes, list):  # JSON brings one
            object.__setattr__(self, "axes", tuple(self.axes))
        check_sizes(
            self, "patch_size in_channels dim n_layers n_heads n_kv_heads multiple_of cap_feat_dim"
        )
        for name in ("qk_norm", "learn_sigma"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {shown(self, name)}")
        check_constants(self)
        check_heads(self)
        if self.axes not in AXES:
            raise ValueError(f"axes must be one of {AXES}, got {shown(self, 'axes')}")
        check_widths(self)

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
