"""What the configs of the joint networks have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lumina.models.parts.fields import check_constants, check_heads, check_sizes, check_widths
from lumina.models.parts.fields import shown as shown_field


@dataclass(frozen=True)
class JointConfig:
    """Sizes of a network whose blocks run over image and text in one sequence.

    Args:
        patch_size: side of a square patch, in latent pixels.
        in_channels: channels of the latent.
        dim: width D.
        n_layers: blocks over image and text.
        n_refiner_layers: blocks over the image alone, and as many over the text alone, before.
        n_heads: query heads H.
        n_kv_heads: key/value heads G; H must be a multiple of it.
        norm_eps: epsilon of the norms; the last norm's is 1e-6.
        cap_feat_dim: width of the text features.
        rope_theta: base of the rotary frequencies.
        axes_dims: channels of a head that each axis rotates, (t, h, w); their sum is head_dim.
        axes_lens: places on each axis in the tables of the released code. Angles are computed here,
            so it bounds nothing; it is kept for diffusers.

    Raises:
        ValueError: a field of another type or out of its range; sizes that do not fit together.
    """

    patch_size: int
    in_channels: int
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    cap_feat_dim: int
    rope_theta: float
    axes_dims: tuple[int, int, int]
    axes_lens: tuple[int, int, int]

    stacks: ClassVar[dict[str, str]] = {  # lists of blocks, and their lengths
        "noise_refiner": "n_refiner_layers",
        "context_refiner": "n_refiner_layers",
        "layers": "n_layers",
    }
    axes: ClassVar[tuple[str, ...]] = ("h", "w")  # see `lumina.models.parts.patches.Patched`
    channels_first: ClassVar[bool] = False

    def __post_init__(self):
        check_sizes(
            self,
            "patch_size in_channels dim n_layers n_refiner_layers n_heads n_kv_heads cap_feat_dim",
        )
        check_constants(self)
        check_heads(self)
        for name in ("axes_dims", "axes_lens"):
            value = getattr(self, name)
            whole = isinstance(value, (list, tuple)) and all(type(n) is int for n in value)
            if not whole or len(value) != 3 or not all(0 < n < 2**24 for n in value):
                rule = f"{name} must be three positive whole numbers"
                raise ValueError(f"{rule}, got {shown_field(self, name)}")
            object.__setattr__(self, name, tuple(value))  # JSON brings a list
        if sum(self.axes_dims) != self.head_dim or any(n % 2 for n in self.axes_dims):
            raise ValueError(
                f"axes_dims must be even and add up to head_dim, {self.head_dim}, "
                f"got {self.axes_dims}"
            )
        check_widths(self)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        raise NotImplementedError

    @property
    def cond_dim(self) -> int:
        """Width of the conditioning vector of the time."""
        raise NotImplementedError

    @property
    def out_channels(self) -> int:
        return self.in_channels

    @property
    def patch(self) -> tuple[int, int, int]:
        """Patch extent along (t, h, w)."""
        return (1, self.patch_size, self.patch_size)

    @property
    def patch_volume(self) -> int:
        return self.patch_size**2
