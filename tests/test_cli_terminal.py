"""What the command line shows: bars on a terminal, and nothing that the libraries say."""

import os
import pty
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# So slow that tqdm draws its bar in every step.
SLOW = """
import time
import lumina.models.parts.joint_model as model
from lumina.cli import main
quick = model.to_images
def slow(*arguments):
    time.sleep(0.2)
    return quick(*arguments)
model.to_images = slow
"""


@pytest.mark.parametrize("options", ["", "--checkpoint tiny --size 64x64 --steps 3"])
def test_on_a_terminal(options, tmp_path, monkeypatch):
    """The bars' own updates, of which some return something, are no changes of a callback."""
    command = ["sample", "apple", *options.split()]
    if options:
        monkeypatch.syspath_prepend(ROOT / "examples")
        import_module("tiny_checkpoint").write("z_image", tmp_path / "tiny")
    terminal, ours = pty.openpty()
    script = SLOW + f"raise SystemExit(main({command!r}))"
    done = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stderr=ours, stdout=ours,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
    )  # fmt: skip
    assert done.wait(120) == 0
    os.close(terminal), os.close(ours)
    assert (tmp_path / "out.png").exists()


def test_the_libraries_say_nothing(tmp_path, monkeypatch):
    """Of what they load when they are first imported."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import_module("tiny_checkpoint").write("lumina_next", tmp_path / "tiny")
    command = "-m lumina sample a --size 64x64 --steps 2 --out a.png --checkpoint tiny"
    done = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("s, LuminaPipeline\n") and done.stdout.count("\n") == 1
