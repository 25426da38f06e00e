"""What `make` would do, read from its plan, and that it shows what it does while it does it."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def make(tmp_path):
    """Run make in a folder that has only what a plan needs, and no .venv."""
    for name in ("Makefile", "setup.py", "build_backend.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*words):
        hidden = ("TORCH_CUDA_ARCH_LIST", "MAKEFLAGS", "MAKELEVEL", "TORCH", "PYTHON")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        return subprocess.run(
            ["make", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return run


def test_sample_installs_what_drawing_needs(make):
    plan = make("-n", "sample").stdout
    assert "export LUMINA_KERNELS_SKIP_CUDA_BUILD=1" in plan
    installs = re.findall(r"pip .* install .*--no-compile (.*?);? ?\\?$", plan, re.MULTILINE)
    assert installs == [
        '"setuptools>=77" wheel ninja',
        "torch==2.13.0",
        "--no-build-isolation -e .",
    ]
    assert plan.splitlines()[-1].endswith("python -m lumina demo --out samples/grid.png")
    assert "install --progress-bar off --no-compile torch==2.11.0;" in (
        make("-n", "sample", "TORCH=torch==2.11.0").stdout
    )


def test_example_pipeline_installs_the_libraries_of_pipelines_and_draws(make):
    plan = make("-n", "example-pipeline").stdout
    assert plan.count('--no-build-isolation -e ".[diffusers]"') == 1 and ".[dev]" not in plan
    drawn = re.findall(r"python -m lumina sample .* --out samples/tiny/(\S+)\.png", plan)
    assert drawn == ["$family", "regions", "panorama", "apple", "img2img", "inpainting"]
    assert plan.splitlines()[-1].endswith("python examples/text_to_image.py")


def test_test_installs_the_rest_and_the_cuda_kernels_for_every_architecture(make):
    plan = make("-n", "test").stdout
    (archs,) = re.findall('export TORCH_CUDA_ARCH_LIST="(.*?)"', plan)
    assert f'\nARCHS = "{archs}"\n' in (ROOT / "setup.py").read_text()
    after = plan[plan.index("TORCH_CUDA_ARCH_LIST") :]
    assert 'install --progress-bar off --no-compile --no-build-isolation -e ".[dev]"' in after
    assert "setup.py -q build_ext --inplace" in after and "SKIP_CUDA" not in after
    assert plan.splitlines()[-1].endswith(
        "python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder"
    )
    only = make("-n", "test", "TORCH_CUDA_ARCH_LIST=9.0").stdout
    assert 'export TORCH_CUDA_ARCH_LIST="9.0";' in only


@pytest.mark.parametrize(("command", "status"), (("true", 0), ("false", 2)))
def test_long_work_says_that_it_goes_on(command, status, make, tmp_path):
    with open(tmp_path / "Makefile", "a") as file:
        file.write(f"probe:\n\t@$(AWAKE) sleep 2.5; {command}; echo done\n")
    start = time.perf_counter()
    done = make("probe", "EVERY=1")
    assert done.stdout.split("\n")[:2] == ["[1 s]", "[2 s]"]
    assert ("done" in done.stdout, done.returncode) == (status == 0, status)
    assert time.perf_counter() - start < 10
