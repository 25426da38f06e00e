"""Which implementation runs an op: decided here and nowhere else."""

import ctypes
import functools
import importlib
import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lumina_kernels import measured
from lumina_kernels.when_imported import when_imported

# Every name a call may give. "torch" is the definition, which every op has on every device.
BACKENDS = ("torch", "triton", "cuda", "cpu")

# Type of device that a backend's tensors must be on.
DEVICES = {"triton": "cuda", "cuda": "cuda", "cpu": "cpu"}

# What `backend=None` prefers; an op that measures otherwise gives `resolve` an order of its own.
BEST_FIRST = ("triton", "cuda", "cpu")

# On a GPU smaller tensors wait for the host, which a call of "cuda" keeps busy for half as long as
# one of "triton" (an H200's: 40 to 145 us, 76 to 284 us), so "cuda" comes first for them. That is
# the rule where it was not measured for an op and a GPU, see `lumina_kernels.measured`.
LARGE = 2**23  # values: 4096 tokens of a width of 2048

# Process-wide choice, read once; a call's own `backend=` still wins. An empty value is unset.
DEFAULT = os.environ.get("LUMINA_KERNELS_BACKEND") or None

# Backends that an emulator runs on the CPU, slowly, for tests: taken by name only. Triton brings an
# interpreter.
EMULATED = {"triton"} if os.environ.get("TRITON_INTERPRET") == "1" else set()

# Backend -> the oldest GPU that it has kernels for, by compute capability.
OLDEST_GPU = {"triton": (8, 0), "cuda": (8, 0)}

# Jetson boards, which take no image of another GPU, even of the same major version.
JETSON = ((8, 7), (10, 1))


def _hidden_copy(package: Path) -> Path | None:
    """An installed package with compiled kernels that `package`, a source tree, comes before."""
    for entry in sys.path:
        other = (Path(entry) / package.name).resolve()
        if other != package and any(other.glob("_C.*so")):
            return other
    return None


def _missing() -> dict[str, str]:
    """Backend -> why this process does not have it. Loads the native kernels that are there."""
    missing = {}
    if importlib.util.find_spec("triton") is None:
        missing["triton"] = "triton is not installed (pip install triton)"
    build = "run `pip install --force-reinstall --no-deps .` in the source tree with"
    if importlib.util.find_spec("lumina_kernels._C") is None:
        package = Path(__file__).resolve().parent
        if hidden := _hidden_copy(package):
            reason = (
                f"{package} has no compiled kernels and hides {hidden}, which has: "
                "run Python in another folder, or `pip install -e .` in this one"
            )
            warnings.warn(reason, stacklevel=2)
            return missing | {"cpu": reason, "cuda": reason}
        missing["cpu"] = f"the C++ kernels are not built, {build} a C++ compiler"
        missing["cuda"] = f"the CUDA kernels are not built, {build} a C++ compiler and nvcc"
        return missing
    importlib.import_module("lumina_kernels._C")  # registers the ops of lumina_kernels_cpp
    if torch.version.cuda is None:
        missing["cuda"] = "torch is built without CUDA"
    elif importlib.util.find_spec("lumina_kernels._C_cuda") is None:
        major = torch.version.cuda.split(".")[0]
        missing["cuda"] = f"the CUDA kernels are not built, {build} an nvcc of CUDA {major}"
    else:
        importlib.import_module("lumina_kernels._C_cuda")
    return missing


# Backend -> why this process does not have it.
MISSING = _missing()


def cuda_archs() -> tuple[str, ...]:
    """What lumina_kernels._C_cuda was built for, as in TORCH_CUDA_ARCH_LIST."""
    library = ctypes.CDLL(importlib.util.find_spec("lumina_kernels._C_cuda").origin)
    first = ctypes.c_char.in_dll(library, "lumina_cuda_archs")
    return tuple(ctypes.string_at(ctypes.addressof(first)).decode().split())


def _runs(arch: str, gpu: tuple[int, int]) -> bool:
    """Whether a GPU runs what was compiled for an entry of TORCH_CUDA_ARCH_LIST."""
    number = arch.removesuffix("+PTX")
    own = tuple(int(digits) for digits in number.rstrip("af").split("."))
    if own == gpu:
        return True
    if number.endswith("a"):
        return False
    image = own[0] == gpu[0] and own < gpu and gpu not in JETSON
    return image or (arch.endswith("+PTX") and own < gpu)


def unfit(backend: str, device: torch.device) -> str | None:
    """Why a GPU does not run a backend's kernels, or None."""
    return _unfit(backend, device)


# Else dynamo looks through the cache and into CUDA. The mark itself imports dynamo, for seconds.
when_imported("torch._dynamo", lambda: torch.compiler.assume_constant_result(unfit))


@functools.cache
def _unfit(backend: str, device: torch.device) -> str | None:
    nvidia = device.type == "cuda" and torch.version.cuda and torch.cuda.is_available()
    if not nvidia or backend not in OLDEST_GPU:
        return None
    gpu = torch.cuda.get_device_capability(device)
    here = f"this GPU has compute capability {gpu[0]}.{gpu[1]}"
    if gpu < OLDEST_GPU[backend]:
        return "its kernels need {}.{}, {}".format(*OLDEST_GPU[backend], here)
    if backend == "cuda" and not any(_runs(arch, gpu) for arch in cuda_archs()):
        built = ", ".join(cuda_archs())
        return f"built for {built}, {here}: build with TORCH_CUDA_ARCH_LIST={gpu[0]}.{gpu[1]}"
    return None


@functools.cache
def launchers(op: str, backend: str):
    """What has `<op>_fwd` and `<op>_bwd` of a kernel backend; imported on first use."""
    if backend == "triton":
        return importlib.import_module(f"lumina_kernels.triton.{op}")
    return _Native()


class _Native:
    """The ops of C++ and CUDA by name, without the search for an overload that a packet does."""

    def __getattr__(self, name: str):
        op = getattr(torch.ops.lumina_kernels_cpp, name).default
        setattr(self, name, op)
        return op


def resolve(
    backend: str | None,
    implemented: tuple[str, ...],
    *tensors: Tensor | None,
    op: str = "",
    refused: Mapping[str, str] = MappingProxyType({}),
    **constants: Tensor | float | None,
) -> str:
    """Return the name of the backend that runs an op, never another one than was asked for.

    Args:
        backend: the caller's choice; None takes `LUMINA_KERNELS_BACKEND`, else the first of
            `implemented` that is here and takes these tensors, "cuda" before others if the first
            tensor has fewer values than `triton_from` says, else "torch".
        implemented: what the op has besides "torch", best first.
        tensors: what the op was given; the first says the device.
        op: its name.
        refused: why a backend does not take this call, by name: None looks further.
        constants: what its kernels do not differentiate, by name. Where one of them asks for a
            gradient, None takes "torch".

    Raises:
        ValueError: the name is unknown, the op has no such backend, or the device is not its own.
        TypeError: a tensor is float64, which only "torch" computes with.
        RuntimeError: the backend is missing in this process, or has no kernels for this GPU.
        NotImplementedError: the backend that was asked for refuses this call, or would have to
            compute a gradient of one of `constants` or a forward-mode derivative. None takes
            another backend, for derivatives "torch".
    """
    device = tensors[0].device
    kind, learned = device.type, None
    if constants and torch.is_grad_enabled():
        for name, value in constants.items():
            if isinstance(value, Tensor) and value.requires_grad:
                learned = name
                break
    forward_mode = in_forward_mode() and any_tangent((*tensors, *constants.values()))
    if backend is not None or DEFAULT is not None:
        # A call where all is well, before what its errors are made of.
        name = DEFAULT if backend is None else backend
        if (
            name in implemented
            and DEVICES[name] == kind
            and name not in MISSING
            and name not in refused
            and not (learned or forward_mode or _any_float64(tensors))
            and (kind == "cpu" or not unfit(name, device))
        ):
            return name
    else:
        for name in implemented if kind != "cuda" else _best_first(implemented, tensors[0], op):
            here = DEVICES[name] == kind and name not in MISSING and name not in refused
            if here and (kind == "cpu" or not unfit(name, device)):
                only_torch = learned or forward_mode or _any_float64(tensors)
                return "torch" if only_torch else name
        return "torch"
    asked = f"backend {backend!r}"
    if backend is None:
        backend, asked = DEFAULT, f"LUMINA_KERNELS_BACKEND={DEFAULT!r}"
    if backend == "torch":
        return backend
    if backend not in BACKENDS:
        raise ValueError(f"{asked} is unknown, it must be one of {', '.join(BACKENDS)}")
    if backend not in implemented:
        have = ", ".join(("torch", *implemented))
        raise ValueError(f"{asked} is not implemented for this op, which has: {have}")
    reason = MISSING.get(backend) or unfit(backend, device)
    if reason:
        raise RuntimeError(f"{asked} is not available here: {reason}")
    if kind != DEVICES[backend] and not (kind == "cpu" and backend in EMULATED):
        hint = " (or TRITON_INTERPRET=1, for tests)" if backend == "triton" else ""
        raise ValueError(f"{asked} needs tensors on {DEVICES[backend]}{hint}, got {kind}")
    if _any_float64(tensors):
        raise TypeError(f"{asked} computes in float32 and takes no float64, use backend='torch'")
    if backend in refused:
        raise NotImplementedError(f"{asked} {refused[backend]}, use backend='torch' for it")
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


def triton_from(op: str, device: torch.device) -> float:
    """Values of the first tensor from which Triton comes before CUDA C++ on a GPU; inf: never."""
    return _triton_from(op, device)


when_imported("torch._dynamo", lambda: torch.compiler.assume_constant_result(triton_from))


@functools.cache
def _triton_from(op: str, device: torch.device) -> float:
    if not (device.type == "cuda" and torch.version.cuda and torch.cuda.is_available()):
        return LARGE
    major, minor = torch.cuda.get_device_capability(device)
    return measured.triton_from(10 * major + minor, op, LARGE)


def _best_first(implemented: tuple[str, ...], x: Tensor, op: str) -> tuple[str, ...]:
    """The order in which None looks through `implemented` on a GPU. A size that a graph does not
    know is large: a comparison would bind the graph to it."""
    least = triton_from(op, x.device)
    size = None if torch.compiler.is_dynamo_compiling() else x.numel()
    is_large = size >= least if isinstance(size, int) else least < math.inf
    return implemented if is_large else _cuda_first(implemented)


@functools.cache
def _cuda_first(implemented: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(implemented, key=lambda name: name != "cuda"))


def wants_grad(*tensors: Tensor | float | None) -> bool:
    """Whether autograd records an op on these."""
    if not torch.is_grad_enabled():
        return False
    for x in tensors:
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def in_forward_mode() -> bool:
    """Whether there is a level of forward-mode AD."""
    return forward_ad._current_level >= 0


def any_tangent(values) -> bool:
    """Whether forward-mode AD follows a tensor among `values`."""
    if not in_forward_mode():
        return False
    tensors = (x for x in values if isinstance(x, Tensor))
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _any_float64(tensors) -> bool:
    for tensor in tensors:  # a loop, as an `any` takes the host longer
        if tensor is not None and tensor.dtype is torch.float64:
            return True
    return False
