"""The activation of a feed-forward layer without a gate."""

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from lumina_kernels.backend import BEST_FIRST, resolve
from lumina_kernels.checks import check_floating
from lumina_kernels.kernel_op import kernel_op

APPROXIMATIONS = ("none", "tanh")
Any = Annotated[Tensor, "..."]


def gelu(x: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """Return x * (1 + erf(x / sqrt(2))) / 2, or for approximate="tanh"
    x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) / 2.

    GELU of Hendrycks and Gimpel (arXiv 1606.08415), as `torch.nn.functional.gelu`. Flux, Wan and
    PixArt have the second form between the two projections of their feed-forward layers.

    Args:
        x: any shape; strided views, as from `chunk`, are fine.
        approximate: "none" or "tanh".
        backend: None takes the best one available; see `lumina_kernels.backend`.

    Returns:
        shaped as x, in x.dtype. The arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        TypeError: x is not a floating tensor.
        ValueError: approximate is not one of the two.
    """
    check_floating("x", x)
    if approximate not in APPROXIMATIONS:
        names = ", ".join(APPROXIMATIONS)
        raise ValueError(f"approximate must be one of {names}, got {approximate!r}")
    backend = resolve(backend, BEST_FIRST, x, op="gelu")
    if backend == "torch":
        return gelu_ref(x, approximate)
    return gelu_fwd(x, approximate == "tanh", backend)


def gelu_ref(x, approximate="none"):
    """The definition."""
    acc = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(x.to(acc), approximate=approximate).to(x.dtype)


@kernel_op("out", over="...")
def gelu_fwd(x: Any, tanh: bool) -> Any:
    return x.new_empty(x.shape)


@gelu_fwd.backward("dx")
def gelu_bwd(dout, x, tanh):
    return x.new_empty(x.shape)
