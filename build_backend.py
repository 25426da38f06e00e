"""setuptools' build backend, which asks for torch where its headers are nowhere to be found.

torch is no fixed requirement: that would download gigabytes to read headers that are mostly there
already. pip shows an isolated build the environment that is installed into, and its torch is taken.
`python -m build` and uv do not, and an empty environment has none: there torch is installed for the
build, because the wheel would lack its kernels otherwise. `setup.py` asks the same questions.
"""

import os
import runpy
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403  the other hooks

OLDEST_TORCH = (2, 10)  # whose stable ABI has what the extensions need


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return ["torch>=2.10"] if missing_compiler() is None and torch_folder() is None else []


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return get_requires_for_build_wheel()


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return []


def torch_folder() -> Path | None:
    """Of this environment, or of the one that is installed into, which pip's isolation hides."""
    spec = find_spec("torch")
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    found += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    return next((path for path in found if _has_headers(path)), None)


def _has_headers(folder: Path) -> bool:
    if not (folder / "include" / "torch").is_dir():
        return False
    major, minor = torch_versions(folder)["__version__"].split(".")[:2]
    return (int(major), int(minor)) >= OLDEST_TORCH


def torch_versions(folder: Path) -> dict:
    """`__version__` and `cuda` of torch, without the seconds that its import takes."""
    return runpy.run_path(str(folder / "version.py"))


def missing_compiler() -> str | None:
    compiler = os.environ.get("CXX", "c++").split()[0]  # "ccache g++" is one, too
    return f"there is no C++ compiler {compiler}" if shutil.which(compiler) is None else None
