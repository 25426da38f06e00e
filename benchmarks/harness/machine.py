"""The machine and the software versions that a report was made with."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

PACKAGES = (
    "torch", "triton", "diffusers", "liger-kernel", "flash-attn", "flash-attn-4", "quack-kernels",
    "sageattention", "tomesd",
)  # fmt: skip


def describe(device: str) -> dict:
    """Processor, GPU and driver, versions of the packages, and the commit."""
    about = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "commit": commit(),
    }
    if find_spec("lumina_kernels._C"):
        from lumina_kernels import _C

        about["instructions"] = _C.cpu_level()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "gpu": properties.name,
            "sm": f"{properties.major}{properties.minor}",
            "gpu memory, GiB": round(properties.total_memory / 2**30),
            "driver": driver(),
            "cuda": torch.version.cuda,
        }
    return about


def processor() -> str:
    """The processor's model name from Linux, or what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The hash of HEAD, with a + if tracked files have changed. $LUMINA_COMMIT overrides it, for
    copies without git."""
    if "LUMINA_COMMIT" in os.environ:
        return os.environ["LUMINA_COMMIT"]
    here = Path(__file__).parent
    try:
        head = output("git", "-C", here, "rev-parse", "--short", "HEAD")
        changed = output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


def driver() -> str:
    try:
        return output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def output(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
