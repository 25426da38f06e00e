"""The tail of one Next-DiT sub-layer and the head of the next, from the same row."""

import torch
from torch import Tensor

from lumina_kernels.backend import launchers, resolve
from lumina_kernels.ops._checks import check_float
from lumina_kernels.ops._gradients import fake_like, from_outputs, to_outputs
from lumina_kernels.ops.norm_modulate import norm_modulate_ref
from lumina_kernels.ops.sandwich_norm import check_sandwich, sandwich_norm_ref

BACKENDS = ("triton", "cuda", "cpu")


def sandwich_norm_chain(
    y: Tensor,
    residual: Tensor,
    weight: Tensor,
    gate: Tensor,
    next_weight: Tensor | None,
    next_scale: Tensor | None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return new = residual + tanh(gate) * rms_norm(y) * weight, and the next sub-layer's input
    normed = rms_norm(new) * next_weight * (1 + next_scale); None leaves its factor out.

    `normed` comes from the float32 row of `new` before that row is rounded, so in 16 bits it is
    nearer to the exact value than `norm_modulate(new, ...)`. Both are formulas of Lumina-Next's
    block (arXiv 2406.18583).

    Args:
        y: output of the attention or feed-forward layer, (B, L, D).
        residual: input of that layer, (B, L, D).
        weight: scale of the post-norm, (D,).
        gate: adaLN gate before the tanh, (B, D) or (B, L, D); strided views are fine.
        next_weight: scale of the next pre-norm, (D,), or None.
        next_scale: adaLN scale of the next sub-layer, (B, D) or (B, L, D), or None.
        eps: added to both mean squares.
        backend: None takes the best one there is; see `lumina_kernels.backend`.

    Returns:
        (new, normed), each (B, L, D) in residual.dtype (y may have another). The arithmetic is
        float32 (float64 for float64), each output rounded once.

    Raises:
        ValueError: a shape or device does not fit y, or there is no such backend.
        TypeError: an argument is not a floating-point tensor.
    """
    check_sandwich(y, residual, weight, gate)
    B, L, D = y.shape
    if next_weight is not None:
        check_float("next_weight", next_weight, y.device, (D,))
    if next_scale is not None:
        check_float("next_scale", next_scale, y.device, (B, D), (B, L, D))
    tensors = (y, residual, weight, gate, next_weight, next_scale)
    backend = resolve(backend, BACKENDS, *tensors)
    if backend == "torch":
        return sandwich_norm_chain_ref(*tensors, eps)
    return sandwich_norm_chain_fwd(*tensors, eps, backend)[:2]


def sandwich_norm_chain_ref(y, residual, weight, gate, next_weight, next_scale, eps=1e-5):
    """The definition."""
    acc = torch.promote_types(torch.promote_types(y.dtype, residual.dtype), torch.float32)
    new = sandwich_norm_ref(y.to(acc), residual.to(acc), weight, gate, eps)
    normed = norm_modulate_ref(new, next_weight, scale=next_scale, eps=eps)
    return new.to(residual.dtype), normed.to(residual.dtype)


# Registered at import, so that torch.compile knows shapes and gradients before any kernel exists.


@torch.library.custom_op("lumina_kernels::sandwich_norm_chain_fwd", mutates_args=())
def sandwich_norm_chain_fwd(
    y: Tensor,
    residual: Tensor,
    weight: Tensor,
    gate: Tensor,
    next_weight: Tensor | None,
    next_scale: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """new and normed, and rstd of either norm, (B, L) float32, which the gradients need."""
    kernels = launchers("sandwich_norm_chain", backend)
    return kernels.sandwich_norm_chain_fwd(y, residual, weight, gate, next_weight, next_scale, eps)


@sandwich_norm_chain_fwd.register_fake
def _(y, residual, weight, gate, next_weight, next_scale, eps, backend):
    outs = (residual.new_empty(y.shape) for _ in range(2))
    return *outs, *(y.new_empty(y.shape[:2], dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("lumina_kernels::sandwich_norm_chain_bwd", mutates_args=())
def sandwich_norm_chain_bwd(
    dnew: Tensor,
    dnormed: Tensor,
    y: Tensor,
    residual: Tensor,
    weight: Tensor,
    gate: Tensor,
    next_weight: Tensor | None,
    next_scale: Tensor | None,
    rstd: Tensor,
    next_rstd: Tensor,
    backend: str,
) -> list[Tensor]:
    """The gradients of all six tensors."""
    kernels = launchers("sandwich_norm_chain", backend)
    grads = kernels.sandwich_norm_chain_bwd(
        dnew, dnormed, y, residual, weight, gate, next_weight, next_scale, rstd, next_rstd
    )
    return to_outputs(grads, y)


@sandwich_norm_chain_bwd.register_fake
def _(dnew, dnormed, y, residual, weight, gate, next_weight, next_scale, rstd, next_rstd, backend):
    return fake_like(y, residual, weight, gate, next_weight, next_scale)


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(ctx, dnew, dnormed, *_):
    grads = sandwich_norm_chain_bwd(dnew, dnormed, *ctx.saved_tensors, ctx.backend)
    return *from_outputs(grads, ctx.saved_tensors[:6]), None, None


sandwich_norm_chain_fwd.register_autograd(_backward, setup_context=_setup_context)
