"""The gate of a SwiGLU feed-forward layer."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lumina_kernels.backend import resolve
from lumina_kernels.ops._checks import check_float, check_floating, check_same_dtype


def swiglu(a: Tensor, b: Tensor, *, backend: str | None = None) -> Tensor:
    """Return silu(a) * b, with silu(a) = a / (1 + exp(-a)).

    SwiGLU of Shazeer (arXiv 2002.05202) after its two projections: w2(swiglu(w1 x, w3 x)).

    Args:
        a: gate projection, (B, L, F) or any other shape. Strided views, as `chunk` gives them, are
            fine.
        b: value projection, same shape and dtype.
        backend: None takes the best one there is; see `lumina_kernels.backend`.

    Returns:
        shaped as a, in a.dtype. The arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        ValueError: the shapes or devices differ, or there is no such backend.
        TypeError: an argument is not a floating-point tensor, or the dtypes differ.
    """
    check_floating("a", a)
    check_float("b", b, a.device, tuple(a.shape))
    check_same_dtype(a=a, b=b)
    resolve(backend, (), a.device)
    return swiglu_ref(a, b)


def swiglu_ref(a, b):
    """The definition."""
    acc = torch.promote_types(a.dtype, torch.float32)
    return (F.silu(a.to(acc)) * b.to(acc)).to(a.dtype)
