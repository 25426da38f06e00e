"""Which implementation runs an op: decided here and nowhere else."""

import importlib.util
import os

import torch
from torch import Tensor

# Every name a call may give. "torch" is the definition, which every op has on every device.
BACKENDS = ("torch", "triton", "cuda", "cpu")

# Type of device that a backend's tensors must be on.
DEVICES = {"triton": "cuda", "cuda": "cuda", "cpu": "cpu"}

# Process-wide choice, read once; a call's own `backend=` still wins. An empty value is unset.
DEFAULT = os.environ.get("LUMINA_KERNELS_BACKEND") or None

# Triton's interpreter runs the kernels on the CPU, slowly. It is never taken unasked.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Backend -> why this process does not have it.
MISSING: dict[str, str] = {}
if importlib.util.find_spec("triton") is None:
    MISSING["triton"] = 'triton is not installed (pip install "lumina-kernels[triton]")'


def resolve(backend: str | None, implemented: tuple[str, ...], *tensors: Tensor | None) -> str:
    """Return the name of the backend that runs an op, never another one than was asked for.

    Args:
        backend: the caller's choice; None takes `LUMINA_KERNELS_BACKEND`, else the first of
            `implemented` that is here and takes these tensors, else "torch".
        implemented: what the op has besides "torch", best first.
        tensors: what the op was given; the first says the device.

    Raises:
        ValueError: the name is unknown, the op has no such backend, or the device is not its own.
        TypeError: a tensor is float64, which only "torch" computes with.
        RuntimeError: the backend is missing in this process.
    """
    asked = f"backend {backend!r}"
    if backend is None and DEFAULT is None:
        for name in implemented:
            if name not in MISSING and DEVICES[name] == tensors[0].device.type:
                return "torch" if _any_float64(tensors) else name
        return "torch"
    if backend is None:
        backend, asked = DEFAULT, f"LUMINA_KERNELS_BACKEND={DEFAULT!r}"
    if backend not in BACKENDS:
        raise ValueError(f"{asked} is unknown, it must be one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return backend
    if backend not in implemented:
        have = ", ".join(("torch", *implemented))
        raise ValueError(f"{asked} is not there for this op, it has: {have}")
    if backend in MISSING:
        raise RuntimeError(f"{asked} is not available here: {MISSING[backend]}")
    device = tensors[0].device.type
    if device != DEVICES[backend] and not (backend == "triton" and INTERPRETED):
        hint = " (or TRITON_INTERPRET=1, for tests)" if backend == "triton" else ""
        raise ValueError(f"{asked} needs tensors on {DEVICES[backend]}{hint}, got {device}")
    if _any_float64(tensors):
        raise TypeError(f"{asked} computes in float32 and takes no float64, use backend='torch'")
    return backend


def _any_float64(tensors) -> bool:
    return any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
