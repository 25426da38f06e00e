"""Which implementation runs an op: decided here and nowhere else."""

import importlib
import importlib.util
import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Every name a call may give. "torch" is the definition, which every op has on every device.
BACKENDS = ("torch", "triton", "cuda", "cpu")

# Type of device that a backend's tensors must be on.
DEVICES = {"triton": "cuda", "cuda": "cuda", "cpu": "cpu"}

# What `backend=None` prefers; an op that measures otherwise gives `resolve` an order of its own.
BEST_FIRST = ("triton", "cuda", "cpu")

# Process-wide choice, read once; a call's own `backend=` still wins. An empty value is unset.
DEFAULT = os.environ.get("LUMINA_KERNELS_BACKEND") or None

# Backends that an emulator runs on the CPU, slowly, for tests: taken by name only. Triton brings an
# interpreter.
EMULATED = {"triton"} if os.environ.get("TRITON_INTERPRET") == "1" else set()

# Backend -> why this process does not have it.
MISSING: dict[str, str] = {}
if importlib.util.find_spec("triton") is None:
    MISSING["triton"] = 'triton is not installed (pip install "lumina-kernels[triton]")'

_BUILD = "run `pip install --force-reinstall --no-deps .` in the source tree with"
if importlib.util.find_spec("lumina_kernels._C") is None:
    MISSING["cpu"] = f"the C++ kernels are not built, {_BUILD} a C++ compiler"
    MISSING["cuda"] = f"the CUDA kernels are not built, {_BUILD} a C++ compiler and nvcc"
else:
    importlib.import_module("lumina_kernels._C")  # registers the ops of lumina_kernels_cpp
    if importlib.util.find_spec("lumina_kernels._C_cuda") is None:
        MISSING["cuda"] = f"the CUDA kernels are not built, {_BUILD} nvcc"
    elif torch.version.cuda is None:
        MISSING["cuda"] = "torch is built without CUDA"
    else:
        importlib.import_module("lumina_kernels._C_cuda")


def launchers(op: str, backend: str):
    """What has `<op>_fwd` and `<op>_bwd` of a kernel backend; imported on first use."""
    if backend == "triton":
        return importlib.import_module(f"lumina_kernels.triton.{op}")
    return torch.ops.lumina_kernels_cpp


def resolve(
    backend: str | None,
    implemented: tuple[str, ...],
    *tensors: Tensor | None,
    **constants: Tensor | float | None,
) -> str:
    """Return the name of the backend that runs an op, never another one than was asked for.

    Args:
        backend: the caller's choice; None takes `LUMINA_KERNELS_BACKEND`, else the first of
            `implemented` that is here and takes these tensors, else "torch".
        implemented: what the op has besides "torch", best first.
        tensors: what the op was given; the first says the device.
        constants: what its kernels do not differentiate, by name. Where one of them asks for a
            gradient, None takes "torch".

    Raises:
        ValueError: the name is unknown, the op has no such backend, or the device is not its own.
        TypeError: a tensor is float64, which only "torch" computes with.
        RuntimeError: the backend is missing in this process.
        NotImplementedError: a kernel was asked for, and a gradient of one of `constants` or a
            forward-mode derivative, which None takes "torch" for.
    """
    learned = _first_requiring_grad(constants)
    forward_mode = any_tangent((*tensors, *constants.values()))
    asked = f"backend {backend!r}"
    if backend is None and DEFAULT is None:
        for name in implemented:
            if name not in MISSING and DEVICES[name] == tensors[0].device.type:
                only_torch = _any_float64(tensors) or learned or forward_mode
                return "torch" if only_torch else name
        return "torch"
    if backend is None:
        backend, asked = DEFAULT, f"LUMINA_KERNELS_BACKEND={DEFAULT!r}"
    if backend not in BACKENDS:
        raise ValueError(f"{asked} is unknown, it must be one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return backend
    if backend not in implemented:
        have = ", ".join(("torch", *implemented))
        raise ValueError(f"{asked} is not implemented for this op, which has: {have}")
    if backend in MISSING:
        raise RuntimeError(f"{asked} is not available here: {MISSING[backend]}")
    device = tensors[0].device.type
    if device != DEVICES[backend] and not (device == "cpu" and backend in EMULATED):
        hint = " (or TRITON_INTERPRET=1, for tests)" if backend == "triton" else ""
        raise ValueError(f"{asked} needs tensors on {DEVICES[backend]}{hint}, got {device}")
    if _any_float64(tensors):
        raise TypeError(f"{asked} computes in float32 and takes no float64, use backend='torch'")
    if forward_mode:
        raise NotImplementedError(
            f"{asked} has no forward-mode derivative, use backend='torch' for it"
        )
    if learned:
        raise NotImplementedError(
            f"{asked} computes no gradient of {learned}, which requires one: detach it or use "
            "backend='torch'"
        )
    return backend


def _first_requiring_grad(constants) -> str | None:
    if torch.is_grad_enabled():
        for name, value in constants.items():
            if isinstance(value, Tensor) and value.requires_grad:
                return name
    return None


def any_tangent(values) -> bool:
    """Whether forward-mode AD follows a tensor among `values`."""
    if forward_ad._current_level < 0:
        return False
    tensors = (x for x in values if isinstance(x, Tensor))
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _any_float64(tensors) -> bool:
    return any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
