"""The wheel and the sdist: they hold everything the tree does, and work away from it."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

import build_backend
from lumina.emoji import data
from lumina_kernels import backend

ROOT = Path(__file__).resolve().parent.parent
CHOICES = ("TORCH_CUDA_ARCH_LIST", "FORCE_CUDA", "LUMINA_KERNELS_SKIP_CUDA_BUILD", "CXX")
WASTE = shutil.ignore_patterns("__pycache__", "*.tmp", "*.so", "logs")
FOLDERS = ("csrc", "lumina", "lumina_kernels", "tests", "benchmarks", "examples", ".ci")
FILES = ("setup.py", "build_backend.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "Makefile")
FILES += ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", ".clang-format")

FEW = ("extension.cpp", "swiglu.cpp")

# An editable install would make its modules visible to the wheel under test.
ALONE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)];"


def run(*command, cwd, **environment):
    ambient = {key: value for key, value in os.environ.items() if key not in CHOICES}
    result = subprocess.run(
        command, cwd=cwd, env={**ambient, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def copy_of_the_sources(folder, only=()):
    """With `only` some native sources, or all: a build leaves build/ and *.egg-info in its tree."""
    source = folder / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=WASTE)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for path in (source / "csrc").rglob("*.c*"):
        if only and path.suffix in (".cpp", ".cu") and path.name not in only:
            path.unlink()
    return source


def build(folder, only=(), broken=False, **environment):
    source = copy_of_the_sources(folder, only)
    if broken:
        (source / "csrc" / "cpu" / "broken.cpp").write_text("#error no such thing")
    return wheel_of(source, folder, **environment)


def wheel_of(source, folder, **environment):
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", str(folder), str(source), cwd=folder, **environment)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """As on a machine without a compiler."""
    return build(tmp_path_factory.mktemp("wheel"), CXX="no-such-compiler")


def test_the_wheel_holds_every_module_and_the_weights(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("lumina", "lumina_kernels"):
        modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*.py")}
        assert f"{package}/__init__.py" in modules and modules <= names
    assert "lumina/py.typed" in names
    weights = [p for p in (ROOT / "lumina" / "emoji" / "weights").iterdir() if p.suffix != ".tmp"]
    assert {f"lumina/emoji/weights/{p.name}" for p in weights} <= names
    assert {f"lumina/emoji/weights/{n}" for n in ("emoji.png", "emoji.json", "README.md")} <= names
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"lumina", "lumina_kernels"}


def test_the_wheel_says_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
        scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert (metadata["Name"], metadata["Version"]) == ("lumina-kernels", "0.1.0")
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    needed = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(needed) == ["Pillow>=10", "numpy", "safetensors", "torch>=2.10", "tqdm"]
    assert metadata["Author"] == "The lumina-kernels authors"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    addresses = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert list(addresses) == ["Repository", "Issues", "Paper"]
    assert metadata.get_all("Provides-Extra") == ["triton", "train", "diffusers", "bench", "dev"]
    assert "lumina = lumina.cli:main" in scripts


def test_the_wheel_works_away_from_the_tree(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = ALONE + (
        "import lumina, lumina_kernels, lumina.emoji.data as d; s = d.load_emoji();"
        "print(lumina.__file__, lumina_kernels.__file__, len(s), s.images.sum().item(), sep='\\n')"
    )
    printed = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    ours, kernels, *rest = printed.splitlines()
    assert Path(ours) == site / "lumina" / "__init__.py"
    assert Path(kernels) == site / "lumina_kernels" / "__init__.py"
    assert rest == ["698", str(data.load_emoji().images.sum().item())]


def test_without_a_compiler_it_is_pure_python(wheel, tmp_path):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = ALONE + (
        "import torch, lumina_kernels as lk; from lumina_kernels import backend;"
        "x = torch.ones(1, 2, 3); print(lk.swiglu(x, x).sum().item(), backend.MISSING['cpu'])"
    )
    printed = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert printed.startswith("4.386") and "with a C++ compiler" in printed


def sdist_of(source):
    run(sys.executable, "setup.py", "-q", "sdist", cwd=source, CXX="no-such-compiler")
    (path,) = (source / "dist").glob("*.tar.gz")
    return path


def test_the_sdist_is_the_tree(tmp_path):
    """Even where nothing can be compiled, and setup.py therefore lists no extension."""
    source = copy_of_the_sources(tmp_path)
    expected = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    path = sdist_of(source)
    names = {m.name.split("/", 1)[-1] for m in tarfile.open(path).getmembers() if m.isfile()}
    assert len(expected) > 250
    assert expected == {
        name for name in names if "egg-info" not in name and name not in ("PKG-INFO", "setup.cfg")
    }


def test_an_isolated_build_asks_for_torch_where_there_is_none(monkeypatch):
    """An sdist needs none."""
    assert build_backend.torch_folder() == Path(torch.__file__).parent
    assert build_backend.get_requires_for_build_wheel() == []
    assert build_backend.get_requires_for_build_editable() == []
    monkeypatch.setattr(build_backend, "torch_folder", lambda: None)
    assert build_backend.get_requires_for_build_wheel() == ["torch>=2.10"]
    assert build_backend.get_requires_for_build_editable() == ["torch>=2.10"]
    assert build_backend.get_requires_for_build_sdist() == []
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert build_backend.get_requires_for_build_wheel() == []  # for a wheel without kernels


@pytest.mark.skipif(sys.version_info < (3, 11), reason="a venv does not say what made it")
def test_python_m_build_takes_the_torch_of_the_environment_that_it_runs_in(tmp_path):
    isolated = tmp_path / "build-env-1"
    run(sys.executable, "-m", "venv", "--without-pip", str(isolated), cwd=tmp_path)
    python = isolated / "bin" / "python"
    code = "import build_backend; print(build_backend.torch_folder())"
    # Not the folder that it is in, where torch is as well.
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / name).symlink_to(Path(setuptools.__file__).parent.parent / name)
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    printed = run(str(python), "-c", code, cwd=tmp_path, PYTHONPATH=paths)
    assert printed.strip() == str(Path(torch.__file__).parent)
    isolated.rename(tmp_path / "some-other-venv")
    python = tmp_path / "some-other-venv" / "bin" / "python"
    assert run(str(python), "-c", code, cwd=tmp_path, PYTHONPATH=paths).strip() == "None"


@pytest.mark.parametrize(("version", "found"), (("2.9.1", False), ("2.10.0+cu130", True)))
def test_headers_of_a_torch_that_is_too_old_are_not_taken(version, found, tmp_path, monkeypatch):
    torch_there = tmp_path / "torch"
    (torch_there / "include" / "torch").mkdir(parents=True)
    (torch_there / "version.py").write_text(f"__version__ = {version!r}\ncuda = None\n")
    monkeypatch.setattr(build_backend, "find_spec", lambda name: None)
    monkeypatch.setattr(build_backend.sysconfig, "get_path", lambda name: str(tmp_path))
    assert build_backend.torch_folder() == (torch_there if found else None)


@pytest.mark.skipif("cpu" in backend.MISSING, reason="needs a C++ compiler")
def test_a_wheel_from_the_sdist_has_kernels_for_every_python(tmp_path):
    """Native code, built for the stable ABIs; one kernel is enough."""
    sdist = sdist_of(copy_of_the_sources(tmp_path, only=FEW))
    wheel = wheel_of(sdist, tmp_path, LUMINA_KERNELS_SKIP_CUDA_BUILD="1")
    assert "-cp310-abi3-" in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert (tmp_path / "lumina_kernels" / "_C.abi3.so").exists()
    code = ALONE + (
        "import torch, lumina_kernels as lk; x = torch.ones(1, 2, 3);"
        "print(lk.swiglu(x, x, backend='cpu').sum().item(), lk.__file__)"
    )
    printed = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert printed.startswith("4.386") and str(tmp_path) in printed


@pytest.mark.skipif("cpu" in backend.MISSING, reason="needs a C++ compiler")
def test_a_compile_error_shows_itself_and_installs_nothing(tmp_path):
    with pytest.raises(AssertionError, match="no such thing"):
        build(tmp_path, LUMINA_KERNELS_SKIP_CUDA_BUILD="1", only=("extension.cpp",), broken=True)
    assert not list(tmp_path.glob("*.whl"))
