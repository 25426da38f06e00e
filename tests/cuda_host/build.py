"""Builds and loads the CUDA sources for the host; `cuda_host.h` says what it checks."""

import ctypes
import fcntl
import functools
import hashlib
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from lumina_kernels.kernel_op import KernelOp
from lumina_kernels.ops import OPS

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
RUNTIME = [HERE / f"{name}.cpp" for name in ("cuda_host", "memory", "async", "wgmma")]
NAMESPACE = "lumina_kernels_cuda_host"
FLAGS = [
    "-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas",
    "-DLUMINA_CUDA_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000",
]  # fmt: skip
COUNTERS = ("launches", "bytes_read", "bytes_written", "bank_conflicts", "multiply_adds")


class Host:
    """The loaded library: which kernels ran, and what they did."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        self._library.cuda_host_executed.restype = ctypes.c_char_p
        self._library.cuda_host_latest.restype = ctypes.c_char_p
        for name in COUNTERS:
            getattr(self._library, f"cuda_host_{name}").restype = ctypes.c_uint64

    def executed(self) -> set[str]:
        """Names of the kernels that were launched in this process."""
        return set(self._library.cuda_host_executed().decode().split())

    def latest(self) -> str:
        """The name of the kernel that was launched last."""
        return self._library.cuda_host_latest().decode()

    @contextmanager
    def multiprocessors(self, count: int):
        """The device has so many; see cuda_host.h."""
        self._library.cuda_host_set_multiprocessors(count)
        try:
            yield
        finally:
            self._library.cuda_host_set_multiprocessors(0)

    def count(self, name: str) -> int:
        """One of `COUNTERS`, since the process began."""
        return getattr(self._library, f"cuda_host_{name}")()


def kernel_names() -> set[str]:
    """Every `__global__` function in csrc/."""
    found = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^{;]*?\)\s+)?(\w+)\s*\(")
    sources = [path.read_text() for path in sorted(CSRC.rglob("*.cu*"))]
    names = [name for source in sources for name in found.findall(source)]
    assert len(names) == sum(source.count("__global__") for source in sources), names
    return set(names)


@functools.cache
def load() -> Host:
    """The ops of csrc/cuda under `torch.ops.lumina_kernels_cuda_host`, on CPU tensors."""
    sources = [p for p in sorted(CSRC.rglob("*.cu")) if p.stem != "extension"]  # Python's module
    _define()
    return Host(build(sources, CSRC))


def build(sources, *folders: Path) -> Path:
    """The shared library of some .cu files, with the headers of `folders`: csrc, and what comes
    before it. Kept for the next time, as is the object of every file until a text that it includes
    changes."""
    cache = Path(tempfile.gettempdir()) / f"lumina_kernels_cuda_host-{Path.home().name}"
    cache.mkdir(exist_ok=True)
    common = (*FLAGS, torch.__version__, *_texts(HERE / "cuda_host.h", folders).values())
    paths = {
        path: cache / f"{path.stem}-{_digest(*common, *_texts(path, folders).values())}.o"
        for path in (*RUNTIME, *sources)
    }
    with ThreadPoolExecutor(2) as pool, tempfile.TemporaryDirectory() as folder:
        includes = [f"-I{path}" for path in (folder, *folders, HERE)]
        includes += [f"-isystem{path}" for path in include_paths()]
        compiler, first = ["g++", *FLAGS, *includes], "cuda_host.h"
        if sum(not path.exists() for path in paths.values()) > 6:  # for fewer it takes longer
            first = "precompiled.h"
            header = [*compiler, "-x", "c++-header", str(HERE / first)]
            _run(Path(folder) / f"{first}.gch", header)
        compiler += ["-include", first, "-x", "c++", "-c"]

        def compile(source):
            _run(paths[source], [*compiler, str(source)])

        list(pool.map(compile, paths))
    objects = sorted(paths.values())
    library = cache / f"{_digest(*map(str, objects))}.so"
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-ltorch", "-lc10"]
    _run(library, ["g++", "-shared", *map(str, objects), *libraries])
    return library


def _run(path, command):
    """Run a compiler that writes `path`, unless the file exists. Of several processes one does."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as part:
            done = subprocess.run([*command, "-o", part.name], capture_output=True, text=True)
        if done.returncode != 0:
            Path(part.name).unlink(missing_ok=True)
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        Path(part.name).rename(path)


def _texts(path, folders):
    """Of a file, and of all that it includes from its own folder, `folders` and this one."""
    found, left = {}, [path]
    while left:
        path = left.pop()
        if path not in found:
            found[path] = path.read_text()
            for name in re.findall(r'^#include "(.+)"', found[path], re.MULTILINE):
                places = (folder / name for folder in (path.parent, *folders, HERE))
                left += [place for place in places if place.is_file()][:1]
    return found


def _digest(*parts):
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _define():
    """The schemas of `lumina_kernels_cpp`, which the kernels' declarations have."""
    library = torch.library.Library(NAMESPACE, "DEF")
    _define.library = library  # kept alive: the library's destructor would remove the schemas
    for op in OPS:
        for declared in vars(import_module(f"lumina_kernels.ops.{op}")).values():
            if isinstance(declared, KernelOp):
                library.define(declared.schema)
