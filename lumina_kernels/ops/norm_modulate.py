"""Modulated normalisation, the head of every sub-layer of a diffusion transformer."""

import torch
from torch import Tensor

from lumina_kernels.backend import launchers, resolve
from lumina_kernels.ops._checks import check_axes, check_float
from lumina_kernels.ops._gradients import fake_like, from_outputs, to_outputs

BACKENDS = ("triton", "cuda", "cpu")
KINDS = ("rms", "layer")


def norm_modulate(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    kind: str = "rms",
    *,
    backend: str | None = None,
) -> Tensor:
    """Return (norm(x) * weight + bias) * (1 + scale) + shift; None leaves its term out.

    norm(x) = x * rsqrt(mean(x²) + eps) for "rms"; "layer" takes the row's mean off x first. With
    weight and scale it is the pre-norm of Lumina-Next (arXiv 2406.18583), with scale and shift the
    adaLN of DiT (arXiv 2212.09748).

    Args:
        x: rows to normalise, (B, L, D).
        weight, bias: affine parameters of the norm, (D,).
        scale, shift: modulation, one row per sample, (B, D), or per token, (B, L, D). Strided
            views, as `chunk` gives them, are fine.
        eps: added to the mean square.
        kind: "rms" or "layer".
        backend: None takes the best one there is; see `lumina_kernels.backend`.

    Returns:
        (B, L, D) in x.dtype. The arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        ValueError: a shape or device does not fit x, or kind or backend is not one there is.
        TypeError: an argument is not a floating-point tensor.
    """
    check_axes("x", x, "B, L, D")
    check_modulation(x, kind, weight=weight, bias=bias, scale=scale, shift=shift)
    backend = resolve(backend, BACKENDS, x, weight, bias, scale, shift)
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


def check_modulation(x: Tensor, kind: str, *, weight, bias, scale, shift) -> None:
    """The arguments of a modulated norm over rows shaped as x, (B, L, D)."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    B, L, D = x.shape
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_float(name, tensor, x.device, (D,))
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is not None:
            check_float(name, tensor, x.device, (B, D), (B, L, D))


# Registered at import, so that torch.compile knows shapes and gradients before any kernel exists.


@torch.library.custom_op("lumina_kernels::norm_modulate_fwd", mutates_args=())
def norm_modulate_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    kind: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output, and float32 statistics of the rows: rstd and, of a LayerNorm, the mean."""
    kernels = launchers("norm_modulate", backend)
    return kernels.norm_modulate_fwd(x, weight, bias, scale, shift, eps, kind)


@norm_modulate_fwd.register_fake
def _(x, weight, bias, scale, shift, eps, kind, backend):
    statistics = (1 + (kind == "layer"), *x.shape[:2])
    return x.new_empty(x.shape), x.new_empty(statistics, dtype=torch.float32)


@torch.library.custom_op("lumina_kernels::norm_modulate_bwd", mutates_args=())
def norm_modulate_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: Tensor,
    backend: str,
) -> list[Tensor]:
    """The gradients of x and of the four parameters."""
    kernels = launchers("norm_modulate", backend)
    grads = kernels.norm_modulate_bwd(dout, x, weight, bias, scale, shift, statistics)
    return to_outputs(grads, x)


@norm_modulate_bwd.register_fake
def _(dout, x, weight, bias, scale, shift, statistics, backend):
    return fake_like(x, weight, bias, scale, shift)


def _setup_context(ctx, inputs, output):
    *tensors, _, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, dout, _):
    *inputs, statistics = ctx.saved_tensors
    grads = norm_modulate_bwd(dout, *inputs, statistics, ctx.backend)
    return *from_outputs(grads, inputs), None, None, None


norm_modulate_fwd.register_autograd(_backward, setup_context=_setup_context)
