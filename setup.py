"""Builds the native kernels, lumina_kernels._C (CPU) and lumina_kernels._C_cuda, where it can.

Both use PyTorch's stable ABI and Python's limited API: all that is needed of torch are its headers,
and one wheel serves Python >= 3.10 and torch >= 2.10. No GPU is needed to build.

TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CXXFLAGS and CUDA_HOME are honoured. The CUDA kernels are built
for a torch with CUDA and an nvcc of the same major version; FORCE_CUDA=1 makes it an error where
they can not be. Where torch has no CUDA they are built only if FORCE_CUDA=1 or TORCH_CUDA_ARCH_LIST
asks for them, and LUMINA_KERNELS_SKIP_CUDA_BUILD=1 leaves them out. Objects are kept in build/:
only what changed is compiled again, by `python setup.py build_ext --inplace` in a checkout, too.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent.absolute()))
from build_backend import missing_compiler, torch_folder, torch_versions  # noqa: E402

ROOT = Path(__file__).parent.absolute()
# An image serves the later GPUs of its major version, PTX every later GPU. 10.0 has it for Thor,
# which is 11.0, and 12.0 for what comes.
ARCHS = "8.0;9.0;10.0+PTX;12.0+PTX"
OLDEST_ARCH = 80  # bfloat16 tensor cores, cp.async
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10, the oldest torch that is served
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall"]
CXX_FLAGS += ["-Wno-psabi", "-Wno-unknown-pragmas"]
CXX_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # of GCC 12's own AVX-512 header
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-warn-spills"]


def asked(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def say(text: str) -> None:
    print(f"lumina-kernels: {text}", flush=True)


def find_nvcc() -> Path | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    return Path(found).resolve() if found else None


def _output(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def architectures(nvcc: Path) -> tuple[list[str], list[str]]:
    """Those of TORCH_CUDA_ARCH_LIST, or of ARCHS, that can be built; and why others are not."""
    known = _output(nvcc, "--list-gpu-code").split()
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    good, bad = [], []
    for arch in chosen or ARCHS.split(";"):
        form = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
        number = int(form[1] + form[2]) if form else 0
        if form is None:
            bad.append(f"{arch} (no architecture like 9.0 or 9.0+PTX)")
        elif number < OLDEST_ARCH:
            bad.append(f"{arch} (the kernels need 8.0)")
        elif f"sm_{number}" not in known:
            bad.append(f"{arch} (this nvcc does not know it)")
        else:
            good.append(arch)
    if good and not chosen and not good[-1].endswith("+PTX"):  # an older nvcc
        good[-1] += "+PTX"
    return good, bad


def arch_flags(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.replace(".", "").removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def hopper_flags(archs: list[str]) -> list[str]:
    """Of `*_hopper.cu`: their instructions are those of sm_90a, whose images run on 9.0 alone."""
    if not any(re.match(r"9\.0", arch) for arch in archs):
        return arch_flags(archs)  # without LUMINA_HOPPER they hold no kernel
    return ["-DLUMINA_HOPPER", "-gencode=arch=compute_90a,code=sm_90a"]


def extensions() -> list[Extension]:
    """What can be built here. `python -m lumina_kernels.doctor` says again what is missing."""
    words = set(sys.argv[1:])
    if words & {"egg_info", "dist_info", "sdist"} and not words & {"build_ext", "bdist_wheel"}:
        return []  # nothing is compiled, and torch may not be here yet
    missing = missing_compiler()
    if missing is None and torch_folder() is None:
        missing = "there is no torch >= 2.10 in this environment yet"
    no_cuda = missing or _missing_cuda()
    if asked("FORCE_CUDA") and no_cuda:
        sys.exit(f"lumina-kernels: FORCE_CUDA=1, but {no_cuda}")
    if missing:
        say(f"no native kernels are built: {missing}")
        return []
    if no_cuda:
        say(f"no CUDA kernels are built: {no_cuda}")
        return [_extension("_C", ".cpp")]
    return [_extension("_C", ".cpp"), _extension("_C_cuda", ".cu")]


def _missing_cuda() -> str | None:
    """Why the CUDA kernels are not built, or None."""
    if asked("LUMINA_KERNELS_SKIP_CUDA_BUILD"):
        return "LUMINA_KERNELS_SKIP_CUDA_BUILD is set"
    nvcc, theirs = find_nvcc(), torch_versions(torch_folder())["cuda"]
    if theirs is None and not (asked("FORCE_CUDA") or os.environ.get("TORCH_CUDA_ARCH_LIST")):
        return "torch is built without CUDA (FORCE_CUDA=1 builds them for it)"
    if nvcc is None:
        return "there is no nvcc (CUDA_HOME is its folder)"
    release = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if release is None:
        return f"{nvcc} does not run"
    if theirs is not None and theirs.split(".")[0] != release[1]:
        ours = f"{release[1]}.{release[2]}"
        return f"{nvcc} is of CUDA {ours}, torch of CUDA {theirs} (CUDA_HOME chooses another nvcc)"
    good, bad = architectures(nvcc)
    return None if good else f"no architecture is left, without {', '.join(bad)}"


def _extension(name: str, suffix: str) -> Extension:
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*"))
    sources = [path for path in files if path.endswith(suffix)]
    headers = [path for path in files if path.endswith("h")]
    return Extension(f"lumina_kernels.{name}", sources, depends=headers, py_limited_api=True)


class Build(build_ext):
    """Compiles with ninja: in parallel, and only what changed."""

    def build_extension(self, extension: Extension) -> None:
        folder = ROOT / "build" / extension.name  # not build_temp, which pip makes anew each time
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        sources, nvcc, good = list(extension.sources), None, []
        if extension.name.endswith("_C_cuda"):
            nvcc = find_nvcc()
            good, bad = architectures(nvcc)
            if bad:
                say(f"architectures that are skipped: {', '.join(bad)}")
            say(f"the CUDA kernels are built for {', '.join(good)}, two minutes for each")
            sources.append(_source_of_names(good, folder))
        (folder / "build.ninja").write_text(_ninja_file(sources, target, nvcc, good))
        say(f"building {target.name} of {len(sources)} files")
        ninja = shutil.which("ninja")
        ninja = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([*ninja, *jobs], cwd=folder).returncode:
            sys.exit(f"lumina-kernels: {target.name} did not compile, see above")


def _source_of_names(archs: list[str], folder: Path) -> str:
    """The library says itself what it was built for; lumina_kernels.backend compares the GPU."""
    path = folder / "archs.cpp"
    exported = 'extern "C" __attribute__((visibility("default")))'
    path.write_text(f'{exported} const char lumina_cuda_archs[] = "{" ".join(archs)}";\n')
    return str(path)


def _ninja_file(sources: list[str], target: Path, nvcc: Path | None, archs: list[str]) -> str:
    """How one library is built, with nvcc for `archs` if there is one."""
    torch = torch_folder()
    cxx = [os.environ.get("CXX", "c++"), os.environ.get("CXXFLAGS", "")]
    system = [torch / "include", sysconfig.get_path("include")]
    shared = [TARGET, f"-I{ROOT / 'csrc'}", *(f"-isystem {path}" for path in system)]
    link = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl", "-lpthread"]
    compilers = {".cpp": [*cxx, *CXX_FLAGS]}
    if nvcc:
        compilers[".cu"] = [nvcc, *NVCC_FLAGS, "$arch"]
        home = nvcc.parent.parent
        link += [f"-L{home / 'lib64'}", f"-L{home / 'lib'}", "-lcudart_static", "-lrt"]
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
        if source.suffix == ".cu":
            flags = hopper_flags if source.stem.endswith("_hopper") else arch_flags
            lines.append(f"  arch = {_line(*flags(archs))}")
    return "\n".join([*lines, f"build {target}: link {' '.join(objects)}", ""])


def _line(*words) -> str:
    return " ".join(str(word) for word in words)


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
