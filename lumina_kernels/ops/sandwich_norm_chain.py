"""The tail of one Next-DiT sub-layer and the head of the next, from the same row."""

import torch
from torch import Tensor

from lumina_kernels.axes import Modulation, Rows, RowStatistic, Vector
from lumina_kernels.backend import BEST_FIRST, resolve
from lumina_kernels.checks import check_optional
from lumina_kernels.kernel_op import kernel_op, like
from lumina_kernels.ops.norm_modulate import modulations, norm_modulate_ref
from lumina_kernels.ops.sandwich_norm import check_sandwich, sandwich_norm_ref


def sandwich_norm_chain(
    y: Tensor, residual: Tensor, weight: Tensor | None, gate: Tensor | None,
    next_weight: Tensor | None, next_scale: Tensor | None, eps: float = 1e-5, tanh: bool = True,
    *, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return new_residual = residual + tanh(gate) * rms_norm(y) * weight, and the next sub-layer's
    input normed = rms_norm(new_residual) * next_weight * (1 + next_scale); None omits its factor.

    `normed` is computed from the float32 row of `new_residual` before that row is rounded, so in 16
    bits it is closer to the exact value than `norm_modulate(new_residual, ...)`. Both are formulas
    of Lumina-Next's block (arXiv 2406.18583).

    Args:
        y: output of the attention or feed-forward layer, (B, L, D).
        residual: input of that layer, (B, L, D).
        weight: scale of the post-norm, (D,), or None.
        gate: adaLN gate before the tanh, one row per sample, (B, D) or (B, 1, D), or per token,
            (B, L, D), or None; strided views are fine.
        next_weight: scale of the next pre-norm, (D,), or None.
        next_scale: adaLN scale of the next sub-layer, shaped as a gate, or None.
        eps: added to both mean squares.
        tanh: False takes the gate as it is, without the tanh.
        backend: None takes the best one available; see `lumina_kernels.backend`.

    Returns:
        (new_residual, normed), each (B, L, D) in residual.dtype (y may have another). The
        arithmetic is float32 (float64 for float64), each output rounded once.

    Raises:
        ValueError, TypeError: a shape, device or dtype is not as above.
    """
    check_sandwich(y, residual, weight)
    check_optional("next_weight", next_weight, y.device, y.shape[-1:])
    gate, next_scale = modulations(y, gate=gate, next_scale=next_scale)
    tensors = (y, residual, weight, gate, next_weight, next_scale)
    backend = resolve(backend, BEST_FIRST, *tensors, op="sandwich_norm_chain")
    if backend == "torch":
        return sandwich_norm_chain_ref(*tensors, eps, tanh)
    return sandwich_norm_chain_fwd(*tensors, eps, tanh, backend)[:2]


def sandwich_norm_chain_ref(
    y, residual, weight, gate, next_weight, next_scale, eps=1e-5, tanh=True
):
    """The definition."""
    acc = torch.promote_types(torch.promote_types(y.dtype, residual.dtype), torch.float32)
    new_residual = sandwich_norm_ref(y.to(acc), residual.to(acc), weight, gate, eps, tanh)
    normed = norm_modulate_ref(new_residual, next_weight, scale=next_scale, eps=eps)
    return new_residual.to(residual.dtype), normed.to(residual.dtype)


@kernel_op("new_residual normed rstd next_rstd", over="B L")
def sandwich_norm_chain_fwd(
    y: Rows, residual: Rows, weight: Vector | None, gate: Modulation | None,
    next_weight: Vector | None, next_scale: Modulation | None, eps: float, tanh: bool,
) -> tuple[Rows, Rows, RowStatistic, RowStatistic]:  # fmt: skip
    rstd, next_rstd = (y.new_empty(y.shape[:2], dtype=torch.float32) for _ in range(2))
    return *like(residual, residual), rstd, next_rstd


@sandwich_norm_chain_fwd.backward("dy dresidual dweight dgate dnext_weight dnext_scale")
def sandwich_norm_chain_bwd(
    dnew_residual, dnormed, y, residual, weight, gate, next_weight, next_scale, tanh, rstd,
    next_rstd,
):  # fmt: skip
    return like(y, residual, weight, gate, next_weight, next_scale)
