"""What the README says to type: every command and block runs as written, in order, from an empty
folder, and draws what it says."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lumina.emoji.data import load_emoji
from lumina.emoji.evaluate import nearest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
INLINE = re.findall(
    r"`((?:make|pip|python|lumina) [^`]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S)
)

# Not run here, because it installs, or takes minutes -> the files that do it.
ELSEWHERE = {
    "make sample": (".ci/run", "tests/test_make.py"),
    "make test": (".ci/run", "tests/test_make.py"),
    'make sample TORCH="torch==2.11.0"': ("tests/test_make.py",),
    "pip install .": ("tests/test_packaging.py",),
    'pip install ".[triton]"': ("tests/test_packaging.py",),
    "pip install -e .": ("Makefile",),
    "python -m lumina train runs/mine": ("tests/test_cli.py", "tests/emoji/test_train.py"),
    "python -m lumina evaluate": ("tests/emoji/test_evaluate.py",),
    "make example-pipeline": ("tests/test_make.py",),
}


# Released models, which are not here -> a tiny one of the family stands in.
MODELS = {
    "Z-Image-Turbo": "z_image",
    "Lumina-Image-2.0": "lumina2",
    "Lumina-Next-SFT-diffusers": "lumina_next",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    write = import_module("tiny_checkpoint").write
    for name, family in MODELS.items():
        write(family, tmp_path / name)
    return tmp_path


def lines_of(block):
    """Commands without their comments."""
    return [re.sub(r"\s+# .*", "", line) for line in block.splitlines()]


COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in lines_of(block)] + INLINE


def test_the_readme_is_short_and_its_blocks_are_found():
    assert len(TEXT.splitlines()) <= 190
    assert TEXT.count("\n```") == 2 * len(BLOCKS)
    assert {kind for kind, _ in BLOCKS} == {"sh", "python"}
    assert set(ELSEWHERE) <= set(COMMANDS)
    assert all((ROOT / path).exists() for paths in ELSEWHERE.values() for path in paths)


def drawn(folder, name, columns):
    """English names of the emoji that are nearest to the pictures of a file."""
    emoji = load_emoji()
    pixels = torch.from_numpy(np.array(Image.open(folder / name))).permute(2, 0, 1)
    pictures, images = torch.stack(pixels.chunk(columns, dim=-1)), emoji.images
    found = nearest(pictures / 127.5 - 1, images / 127.5 - 1)
    return [emoji.captions["en"][i] for i in found]


def test_every_command_runs(folder, tmp_path):
    """In one shell: what `. .venv/bin/activate` does stays done."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    activate = f'PATH="{Path(sys.executable).parent}:$PATH"\n'
    (tmp_path / ".venv" / "bin" / "activate").write_text(activate)
    script = "\n".join(line for line in COMMANDS if line not in ELSEWHERE)
    ours = ("TRITON_INTERPRET", "LUMINA_KERNELS_BACKEND")  # of the tests, not of a newcomer
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(
        ["sh", "-e", "-c", script],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert drawn(tmp_path, "apple.png", 1) == ["red apple"]
    assert drawn(tmp_path, "three.png", 3) == ["cactus", "pizza", "penguin"]
    assert drawn(tmp_path, "green.png", 1) == ["green apple"]
    assert "backend=None on cpu takes" in done.stdout


def test_every_python_block_runs(folder, tmp_path, monkeypatch):
    """In one namespace, as in a notebook."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "README.md", "exec"), names)
    assert drawn(tmp_path, "two.png", 2) == ["red apple", "cactus"]
    assert Image.open("two.png").size == (256, 128)
    assert names["velocity"].shape == (2, 3, 32, 32)


def test_nothing_says_to_install_this_package_from_an_index():
    """It is on none yet."""
    paths = [p for folder in ("lumina", "lumina_kernels") for p in (ROOT / folder).rglob("*.py")]
    for path in (*paths, ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        assert not re.search(r"pip install [^`\n]*lumina", path.read_text()), path
