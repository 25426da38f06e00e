"""Gated residual and the next modulated norm: the Flux family's twin of `sandwich_norm_chain`."""

import torch
from torch import Tensor

from lumina_kernels.axes import Modulation, Rows, Statistics, Vector
from lumina_kernels.backend import BEST_FIRST, resolve
from lumina_kernels.checks import check_axes, check_float
from lumina_kernels.kernel_op import kernel_op, like
from lumina_kernels.ops.norm_modulate import check_norm, modulations, norm_modulate_ref, per_token


def gate_residual_norm(
    y: Tensor, residual: Tensor, gate: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-6, kind: str = "layer", *, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return new_residual = residual + gate * y, and
    normed = (norm(new_residual) * weight + bias) * (1 + scale) + shift; None leaves its factor or
    term out.

    The norm is that of `norm_modulate`. `normed` is computed from the float32 row of `new_residual`
    before that row is rounded. The adaLN block of DiT (arXiv 2212.09748) as in Flux, SD3 and Wan;
    without a gate the pre-norm block of every transformer.

    Args:
        y: output of the attention or feed-forward layer, (B, L, D).
        residual: input of that layer, (B, L, D).
        gate: adaLN gate, used as it is, one row per sample, (B, D) or (B, 1, D), or per token,
            (B, L, D), or None.
        weight, bias: affine parameters of the norm, (D,).
        scale, shift: modulation of the norm, shaped as a gate; strided views are fine.
        eps: added to the mean square.
        kind: "rms" or "layer".
        backend: None takes the best one available; see `lumina_kernels.backend`.

    Returns:
        (new_residual, normed), each (B, L, D) in residual.dtype (y may have another). The
        arithmetic is float32 (float64 for float64), each output rounded once.

    Raises:
        ValueError, TypeError: a shape, device, dtype or kind is not as above.
    """
    check_axes("y", y, "B, L, D")
    check_float("residual", residual, y.device, y.shape)
    check_norm(y, kind, weight=weight, bias=bias)
    gate, scale, shift = modulations(y, gate=gate, scale=scale, shift=shift)
    tensors = (y, residual, gate, weight, bias, scale, shift)
    backend = resolve(backend, BEST_FIRST, *tensors, op="gate_residual_norm")
    if backend == "torch":
        return gate_residual_norm_ref(*tensors, eps, kind)
    return gate_residual_norm_fwd(*tensors, eps, kind, backend)[:2]


def gate_residual_norm_ref(
    y, residual, gate=None, weight=None, bias=None, scale=None, shift=None, eps=1e-6, kind="layer"
):
    """The definition."""
    acc = torch.promote_types(torch.promote_types(y.dtype, residual.dtype), torch.float32)
    branch = y.to(acc) if gate is None else per_token(gate).to(acc) * y.to(acc)
    new_residual = residual.to(acc) + branch
    normed = norm_modulate_ref(new_residual, weight, bias, scale, shift, eps, kind)
    return new_residual.to(residual.dtype), normed.to(residual.dtype)


@kernel_op("new_residual normed statistics", over="B L")
def gate_residual_norm_fwd(
    y: Rows, residual: Rows, gate: Modulation | None, weight: Vector | None, bias: Vector | None,
    scale: Modulation | None, shift: Modulation | None, eps: float, kind: str,
) -> tuple[Rows, Rows, Statistics]:  # fmt: skip
    statistics = y.new_empty((1 + (kind == "layer"), *y.shape[:2]), dtype=torch.float32)
    return *like(residual, residual), statistics


@gate_residual_norm_fwd.backward("dy dresidual dgate dweight dbias dscale dshift")
def gate_residual_norm_bwd(
    dnew_residual, dnormed, y, residual, gate, weight, bias, scale, shift, statistics
):
    return like(y, residual, gate, weight, bias, scale, shift)
