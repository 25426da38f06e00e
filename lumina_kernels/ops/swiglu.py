"""The gate of a SwiGLU feed-forward layer."""

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from lumina_kernels.backend import BEST_FIRST, resolve
from lumina_kernels.checks import are_like, check_float, check_floating, check_same_dtype
from lumina_kernels.kernel_op import kernel_op, like

Any = Annotated[Tensor, "..."]


def swiglu(a: Tensor, b: Tensor, *, backend: str | None = None) -> Tensor:
    """Return silu(a) * b, with silu(a) = a / (1 + exp(-a)).

    SwiGLU of Shazeer (arXiv 2002.05202) after its two projections: w2(swiglu(w1 x, w3 x)).

    Args:
        a: gate projection, (B, L, F) or any other shape; strided views, as from `chunk`, are fine.
        b: value projection, same shape and dtype.
        backend: None takes the best one available; see `lumina_kernels.backend`.

    Returns:
        shaped as a, in a.dtype. The arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        ValueError, TypeError: the shapes, devices or dtypes differ, or a dtype is not floating.
    """
    check_floating("a", a)
    if not are_like(a.dtype, a.device, a.shape, b):
        check_float("b", b, a.device, tuple(a.shape))
        check_same_dtype(a=a, b=b)
    backend = resolve(backend, BEST_FIRST, a, b, op="swiglu")
    return swiglu_ref(a, b) if backend == "torch" else swiglu_fwd(a, b, backend)


def swiglu_ref(a, b):
    """The definition."""
    acc = torch.promote_types(a.dtype, torch.float32)
    return (F.silu(a.to(acc)) * b.to(acc)).to(a.dtype)


@kernel_op("out", over="...")
def swiglu_fwd(a: Any, b: Any) -> Any:
    return a.new_empty(a.shape)


@swiglu_fwd.backward("da db")
def swiglu_bwd(dout, a, b):
    return like(a, b)
