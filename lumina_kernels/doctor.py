"""Say what is installed, and which backend each op takes here and why not another.

python -m lumina_kernels.doctor
"""

import importlib.metadata
import math
import os
import platform
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

import lumina_kernels
from lumina_kernels import backend
from lumina_kernels.ops import OPS

VARIABLES = ("LUMINA_KERNELS_BACKEND", "LUMINA_KERNELS_AUTOTUNE", "TRITON_INTERPRET")


def report() -> str:
    """The whole report as text."""
    lines = [f"python          {platform.python_version()} on {platform.platform()}"]
    lines.append(f"torch           {torch.__version__}")
    for package in ("triton", "diffusers"):
        lines.append(f"{package:15} {_version(package)}")
    lines.append(f"lumina-kernels  {lumina_kernels.__version__} in {Path(__file__).parent}")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        lines.append(
            f"cuda:{i}          {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{memory:.0f} GiB, CUDA {torch.version.cuda}"
        )
    if not torch.cuda.is_available():
        why = "torch is built without CUDA" if torch.version.cuda is None else "no GPU is visible"
        lines.append(f"cuda            none: {why}")
    if find_spec("lumina_kernels._C"):
        native = import_module("lumina_kernels._C")
        lines.append(f"cpu kernels     {native.cpu_level()}, of {', '.join(native.cpu_levels())}")
    if "cuda" not in backend.MISSING:
        lines.append(f"cuda kernels    for {', '.join(backend.cuda_archs())}")
    lines += [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    for device in ("cpu", *_different_gpus()):
        lines += ["", f"backend=None on {device} takes"]
        lines += [f"  {op:22}{_taken(op, device)}" for op in OPS]
        lines += ["other backends there"]
        lines += [f"  {name:22}{text}" for name, text in _others(device).items()]
    return "\n".join(lines)


def _different_gpus() -> list[str]:
    """One device of each compute capability."""
    devices = {}
    for i in range(torch.cuda.device_count()):
        devices.setdefault(torch.cuda.get_device_capability(i), f"cuda:{i}")
    return list(devices.values())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _taken(op: str, device: str) -> str:
    """For small tensors, and for large ones where that is another."""
    one = torch.empty(1, device=device)
    least = backend.triton_from(op, one.device)
    try:
        small, large = (
            backend.resolve(None, _implemented(op), one.expand(size), op=op)
            for size in (1, least if least < math.inf else 1)
        )
    except (ValueError, RuntimeError) as error:
        return f"an error: {error}"
    return small if small == large else f"{small}, {large} from {least} values on"


def _others(device: str) -> dict[str, str]:
    """Backend -> the ops that can have it, or why they can not, each reason once."""
    found = {}
    for name in backend.BACKENDS[1:]:
        reasons = {}
        for op in OPS:
            try:
                backend.resolve(name, _implemented(op), torch.empty(0, device=device))
                reason = "ready, with backend=" + repr(name)
            except (ValueError, RuntimeError) as error:
                reason = str(error)
            reasons.setdefault(reason, []).append(op)
        found[name] = "; ".join(
            reason if len(ops) == len(OPS) else f"{', '.join(ops)}: {reason}"
            for reason, ops in reasons.items()
        )
    return found


def _implemented(op: str) -> tuple[str, ...]:
    return import_module(f"lumina_kernels.ops.{op}").BEST_FIRST


if __name__ == "__main__":
    print(report())
