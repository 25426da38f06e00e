"""Modulated normalisation, the head of every sub-layer of a diffusion transformer."""

import torch
from torch import Tensor

from lumina_kernels.axes import Modulation, Rows, Statistics, Vector
from lumina_kernels.backend import BEST_FIRST, resolve
from lumina_kernels.checks import check_axes, check_float, check_optional
from lumina_kernels.kernel_op import kernel_op, like

KINDS = ("rms", "layer")


def norm_modulate(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    scale: Tensor | None = None, shift: Tensor | None = None, eps: float = 1e-5, kind: str = "rms",
    *, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Return (norm(x) * weight + bias) * (1 + scale) + shift; None leaves its term out.

    norm(x) = x * rsqrt(mean(x²) + eps) for "rms"; "layer" subtracts the row's mean from x first.
    With weight and scale it is the pre-norm of Lumina-Next (arXiv 2406.18583), with scale and shift
    the adaLN of DiT (arXiv 2212.09748).

    Args:
        x: rows to normalise, (B, L, D).
        weight, bias: affine parameters of the norm, (D,).
        scale, shift: modulation, one row per sample, (B, D) or (B, 1, D), or per token,
            (B, L, D). Strided views, as from `chunk`, are fine.
        eps: added to the mean square.
        kind: "rms" or "layer".
        backend: None takes the best one available; see `lumina_kernels.backend`.

    Returns:
        (B, L, D) in x.dtype. The arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        ValueError, TypeError: a shape, device, dtype or kind is not as above.
    """
    check_axes("x", x, "B, L, D")
    check_norm(x, kind, weight=weight, bias=bias)
    scale, shift = modulations(x, scale=scale, shift=shift)
    backend = resolve(backend, BEST_FIRST, x, weight, bias, scale, shift, op="norm_modulate")
    if backend == "torch":
        return norm_modulate_ref(x, weight, bias, scale, shift, eps, kind)
    return norm_modulate_fwd(x, weight, bias, scale, shift, eps, kind, backend)[0]


def norm_modulate_ref(x, weight=None, bias=None, scale=None, shift=None, eps=1e-5, kind="rms"):
    """The definition."""
    acc = torch.promote_types(x.dtype, torch.float32)
    y = x.to(acc)
    if kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    if scale is not None:
        y = y * (1 + per_token(scale).to(acc))
    if shift is not None:
        y = y + per_token(shift).to(acc)
    return y.to(x.dtype)


def per_token(vector: Tensor) -> Tensor:
    """Rows per sample (B, D) as (B, 1, D), which broadcasts over tokens; (B, L, D) as it is."""
    return vector.unsqueeze(1) if vector.ndim == 2 else vector


def modulations(x: Tensor, **tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Scales, shifts or gates of the rows of x, (B, L, D), as the kernels take them: None, (B, D)
    or (B, L, D). One row per sample may also come as (B, 1, D).

    Raises:
        ValueError, TypeError: one has another shape, device or dtype.
    """
    (B, L, D), device = x.shape, x.device
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_float(name, tensor, device, (B, D), (B, L, D), (B, 1, D))
        if tensor.ndim == 3 and tensor.shape[1] != L:
            tensors[name] = tensor.squeeze(1)
    return tuple(tensors.values())


def check_norm(x: Tensor, kind: str, *, weight: Tensor | None, bias: Tensor | None) -> None:
    """The arguments of a norm over rows shaped as x, (B, L, D)."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    shape, device = x.shape[-1:], x.device
    check_optional("weight", weight, device, shape)
    check_optional("bias", bias, device, shape)


@kernel_op("out statistics", over="B L")
def norm_modulate_fwd(
    x: Rows, weight: Vector | None, bias: Vector | None, scale: Modulation | None,
    shift: Modulation | None, eps: float, kind: str,
) -> tuple[Rows, Statistics]:  # fmt: skip
    statistics = x.new_empty((1 + (kind == "layer"), *x.shape[:2]), dtype=torch.float32)
    return x.new_empty(x.shape), statistics


@norm_modulate_fwd.backward("dx dweight dbias dscale dshift")
def norm_modulate_bwd(dout, x, weight, bias, scale, shift, statistics):
    return like(x, weight, bias, scale, shift)
