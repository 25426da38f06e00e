"""Classifier-free guidance and the update of the ODE, in one pass."""

import torch
from torch import Tensor

from lumina_kernels.backend import BEST_FIRST, resolve
from lumina_kernels.checks import check_float, check_floating
from lumina_kernels.kernel_op import kernel_op


def guided_step(
    x: Tensor, v: Tensor, weight: float | Tensor, dt: float | Tensor, channels: int | None = None,
    *, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Return x + dt * u, with u = v_uncond + weight * (v_cond - v_uncond).

    Classifier-free guidance (arXiv 2207.12598, whose w is weight - 1) and one Euler step of
    dx/dt = u. weight = 1 is no guidance.

    Args:
        x: state, (B, C, ...).
        v: velocities of the batch run twice, conditional first, (2B, C, ...).
        weight: guidance weight, a float or a 0-d tensor.
        dt: step in time, a float or a 0-d tensor; negative integrates backwards.
        channels: guide the first `channels` channels only and take the others from v_cond: 3 is
            what the released Lumina-Next does to its 4 latent channels. None guides all.
        backend: None takes the best one available; see `lumina_kernels.backend`.

    Returns:
        shaped as x, in x.dtype (v may have another). The arithmetic is float32 (float64 where x or
        v is), rounded once.

    Raises:
        ValueError, TypeError: a shape, device or dtype is not as above, or channels is not within
            0..C.
        NotImplementedError: a tensor requires a gradient and `backend` names a kernel, which has
            none; None takes the definition then.
    """
    check_floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must have shape (B, C, ...), got {tuple(x.shape)}")
    check_float("v", v, x.device, (2 * x.shape[0], *x.shape[1:]))
    for name, number in (("weight", weight), ("dt", dt)):
        if isinstance(number, Tensor) and number.ndim != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got {tuple(number.shape)}")
    if channels is not None and not 0 <= channels <= x.shape[1]:
        raise ValueError(f"channels must be within 0..{x.shape[1]}, got {channels}")
    backend = resolve(backend, BEST_FIRST, x, v, x=x, v=v, weight=weight, dt=dt, op="guided_step")
    if backend == "torch":
        return guided_step_ref(x, v, weight, dt, channels)
    numbers = (*_tensor_and_value(weight, x.device), *_tensor_and_value(dt, x.device))
    channels = x.shape[1] if channels is None else channels
    return guided_step_fwd(x, v, *numbers, channels, backend)


def guided_step_ref(x, v, weight, dt, channels=None):
    """The definition."""
    acc = torch.promote_types(torch.promote_types(x.dtype, v.dtype), torch.float32)
    cond, uncond = v[: x.shape[0]].to(acc), v[x.shape[0] :].to(acc)
    u = uncond + weight * (cond - uncond)
    if channels is not None:
        u = torch.cat((u[:, :channels], cond[:, channels:]), 1)
    return (x.to(acc) + dt * u).to(x.dtype)


def _tensor_and_value(number: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """A tensor on the device stays there, so that the host does not wait for its value. A graph has
    no value of a tensor on the CPU: it is copied."""
    if isinstance(number, Tensor) and (number.device == device or torch.compiler.is_compiling()):
        return number.to(device), 0.0
    return None, float(number)


@kernel_op("out")
def guided_step_fwd(
    x: Tensor, v: Tensor, weight: Tensor | None, weight_value: float, dt: Tensor | None,
    dt_value: float, channels: int,
) -> Tensor:  # fmt: skip
    """A value counts where its tensor is None."""
    return x.new_empty(x.shape)
