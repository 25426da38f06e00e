"""Gated residual and the next modulated norm: the Flux family's twin of `sandwich_norm_chain`."""

import torch
from torch import Tensor

from lumina_kernels.backend import launchers, resolve
from lumina_kernels.ops._checks import check_axes, check_float
from lumina_kernels.ops._gradients import fake_like, from_outputs, to_outputs
from lumina_kernels.ops.norm_modulate import check_modulation, norm_modulate_ref, per_token

BACKENDS = ("triton", "cuda", "cpu")


def gate_residual_norm(
    y: Tensor,
    residual: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "layer",
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return new = residual + gate * y, and
    normed = (norm(new) * weight + bias) * (1 + scale) + shift; None leaves its term out.

    The norm is that of `norm_modulate`. `normed` comes from the float32 row of `new` before that
    row is rounded. It is the adaLN block of DiT (arXiv 2212.09748) as Flux, SD3 and Wan have it.

    Args:
        y: output of the attention or feed-forward layer, (B, L, D).
        residual: input of that layer, (B, L, D).
        gate: adaLN gate, used as it is, one row per sample, (B, D), or per token, (B, L, D).
        weight, bias: affine parameters of the norm, (D,).
        scale, shift: modulation of the norm, (B, D) or (B, L, D); strided views are fine.
        eps: added to the mean square.
        kind: "rms" or "layer".
        backend: None takes the best one there is; see `lumina_kernels.backend`.

    Returns:
        (new, normed), each (B, L, D) in residual.dtype (y may have another). The arithmetic is
        float32 (float64 for float64), each output rounded once.

    Raises:
        ValueError: a shape or device does not fit y, or kind or backend is not one there is.
        TypeError: an argument is not a floating-point tensor.
    """
    check_axes("y", y, "B, L, D")
    B, L, D = y.shape
    check_float("residual", residual, y.device, (B, L, D))
    check_float("gate", gate, y.device, (B, D), (B, L, D))
    check_modulation(y, kind, weight=weight, bias=bias, scale=scale, shift=shift)
    tensors = (y, residual, gate, weight, bias, scale, shift)
    backend = resolve(backend, BACKENDS, *tensors)
    if backend == "torch":
        return gate_residual_norm_ref(*tensors, eps, kind)
    return gate_residual_norm_fwd(*tensors, eps, kind, backend)[:2]


def gate_residual_norm_ref(
    y, residual, gate, weight=None, bias=None, scale=None, shift=None, eps=1e-6, kind="layer"
):
    """The definition."""
    acc = torch.promote_types(torch.promote_types(y.dtype, residual.dtype), torch.float32)
    new = residual.to(acc) + per_token(gate).to(acc) * y.to(acc)
    normed = norm_modulate_ref(new, weight, bias, scale, shift, eps, kind)
    return new.to(residual.dtype), normed.to(residual.dtype)


# Registered at import, so that torch.compile knows shapes and gradients before any kernel exists.


@torch.library.custom_op("lumina_kernels::gate_residual_norm_fwd", mutates_args=())
def gate_residual_norm_fwd(
    y: Tensor,
    residual: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    kind: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """new, normed, and float32 statistics of new's rows: rstd and, of a LayerNorm, the mean."""
    kernels = launchers("gate_residual_norm", backend)
    return kernels.gate_residual_norm_fwd(y, residual, gate, weight, bias, scale, shift, eps, kind)


@gate_residual_norm_fwd.register_fake
def _(y, residual, gate, weight, bias, scale, shift, eps, kind, backend):
    outs = (residual.new_empty(y.shape) for _ in range(2))
    return *outs, y.new_empty((1 + (kind == "layer"), *y.shape[:2]), dtype=torch.float32)


@torch.library.custom_op("lumina_kernels::gate_residual_norm_bwd", mutates_args=())
def gate_residual_norm_bwd(
    dnew: Tensor,
    dnormed: Tensor,
    y: Tensor,
    residual: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: Tensor,
    backend: str,
) -> list[Tensor]:
    """The gradients of the seven tensors."""
    kernels = launchers("gate_residual_norm", backend)
    grads = kernels.gate_residual_norm_bwd(
        dnew, dnormed, y, residual, gate, weight, bias, scale, shift, statistics
    )
    return to_outputs(grads, y)


@gate_residual_norm_bwd.register_fake
def _(dnew, dnormed, y, residual, gate, weight, bias, scale, shift, statistics, backend):
    return fake_like(y, residual, gate, weight, bias, scale, shift)


def _setup_context(ctx, inputs, output):
    *tensors, _, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx, dnew, dnormed, _):
    *inputs, statistics = ctx.saved_tensors
    grads = gate_residual_norm_bwd(dnew, dnormed, *inputs, statistics, ctx.backend)
    return *from_outputs(grads, inputs), None, None, None


gate_residual_norm_fwd.register_autograd(_backward, setup_context=_setup_context)
