"""Gated residual sandwich norm, the tail of every Next-DiT sub-layer."""

import torch
from torch import Tensor

from lumina_kernels.backend import launchers, resolve
from lumina_kernels.ops._checks import check_axes, check_float
from lumina_kernels.ops.norm_modulate import norm_modulate_ref, per_token

BACKENDS = ("triton", "cuda", "cpu")


def sandwich_norm(
    y: Tensor,
    residual: Tensor,
    weight: Tensor,
    gate: Tensor,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return residual + tanh(gate) * rms_norm(y) * weight.

    rms_norm(y) = y * rsqrt(mean(y²) + eps). The block tail of Lumina-Next (arXiv 2406.18583).

    Args:
        y: output of the attention or feed-forward layer, (B, L, D).
        residual: input of that layer, (B, L, D).
        weight: RMSNorm scale, (D,).
        gate: adaLN gate before the tanh, one row per sample, (B, D), or per token, (B, L, D).
            Strided views, as `chunk` gives them, are fine.
        eps: added to the mean square.
        backend: None takes the best one there is; see `lumina_kernels.backend`.

    Returns:
        (B, L, D) in residual.dtype (y may have another). The arithmetic is float32 (float64 for
        float64), rounded once.

    Raises:
        ValueError: a shape or device does not fit y, or there is no such backend.
        TypeError: an argument is not a floating-point tensor.
    """
    check_sandwich(y, residual, weight, gate)
    backend = resolve(backend, BACKENDS, y, residual, weight, gate)
    if backend == "torch":
        return sandwich_norm_ref(y, residual, weight, gate, eps)
    return sandwich_norm_fwd(y, residual, weight, gate, eps, backend)[0]


def sandwich_norm_ref(y, residual, weight, gate, eps=1e-5):
    """The definition."""
    acc = torch.promote_types(torch.promote_types(y.dtype, residual.dtype), torch.float32)
    normed = norm_modulate_ref(y.to(acc), weight, eps=eps)
    out = residual.to(acc) + torch.tanh(per_token(gate).to(acc)) * normed
    return out.to(residual.dtype)


def check_sandwich(y: Tensor, residual: Tensor, weight: Tensor, gate: Tensor) -> None:
    """The arguments of a sandwich norm over rows shaped as y, (B, L, D)."""
    check_axes("y", y, "B, L, D")
    B, L, D = y.shape
    check_float("residual", residual, y.device, (B, L, D))
    check_float("weight", weight, y.device, (D,))
    check_float("gate", gate, y.device, (B, D), (B, L, D))


# Registered at import, so that torch.compile knows shapes and gradients before any kernel exists.


@torch.library.custom_op("lumina_kernels::sandwich_norm_fwd", mutates_args=())
def sandwich_norm_fwd(
    y: Tensor, residual: Tensor, weight: Tensor, gate: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """The output, and rstd (B, L) float32, which the gradient needs."""
    kernels = launchers("sandwich_norm", backend)
    return kernels.sandwich_norm_fwd(y, residual, weight, gate, eps)


@sandwich_norm_fwd.register_fake
def _(y, residual, weight, gate, eps, backend):
    return residual.new_empty(y.shape), y.new_empty(y.shape[:2], dtype=torch.float32)


@torch.library.custom_op("lumina_kernels::sandwich_norm_bwd", mutates_args=())
def sandwich_norm_bwd(
    dout: Tensor, y: Tensor, weight: Tensor, gate: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, dweight and dgate; the gradient of the residual is dout itself."""
    kernels = launchers("sandwich_norm", backend)
    return kernels.sandwich_norm_bwd(dout, y, weight, gate, rstd)


@sandwich_norm_bwd.register_fake
def _(dout, y, weight, gate, rstd, backend):
    return y.new_empty(y.shape), weight.new_empty(weight.shape), gate.new_empty(gate.shape)


def _setup_context(ctx, inputs, output):
    y, _, weight, gate, _, ctx.backend = inputs
    rstd = output[1]
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(y, weight, gate, rstd)


def _backward(ctx, dout, _):
    dy, dweight, dgate = sandwich_norm_bwd(dout, *ctx.saved_tensors, ctx.backend)
    return dy, dout, dweight, dgate, None, None


sandwich_norm_fwd.register_autograd(_backward, setup_context=_setup_context)
