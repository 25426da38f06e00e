"""The shape of a Z-Image, and the shapes that were released."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from lumina.models.parts.fields import check_number
from lumina.models.parts.joint_config import JointConfig


@dataclass(frozen=True)
class ZImageConfig(JointConfig):
    """Sizes of a Z-Image (arXiv 2511.22699); the defaults are the released model.

    Args:
        t_scale: the time is multiplied by it before its embedding.

    The others as in `JointConfig`. The FFN width is int(D / 3 * 8).

    Raises:
        ValueError: a field of another type or out of its range; sizes that do not fit together.
    """

    patch_size: int = 2
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    axes_dims: tuple[int, int, int] = (32, 48, 48)
    axes_lens: tuple[int, int, int] = (1536, 512, 512)
    t_scale: float = 1000.0

    def __post_init__(self):
        check_number(self, "t_scale", Real, 0, 2.0**127)
        super().__post_init__()

    @property
    def ffn_dim(self) -> int:
        return int(self.dim / 3 * 8)  # rounded as in the released code

    @property
    def cond_dim(self) -> int:
        return min(self.dim, 256)


PRESETS = {"z-image": ZImageConfig()}  # both the base model and Turbo
