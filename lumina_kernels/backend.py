"""Which implementation runs an op: decided here and nowhere else."""

import os

import torch

# Every name a call may give. "torch" is the definition, which every op has on every device.
BACKENDS = ("torch", "triton", "cuda", "cpu")

# Process-wide choice, read once; a call's own `backend=` still wins. An empty value is unset.
DEFAULT = os.environ.get("LUMINA_KERNELS_BACKEND") or None


def resolve(backend: str | None, implemented: tuple[str, ...], device: torch.device) -> str:
    """Return the name of the backend that runs an op, never another one than was asked for.

    Args:
        backend: the caller's choice; None takes `LUMINA_KERNELS_BACKEND`, else the best there is,
            today "torch".
        implemented: what the op has besides "torch".
        device: where its tensors are.

    Raises:
        ValueError: the name is unknown, or the op has no such backend.
    """
    asked = f"backend {backend!r}"
    if backend is None:
        if DEFAULT is None:
            return "torch"
        backend, asked = DEFAULT, f"LUMINA_KERNELS_BACKEND={DEFAULT!r}"
    if backend not in BACKENDS:
        raise ValueError(f"{asked} is unknown, it must be one of {', '.join(BACKENDS)}")
    if backend not in ("torch", *implemented):
        have = ", ".join(("torch", *implemented))
        raise ValueError(f"{asked} is not there yet for this op on {device}, it has: {have}")
    return backend
