"""Gated residual sandwich norm, the tail of every Next-DiT sub-layer."""

import torch
from torch import Tensor

from lumina_kernels.axes import Modulation, Rows, RowStatistic, Vector
from lumina_kernels.backend import BEST_FIRST, resolve
from lumina_kernels.checks import check_axes, check_float, check_optional
from lumina_kernels.kernel_op import kernel_op, like
from lumina_kernels.ops.norm_modulate import modulations, norm_modulate_ref, per_token


def sandwich_norm(
    y: Tensor, residual: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float = 1e-5,
    tanh: bool = True, *, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Return residual + tanh(gate) * rms_norm(y) * weight; None leaves its factor out.

    rms_norm(y) = y * rsqrt(mean(y²) + eps). The block tail of Lumina-Next (arXiv 2406.18583).

    Args:
        y: output of the attention or feed-forward layer, (B, L, D).
        residual: input of that layer, (B, L, D).
        weight: RMSNorm scale, (D,), or None.
        gate: adaLN gate before the tanh, one row per sample, (B, D) or (B, 1, D), or per token,
            (B, L, D), or None. Strided views, as from `chunk`, are fine.
        eps: added to the mean square.
        tanh: False takes the gate as it is, without the tanh.
        backend: None takes the best one available; see `lumina_kernels.backend`.

    Returns:
        (B, L, D) in residual.dtype (y may have another). The arithmetic is float32 (float64 for
        float64), rounded once.

    Raises:
        ValueError, TypeError: a shape, device or dtype is not as above.
    """
    check_sandwich(y, residual, weight)
    (gate,) = modulations(y, gate=gate)
    backend = resolve(backend, BEST_FIRST, y, residual, weight, gate, op="sandwich_norm")
    if backend == "torch":
        return sandwich_norm_ref(y, residual, weight, gate, eps, tanh)
    return sandwich_norm_fwd(y, residual, weight, gate, eps, tanh, backend)[0]


def sandwich_norm_ref(y, residual, weight, gate, eps=1e-5, tanh=True):
    """The definition."""
    acc = torch.promote_types(torch.promote_types(y.dtype, residual.dtype), torch.float32)
    normed = norm_modulate_ref(y.to(acc), weight, eps=eps)
    if gate is not None:
        gate = per_token(gate).to(acc)
        normed = (torch.tanh(gate) if tanh else gate) * normed
    return (residual.to(acc) + normed).to(residual.dtype)


def check_sandwich(y: Tensor, residual: Tensor, weight: Tensor | None) -> None:
    """The arguments of a sandwich norm over rows shaped as y, (B, L, D), without the gate."""
    check_axes("y", y, "B, L, D")
    shape, device = y.shape, y.device
    check_float("residual", residual, device, shape)
    check_optional("weight", weight, device, shape[2:])


@kernel_op("out rstd", over="B L")
def sandwich_norm_fwd(
    y: Rows, residual: Rows, weight: Vector | None, gate: Modulation | None, eps: float, tanh: bool
) -> tuple[Rows, RowStatistic]:
    return residual.new_empty(y.shape), y.new_empty(y.shape[:2], dtype=torch.float32)


@sandwich_norm_fwd.backward("dy dweight dgate", residual="dout")
def sandwich_norm_bwd(dout, y, weight, gate, tanh, rstd):
    return like(y, weight, gate)
