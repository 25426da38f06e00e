"""Builds the native kernels, lumina_kernels._C (CPU) and lumina_kernels._C_cuda, where it can.

Both use PyTorch's stable ABI and Python's limited API: all that is needed of torch are its headers,
and one wheel serves Python >= 3.10 and torch >= 2.10. No GPU is needed to build.

TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CXXFLAGS and CUDA_HOME are honoured. FORCE_CUDA=1 makes a
missing nvcc an error, LUMINA_KERNELS_SKIP_CUDA_BUILD=1 leaves CUDA out. In a checkout
`python setup.py build_ext --inplace` compiles only what changed.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.absolute()
ARCHS = "8.0;9.0a;10.0a;12.0"
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10, the oldest torch that is served
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall"]
CXX_FLAGS += ["-Wno-psabi", "-Wno-unknown-pragmas"]
CXX_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # of GCC 12's own AVX-512 header
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-warn-spills"]


def asked(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def torch_folder() -> Path | None:
    """Of the environment that is installed into, even from pip's isolated one, which hides it."""
    spec = find_spec("torch")
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    found += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    return next((path for path in found if (path / "include" / "torch").is_dir()), None)


def find_nvcc() -> Path | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    return Path(found).resolve() if found else None


def arch_flags(nvcc: Path) -> list[str]:
    """-gencode flags of TORCH_CUDA_ARCH_LIST, or of those in ARCHS that this nvcc knows."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    flags = []
    for arch in (chosen or ARCHS).split(";"):
        number = arch.replace(".", "").removesuffix("+PTX")
        if not arch or (not chosen and f"sm_{number.rstrip('a')}" not in known):
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def extensions() -> list[Extension]:
    """What can be built here. `python -m lumina_kernels.doctor` says again what is missing."""
    missing = None
    if torch_folder() is None:
        missing = "there is no torch in this environment yet"
    elif shutil.which(os.environ.get("CXX", "c++")) is None:
        missing = f"there is no C++ compiler {os.environ.get('CXX', 'c++')}"
    nvcc = "no nvcc (CUDA_HOME is its folder)" if find_nvcc() is None else None
    if asked("FORCE_CUDA") and (missing or nvcc):
        sys.exit(f"lumina-kernels: FORCE_CUDA=1, but {missing or nvcc}")
    if missing:
        print(f"lumina-kernels: no native kernels are built, {missing}", flush=True)
        return []
    cuda = nvcc is None and not asked("LUMINA_KERNELS_SKIP_CUDA_BUILD")
    return [_extension("_C", ".cpp"), *([_extension("_C_cuda", ".cu")] if cuda else [])]


def _extension(name: str, suffix: str) -> Extension:
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*"))
    sources = [path for path in files if path.endswith(suffix)]
    headers = [path for path in files if path.endswith("h")]
    return Extension(f"lumina_kernels.{name}", sources, depends=headers, py_limited_api=True)


class Build(build_ext):
    """Compiles with ninja: in parallel, and only what changed."""

    def build_extension(self, extension: Extension) -> None:
        folder = (Path(self.build_temp) / extension.name).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(_ninja_file(extension.sources, target))
        print(f"building {target.name} of {len(extension.sources)} files", flush=True)
        ninja = shutil.which("ninja")
        ninja = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([*ninja, *jobs], cwd=folder).returncode:
            sys.exit(f"lumina-kernels: {target.name} did not compile, see above")


def _ninja_file(sources: list[str], target: Path) -> str:
    """How one library is built."""
    torch, nvcc = torch_folder(), find_nvcc()
    cxx = [os.environ.get("CXX", "c++"), os.environ.get("CXXFLAGS", "")]
    system = [torch / "include", sysconfig.get_path("include")]
    shared = [TARGET, f"-I{ROOT / 'csrc'}", *(f"-isystem {path}" for path in system)]
    link = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl", "-lpthread"]
    compilers = {".cpp": [*cxx, *CXX_FLAGS]}
    if any(source.endswith(".cu") for source in sources):
        compilers[".cu"] = [nvcc, *NVCC_FLAGS, *arch_flags(nvcc)]
        link += [f"-L{nvcc.parent.parent / 'lib64'}", "-lcudart_static", "-lrt"]
    lines = []
    for suffix, words in compilers.items():
        command = _line(*words, *shared, "-MMD -MF $out.d -c $in -o $out")
        lines += [f"rule {suffix[1:]}", f"  command = {command}", "  description = $in"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
    command = _line(*cxx, "-shared $in -o $out", *link)
    lines += ["rule link", f"  command = {command}", "  description = $out"]
    objects = []
    for source in map(Path, sources):
        objects.append(f"{source.name}.o")
        lines.append(f"build {objects[-1]}: {source.suffix[1:]} {ROOT / source}")
    return "\n".join([*lines, f"build {target}: link {' '.join(objects)}", ""])


def _line(*words) -> str:
    return " ".join(str(word) for word in words)


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
