"""The wheel: it holds everything the tree does, and works away from it."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lumina import data

ROOT = Path(__file__).resolve().parent.parent
WASTE = shutil.ignore_patterns("*.pyc", "*.tmp")
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "lumina", "lumina_kernels")


def run(*command, cwd, **environment):
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # From a copy: a build leaves build/ and *.egg-info, and would take up what older ones left.
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=WASTE)
        else:
            shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", str(folder), str(source), cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_and_the_weights(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("lumina", "lumina_kernels"):
        modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*.py")}
        assert f"{package}/__init__.py" in modules and modules <= names
    weights = [p for p in (ROOT / "lumina" / "weights").iterdir() if p.suffix != ".tmp"]
    assert {f"lumina/weights/{p.name}" for p in weights} <= names
    assert {f"lumina/weights/{n}" for n in ("emoji.png", "emoji.json", "README.md")} <= names
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
    assert metadata.get_all("Provides-Extra") == ["triton", "train", "diffusers", "dev"]
    assert "lumina = lumina.cli:main" in scripts


def test_the_wheel_works_away_from_the_tree(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import lumina, lumina_kernels, lumina.data as d; s = d.load_emoji();"
        "print(lumina.__file__, lumina_kernels.__file__, len(s), s.images.sum().item(), sep='\\n')"
    )
    printed = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    ours, kernels, *rest = printed.splitlines()
    assert Path(ours) == site / "lumina" / "__init__.py"
    assert Path(kernels) == site / "lumina_kernels" / "__init__.py"
    assert rest == ["698", str(data.load_emoji().images.sum().item())]
