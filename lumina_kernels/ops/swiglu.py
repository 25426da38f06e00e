"""The gate of a SwiGLU feed-forward layer."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lumina_kernels.backend import launchers, resolve
from lumina_kernels.ops._checks import check_float, check_floating, check_same_dtype

BACKENDS = ("triton", "cuda", "cpu")


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
    backend = resolve(backend, BACKENDS, a, b)
    return swiglu_ref(a, b) if backend == "torch" else swiglu_fwd(a, b, backend)


def swiglu_ref(a, b):
    """The definition."""
    acc = torch.promote_types(a.dtype, torch.float32)
    return (F.silu(a.to(acc)) * b.to(acc)).to(a.dtype)


# Registered at import, so that torch.compile knows shapes and gradients before any kernel exists.


@torch.library.custom_op("lumina_kernels::swiglu_fwd", mutates_args=())
def swiglu_fwd(a: Tensor, b: Tensor, backend: str) -> Tensor:
    """The output, contiguous."""
    kernels = launchers("swiglu", backend)
    return kernels.swiglu_fwd(a, b)


@swiglu_fwd.register_fake
def _(a, b, backend):
    return a.new_empty(a.shape)


@torch.library.custom_op("lumina_kernels::swiglu_bwd", mutates_args=())
def swiglu_bwd(dout: Tensor, a: Tensor, b: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """da and db."""
    kernels = launchers("swiglu", backend)
    return kernels.swiglu_bwd(dout, a, b)


@swiglu_bwd.register_fake
def _(dout, a, b, backend):
    return a.new_empty(a.shape), b.new_empty(b.shape)


def _setup_context(ctx, inputs, output):
    a, b, ctx.backend = inputs
    ctx.save_for_backward(a, b)


def _backward(ctx, dout):
    return *swiglu_bwd(dout, *ctx.saved_tensors, ctx.backend), None


swiglu_fwd.register_autograd(_backward, setup_context=_setup_context)
