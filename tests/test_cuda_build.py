"""When setup.py builds the CUDA kernels, and for which architectures. Its nvcc here is a script
that knows the architectures of a toolkit and compiles nothing."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from test_packaging import CHOICES, copy_of_the_sources

from lumina_kernels import backend
from lumina_kernels.aot import tool

DEFAULT = "8.0, 9.0, 10.0+PTX, 12.0+PTX"
NVCC = r"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release RELEASE, V0" ;;
--list-gpu-code) printf 'sm_%s\n' KNOWN ;;
*)
  echo "$*" >> LOG
  for word; do case "$before" in -o) out=$word ;; -MF) deps=$word ;; esac; before=$word; done
  echo "$out:" > "$deps"
  echo | c++ -x c++ -fPIC -c - -o "$out"
esac
"""
# As if this torch were built for TORCH_CUDA.
SETUP = """
import runpy, sys, build_backend
true = build_backend.torch_versions
build_backend.torch_versions = lambda folder: true(folder) | {"cuda": TORCH_CUDA}
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""

pytestmark = pytest.mark.skipif("cpu" in backend.MISSING, reason="needs a C++ compiler")
CUDA = find_spec("lumina_kernels._C_cuda")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tree with one file for each library and no kernels."""
    source = copy_of_the_sources(tmp_path_factory.mktemp("cuda"), only=("extension.cu",))
    (source / "csrc" / "cpu" / "empty.cpp").touch()
    return source


@pytest.fixture
def build(source, tmp_path):
    """Build in place: returns the exit status, what was said, and nvcc's -gencode arguments."""
    toolkit, log = tmp_path / "toolkit", tmp_path / "log"
    nvcc = toolkit / "bin" / "nvcc"

    def run(torch_cuda, release="13.0", known="75 80 86 87 89 90 100 103 110 120 121", **choices):
        script = NVCC.replace("RELEASE", release).replace("KNOWN", known)
        nvcc.write_text(script.replace("LOG", str(log)))
        nvcc.chmod(0o755)
        log.write_text("")
        for library in (source / "lumina_kernels").glob("*.so"):
            library.unlink()
        done = subprocess.run(
            [sys.executable, "-c", SETUP.replace("TORCH_CUDA", repr(torch_cuda))],
            cwd=source,
            env={k: v for k, v in os.environ.items() if k not in CHOICES}
            | {"CUDA_HOME": str(toolkit)}
            | choices,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = re.findall("^lumina-kernels: (.*)$", done.stdout, re.MULTILINE)
        return done.returncode, said, re.findall(r"-gencode=arch=(\S+)", log.read_text())

    for folder in ("bin", "lib64"):
        (toolkit / folder).mkdir(parents=True)
    subprocess.run(["ar", "rcs", toolkit / "lib64" / "libcudart_static.a"], check=True)
    return run


def built(source):
    return sorted(path.name for path in (source / "lumina_kernels").glob("*.so"))


def test_a_torch_with_cuda_has_the_kernels_for_every_architecture(build, source):
    status, said, flags = build("13.1")
    assert status == 0
    assert said == [
        "building _C.abi3.so of 1 files",
        f"the CUDA kernels are built for {DEFAULT}, two minutes for each",
        "building _C_cuda.abi3.so of 2 files",
    ]
    assert built(source) == ["_C.abi3.so", "_C_cuda.abi3.so"]
    assert flags == [
        "compute_80,code=sm_80",
        "compute_90,code=sm_90",
        "compute_100,code=sm_100",
        "compute_100,code=compute_100",
        "compute_120,code=sm_120",
        "compute_120,code=compute_120",
    ]
    (source / "lumina_kernels" / "_C.abi3.so").unlink()  # it is no module here
    code = "from lumina_kernels import backend; print(', '.join(backend.cuda_archs()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.stdout == f"{DEFAULT}\n"


def test_files_for_hopper_are_built_for_it_alone(build, source):
    path = source / "csrc" / "cuda" / "some_hopper.cu"
    path.touch()
    try:
        assert (
            build("13.0", TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX")[2].count("compute_90a,code=sm_90a")
            == 1
        )
        assert (
            build("13.0", TORCH_CUDA_ARCH_LIST="8.0+PTX")[2]
            == [
                "compute_80,code=sm_80",
                "compute_80,code=compute_80",
            ]
            * 2
        )
    finally:
        path.unlink()


def test_an_older_toolkit_builds_what_it_knows_and_ptx_of_the_last(build):
    status, said, flags = build("12.4", release="12.4", known="75 80 86 89 90")
    assert (status, said[1:3]) == (
        0,
        [
            "architectures that are skipped: 10.0+PTX (this nvcc does not know it), 12.0+PTX (this "
            "nvcc does not know it)",
            "the CUDA kernels are built for 8.0, 9.0+PTX, two minutes for each",
        ],
    )
    assert flags == ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"]


def test_entries_that_can_not_be_built_are_skipped_in_one_line(build, source):
    chosen = "5.2 7.5+PTX;9.0a Hopper 99.0 8.6+PTX"
    status, said, flags = build("13.0", TORCH_CUDA_ARCH_LIST=chosen)
    assert (status, said[1:3]) == (
        0,
        [
            "architectures that are skipped: 5.2 (the kernels need 8.0), 7.5+PTX (the kernels need "
            "8.0), Hopper (no architecture like 9.0 or 9.0+PTX), 99.0 (this nvcc does not know it)",
            "the CUDA kernels are built for 9.0a, 8.6+PTX, two minutes for each",
        ],
    )
    assert flags == [
        "compute_90a,code=sm_90a",
        "compute_86,code=sm_86",
        "compute_86,code=compute_86",
    ]
    assert built(source) == ["_C.abi3.so", "_C_cuda.abi3.so"]


@pytest.mark.parametrize("choice", ({"FORCE_CUDA": "1"}, {"TORCH_CUDA_ARCH_LIST": "9.0"}))
def test_a_torch_without_cuda_has_the_kernels_if_they_are_asked_for(choice, build, source):
    assert build(None, **choice)[0] == 0
    assert built(source) == ["_C.abi3.so", "_C_cuda.abi3.so"]


@pytest.mark.parametrize(
    ("torch_cuda", "choices", "reason"),
    (
        (None, {}, "torch is built without CUDA (FORCE_CUDA=1 builds them for it)"),
        ("13.0", {"LUMINA_KERNELS_SKIP_CUDA_BUILD": "1"}, "LUMINA_KERNELS_SKIP_CUDA_BUILD is set"),
        (
            "12.8",
            {},
            "NVCC is of CUDA 13.0, torch of CUDA 12.8 (CUDA_HOME chooses another nvcc)",
        ),
        (
            "13.0",
            {"TORCH_CUDA_ARCH_LIST": "7.5"},
            "no architecture is left, without 7.5 (the kernels need 8.0)",
        ),
    ),
)
def test_else_one_line_says_why_not(torch_cuda, choices, reason, build, source, tmp_path):
    reason = reason.replace("NVCC", str(tmp_path / "toolkit" / "bin" / "nvcc"))
    status, said, flags = build(torch_cuda, **choices)
    assert status == 0 and flags == [] and built(source) == ["_C.abi3.so"]
    assert said == [f"no CUDA kernels are built: {reason}", "building _C.abi3.so of 1 files"]
    if torch_cuda is not None:
        status, said, _ = build(torch_cuda, FORCE_CUDA="1", **choices)
        assert (status, said) == (1, [f"FORCE_CUDA=1, but {reason}"])
        assert built(source) == []


def test_a_missing_compiler_ends_only_a_build_that_has_to_have_cuda(build, source):
    missing = "there is no C++ compiler no-such-compiler"
    assert build("13.0", CXX="no-such-compiler -O1")[:2] == (
        0,
        [f"no native kernels are built: {missing}"],
    )
    assert build("13.0", CXX="no-such-compiler -O1", FORCE_CUDA="1")[:2] == (
        1,
        [f"FORCE_CUDA=1, but {missing}"],
    )


def test_what_did_not_change_is_not_compiled_again(build, source):
    """Whatever builds: pip takes a new build folder each time."""
    assert len(build("13.0", TORCH_CUDA_ARCH_LIST="8.9")[2]) == 1
    status, _, flags = build("13.0", TORCH_CUDA_ARCH_LIST="8.9")
    assert (status, flags) == (0, [])
    assert built(source) == ["_C.abi3.so", "_C_cuda.abi3.so"]


@pytest.mark.skipif(CUDA is None, reason="nvcc built no CUDA kernels")
def test_the_library_holds_the_images_and_the_ptx_that_it_names():
    names = [arch.replace(".", "") for arch in backend.cuda_archs()]
    listed = tool("cuobjdump", "-lelf", "-lptx", CUDA.origin)
    images = {n.removesuffix("+PTX") for n in names}
    images |= {"90a"} & {f"{n}a" for n in images}  # of the kernels for Hopper
    assert set(re.findall(r"sm_(\w+)\.cubin", listed)) == images
    assert set(re.findall(r"sm_(\w+)\.ptx", listed)) == {n[:-4] for n in names if "+PTX" in n}
