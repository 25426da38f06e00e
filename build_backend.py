"""setuptools' build backend, which asks for torch where its headers are nowhere to be found.

torch is no fixed requirement: that would download gigabytes to read headers that are mostly there
already. An isolated build takes those of the environment that pip installs into, or that
`python -m build` runs in. Where there are none, as in an empty environment or with uv, torch is
installed for the build, because the wheel would lack its kernels otherwise.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
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
    """torch >= 2.10 with its headers, of the first environment that has it."""
    spec = find_spec("torch")
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    # In pip's isolation these are still the paths of the environment that is installed into.
    sites = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    found += [Path(site) / "torch" for site in (*sites, *_site_of_the_frontend())]
    return next((path for path in found if _has_headers(path)), None)


def _site_of_the_frontend() -> list[str]:
    """Where the Python that runs `python -m build` has its packages: the isolated environment is a
    venv, which names the Python that made it (from 3.11 on)."""
    settings = Path(sys.prefix) / "pyvenv.cfg"
    if not Path(sys.prefix).name.startswith("build-env-") or not settings.exists():
        return []
    made_by = re.search("^command = (.+) -m venv ", settings.read_text(), re.MULTILINE)
    if made_by is None:
        return []
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([made_by[1], "-c", code], capture_output=True, text=True)
    return done.stdout.splitlines()


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
