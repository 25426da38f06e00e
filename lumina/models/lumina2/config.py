"""The shape of a Lumina-Image 2.0, and the shapes that were released."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from lumina.models.parts.fields import LARGEST, check_number
from lumina.models.parts.joint_config import JointConfig


@dataclass(frozen=True)
class Lumina2Config(JointConfig):
    """Sizes of a Lumina-Image 2.0 (arXiv 2503.21758); the defaults are the released model.

    Args:
        multiple_of: the FFN width, 4 D, is rounded up to a multiple of this.
        ffn_dim_multiplier: scales the FFN width before rounding; None leaves it.

    The others as in `JointConfig`.

    Raises:
        ValueError: a field of another type or out of its range; sizes that do not fit together.
    """

    patch_size: int = 2
    in_channels: int = 16
    dim: int = 2304
    n_layers: int = 26
    n_refiner_layers: int = 2
    n_heads: int = 24
    n_kv_heads: int = 8
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2304
    rope_theta: float = 10000.0
    axes_dims: tuple[int, int, int] = (32, 32, 32)
    axes_lens: tuple[int, int, int] = (300, 512, 512)
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None

    def __post_init__(self):
        check_number(self, "multiple_of", Integral, 1, LARGEST)
        super().__post_init__()

    @property
    def ffn_dim(self) -> int:
        hidden = 4 * self.dim
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return -(-hidden // self.multiple_of) * self.multiple_of

    @property
    def cond_dim(self) -> int:
        return min(self.dim, 1024)


PRESETS = {
    "lumina2": Lumina2Config(),  # also Neta-Lumina
    # In the released code, without weights.
    "lumina2-3b": Lumina2Config(dim=2592, n_layers=30, axes_dims=(36, 36, 36)),
    "lumina2-4b": Lumina2Config(dim=2880, n_layers=32, axes_dims=(40, 40, 40)),
    "lumina2-7b": Lumina2Config(dim=3840, n_layers=32, n_heads=32, axes_dims=(40, 40, 40)),
}
