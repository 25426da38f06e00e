"""The shapes that are measured: those of released models, and smaller ones for CPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """The sizes of a batch for one model, in the letters of `lumina_kernels`."""

    model: str
    D: int  # width
    H: int  # query heads
    G: int  # key/value heads
    K: int  # head_dim
    F: int  # FFN width
    side: int = 64  # tokens along an edge of the picture
    B: int = 2  # a caption and its negative prompt, for guidance
    T: int = 128  # text tokens
    Y: int = 2048  # width of the text features
    layers: int = 1
    dtype: str = "bfloat16"
    valid: float = 1.0  # fraction of the keys, a prefix, that the key mask keeps
    drop: int = 1  # context drop averages drop x drop tokens
    text: bool = False  # attention includes the text branch
    backward: bool = False  # forward and backward instead of forward alone
    quick: bool = False  # selected by `-k quick`
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def L(self) -> int:
        return self.side**2

    def __str__(self) -> str:
        parts = [self.model, f"L{self.L}", self.dtype]
        parts += [f"B{self.B}"] * (self.B != 2)
        parts += [f"{self.layers}layers"] * (self.layers > 1)
        parts += [f"{self.valid:.0%}-valid"] * (self.valid < 1)
        parts += [f"drop{self.drop}"] * (self.drop > 1)
        parts += ["text"] * self.text
        parts += ["backward"] * self.backward
        return "-".join(parts)

    def randn(self, device: str) -> Callable[..., Tensor]:
        """`torch.randn` in this dtype on the device."""
        return lambda *sizes: torch.randn(sizes, device=device).to(getattr(torch, self.dtype))

    def but(self, **changes) -> Shape:
        return replace(self, **changes)


# Tokens of 16 x 16 pixels: side 16, 32, 64 and 128 are 256, 512, 1024 and 2048 pixels.
LUMINA_NEXT = Shape("lumina-next", D=2304, H=32, G=8, K=72, F=6144)
LUMINA_2 = Shape("lumina-image-2", D=2304, H=24, G=8, K=96, F=9216)
Z_IMAGE = Shape("z-image", D=3840, H=30, G=30, K=128, F=10240)
FLUX = Shape("flux", D=3072, H=24, G=24, K=128, F=12288)
# Lumina-Next at a quarter of its width, small enough for a CPU.
QUARTER = Shape("quarter", D=576, H=8, G=2, K=72, F=1536, T=64, Y=256)
COMPACT = Shape("compact", D=288, H=4, G=2, K=72, F=768, side=4, T=24, Y=256, dtype="float32")

CPU, CUDA = ("cpu",), ("cuda",)

# The first shape of each device is the quick one; the most interesting ones come next.
OP_SHAPES = (
    QUARTER.but(side=32, quick=True, devices=CPU),
    LUMINA_NEXT.but(quick=True, devices=CUDA),
    LUMINA_NEXT.but(devices=CPU),
    QUARTER.but(devices=CPU),
    QUARTER.but(side=32, dtype="float32", devices=CPU),
    QUARTER.but(dtype="float32", devices=CPU),
    LUMINA_NEXT.but(side=16),
    LUMINA_NEXT.but(side=32),
    LUMINA_NEXT.but(side=128, devices=CUDA),
    LUMINA_2,
    Z_IMAGE,
    FLUX.but(devices=CUDA),
    COMPACT,
)

# Forward and backward, for the ops that have a gradient.
BACKWARD_SHAPES = (
    QUARTER.but(side=32, backward=True, devices=CPU),
    LUMINA_NEXT.but(backward=True, devices=CUDA),
)
