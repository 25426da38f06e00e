import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lumina_kernels import backend, swiglu
from lumina_kernels.backend import resolve

HERE = torch.ones(1, 1, 1)


def on_gpu(dtype=torch.float32, size=backend.LARGE):
    """What is asked of a tensor there; no GPU is needed."""
    tensor = {"device": torch.device("cuda"), "dtype": dtype, "numel": lambda self: size}
    return type("OnGpu", (), tensor)()


GPU, DOUBLE_ON_GPU = on_gpu(), on_gpu(torch.float64)


@pytest.fixture(autouse=True)
def as_on_a_machine_with_everything(monkeypatch):
    """Whatever this one has, and whatever the environment says."""
    monkeypatch.setattr(backend, "MISSING", {})
    monkeypatch.setattr(backend, "EMULATED", set())
    monkeypatch.setattr(backend, "DEFAULT", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend._unfit.cache_clear()
    yield
    backend._unfit.cache_clear()


@pytest.fixture
def a_gpu(monkeypatch):
    """Say which GPU this machine has, and what the CUDA kernels were built for."""

    def have(capability, built):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(backend, "cuda_archs", lambda: tuple(built.split()))

    return have


def test_none_takes_the_best_that_takes_the_tensors(monkeypatch):
    assert resolve(None, (), HERE) == "torch"
    assert resolve(None, ("triton", "cpu"), HERE) == "cpu"
    assert resolve(None, ("triton", "cuda"), GPU) == "triton"
    assert resolve(None, ("cuda", "triton"), GPU, None, GPU) == "cuda"
    assert resolve(None, ("cuda", "triton"), GPU, None, DOUBLE_ON_GPU) == "torch"
    monkeypatch.setattr(backend, "MISSING", {"cuda": "not built"})
    assert resolve(None, ("cuda", "triton"), GPU) == "triton"


def test_cuda_comes_first_for_small_tensors(monkeypatch):
    """Where it is there and not refused, and where the size is a number and no symbol."""
    small, order = on_gpu(size=backend.LARGE - 1), ("triton", "cuda", "cpu")
    assert resolve(None, order, small) == "cuda" and resolve(None, order, GPU) == "triton"
    assert resolve(None, order, on_gpu(size=torch.SymInt(None))) == "triton"
    assert resolve(None, order, small, refused={"cuda": "has no gradient"}) == "triton"
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    assert resolve(None, order, small) == "triton"
    monkeypatch.setattr(backend, "MISSING", {"cuda": "not built"})
    assert resolve(None, order, small) == "triton"


def test_torch_is_everywhere():
    assert resolve("torch", (), HERE) == "torch"
    assert resolve("torch", ("triton",), DOUBLE_ON_GPU) == "torch"


@pytest.mark.parametrize("name", ("triton", "cuda", "cpu"))
def test_a_backend_the_op_lacks(name):
    with pytest.raises(
        ValueError, match=f"backend '{name}' is not implemented for this op.*: torch$"
    ):
        resolve(name, (), HERE)


def test_a_backend_is_taken_or_refused(monkeypatch):
    assert resolve("cpu", ("cpu",), HERE) == "cpu"
    assert resolve("triton", ("triton",), GPU) == "triton"
    with pytest.raises(ValueError, match="backend 'cuda' needs tensors on cuda, got cpu"):
        resolve("cuda", ("cuda",), HERE)
    with pytest.raises(ValueError, match="backend 'cpu' needs tensors on cpu, got cuda"):
        resolve("cpu", ("cpu",), GPU)
    with pytest.raises(TypeError, match="backend 'triton' .* takes no float64"):
        resolve("triton", ("triton",), GPU, DOUBLE_ON_GPU)
    monkeypatch.setattr(backend, "MISSING", {"triton": "triton is not installed"})
    with pytest.raises(RuntimeError, match="'triton' is not available here: triton is not inst"):
        resolve("triton", ("triton",), GPU)


def test_a_backend_that_refuses_a_call_is_passed_over():
    why = {"cpu": "takes at most 3"}
    assert resolve(None, ("cpu",), HERE, refused=why) == "torch"
    assert resolve(None, ("cpu", "cuda"), GPU, refused=why) == "cuda"
    assert resolve("torch", ("cpu",), HERE, refused=why) == "torch"
    with pytest.raises(NotImplementedError, match="'cpu' takes at most 3, use backend='torch'"):
        resolve("cpu", ("cpu",), HERE, refused=why)


def test_triton_on_a_cpu_is_the_interpreter(monkeypatch):
    assert resolve(None, ("triton",), HERE) == "torch"  # only on request
    with pytest.raises(ValueError, match="needs tensors on cuda .or TRITON_INTERPRET=1.*, got cpu"):
        resolve("triton", ("triton",), HERE)
    monkeypatch.setattr(backend, "EMULATED", {"triton"})
    assert resolve("triton", ("triton",), HERE) == "triton"
    assert resolve(None, ("triton",), HERE) == "torch"


DEFAULT_ARCHS = "8.0 9.0 10.0+PTX 12.0+PTX"


@pytest.mark.parametrize("capability", ((8, 0), (8, 6), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)))
def test_an_image_serves_the_later_gpus_of_its_major_version(capability, a_gpu):
    a_gpu(capability, DEFAULT_ARCHS.replace("+PTX", ""))
    assert resolve("cuda", ("cuda",), GPU) == "cuda"


@pytest.mark.parametrize(
    ("capability", "built"),
    (
        ((11, 0), DEFAULT_ARCHS),  # Thor, by the PTX of 10.0
        ((10, 1), DEFAULT_ARCHS),
        ((13, 0), DEFAULT_ARCHS),
        ((8, 7), "8.0+PTX"),
        ((8, 7), "8.7"),
        ((9, 0), "9.0a"),
        ((10, 3), "10.0f"),
    ),
)
def test_ptx_serves_every_later_gpu_and_an_own_image_its_gpu(capability, built, a_gpu):
    a_gpu(capability, built)
    assert resolve("cuda", ("cuda",), GPU) == "cuda"


@pytest.mark.parametrize(
    ("capability", "built"),
    (
        ((12, 1), "9.0"),
        ((9, 0), "8.0"),
        ((8, 0), "8.6+PTX 9.0+PTX"),
        ((11, 0), "8.0 9.0 10.0 12.0+PTX"),
        ((8, 7), "8.0 9.0+PTX"),  # a Jetson board takes no image of another GPU
        ((10, 3), "10.0a+PTX"),
    ),
)
def test_a_gpu_without_image_and_ptx_is_refused_in_one_line(capability, built, a_gpu):
    a_gpu(capability, built)
    names, (major, minor) = built.replace(" ", ", "), capability
    with pytest.raises(RuntimeError) as caught:
        resolve("cuda", ("cuda",), GPU)
    assert str(caught.value) == (
        f"backend 'cuda' is not available here: built for {names}, this GPU has compute "
        f"capability {major}.{minor}: build with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )
    assert resolve("triton", ("triton",), GPU) == "triton"
    assert resolve(None, ("cuda", "triton"), GPU) == "triton"


@pytest.mark.parametrize("name", ("triton", "cuda"))
def test_a_gpu_that_is_too_old_has_the_definition(name, a_gpu):
    a_gpu((7, 5), DEFAULT_ARCHS)
    assert resolve(None, ("triton", "cuda"), GPU) == "torch"
    with pytest.raises(RuntimeError) as caught:
        resolve(name, ("triton", "cuda"), GPU)
    assert str(caught.value) == (
        f"backend '{name}' is not available here: its kernels need 8.0, this GPU has compute "
        "capability 7.5"
    )


@pytest.mark.filterwarnings("error::UserWarning")
def test_compiled_code_does_not_look_into_the_question_about_the_gpu(monkeypatch):
    """It asks CUDA, which has no graph; dynamo warns of caches that it looks through."""
    asked = []

    @functools.cache
    def too_old(name, device):
        asked.append((name, device, sys._getframe()))
        return "too old"

    monkeypatch.setattr(backend, "_unfit", too_old)

    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def unfit(x):
        return x + (2 if backend.unfit("triton", x.device) else 1)

    assert unfit(torch.zeros(3)).tolist() == [2, 2, 2]
    assert unfit(torch.zeros(5)).tolist() == [2] * 5
    assert [call[:2] for call in asked] == [("triton", torch.device("cpu"))]


@pytest.mark.parametrize("name", ("numpy", "", "Torch", 1))
def test_an_unknown_backend(name):
    with pytest.raises(ValueError, match="is unknown, it must be one of torch, triton, cuda, cpu"):
        resolve(name, (), HERE)


def test_the_default_is_for_calls_that_name_none(monkeypatch):
    monkeypatch.setattr(backend, "DEFAULT", "cuda")
    with pytest.raises(
        ValueError, match="LUMINA_KERNELS_BACKEND='cuda' is not implemented for this op"
    ):
        resolve(None, (), HERE)
    assert resolve("torch", (), HERE) == "torch"
    monkeypatch.setattr(backend, "DEFAULT", "fastest")
    with pytest.raises(ValueError, match="LUMINA_KERNELS_BACKEND='fastest' is unknown"):
        swiglu(HERE, HERE)


@pytest.mark.parametrize("name", ("triton", "cpu"))
def test_kernels_do_not_differentiate_constants(name, monkeypatch):
    monkeypatch.setattr(backend, "EMULATED", {"triton"})
    constant = torch.ones(2, requires_grad=True)
    assert resolve(None, ("cpu",), HERE, cos=constant) == "torch"
    assert resolve(None, ("cpu",), HERE, cos=constant.detach(), weight=1.0, k=None) == "cpu"
    with pytest.raises(NotImplementedError, match=f"'{name}' computes no gradient of cos"):
        resolve(name, (name,), HERE, sin=constant.detach(), cos=constant)
    with torch.no_grad():
        assert resolve(name, (name,), HERE, cos=constant) == name


def test_a_source_tree_that_hides_the_installed_package_says_so(tmp_path, monkeypatch):
    """As in a clone after `pip install .`: Python finds the folder it runs in first."""
    ours = Path(backend.__file__).parent
    tree, site = tmp_path / "clone" / "lumina_kernels", tmp_path / "site" / "lumina_kernels"
    shutil.copytree(ours, tree, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    site.mkdir(parents=True)
    (site / "_C.abi3.so").touch()
    # An editable install finds the modules that the tree lacks: then nothing is hidden.
    code = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
from lumina_kernels.backend import MISSING
print(MISSING['cpu'], MISSING['cuda'])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree.parent,
        env=os.environ | {"PYTHONPATH": str(site.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    reason = (
        f"{tree} has no compiled kernels and hides {site}, which has: run Python in another "
        "folder, or `pip install -e .` in this one"
    )
    assert done.stdout == f"{reason} {reason}\n"
    assert f"UserWarning: {reason}\n" in done.stderr

    monkeypatch.setattr(sys, "path", [str(site.parent), *sys.path])
    assert backend._hidden_copy(tree) == site
    assert backend._hidden_copy(site) != site
    (site / "_C.abi3.so").unlink()
    assert backend._hidden_copy(tree) != site  # it has nothing to hide


def test_a_fresh_process_without_kernels_reads_the_environment():
    code = """
import sys
sys.modules["triton"] = sys.modules["lumina_kernels._C"] = None  # as if they were not there
import torch, lumina_kernels
from lumina_kernels.backend import DEFAULT
ones = torch.ones(1, 1, 1)
print(DEFAULT, lumina_kernels.swiglu(ones, ones, backend="torch").shape)
try:
    lumina_kernels.swiglu(ones, ones, backend="triton")
except RuntimeError as error:
    print(error)
try:
    lumina_kernels.swiglu(ones, ones)
except RuntimeError as error:
    print(error)
"""
    environment = os.environ | {"LUMINA_KERNELS_BACKEND": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "cpu torch.Size([1, 1, 1])",
        "backend 'triton' is not available here: triton is not installed (pip install triton)",
        "LUMINA_KERNELS_BACKEND='cpu' is not available here: the C++ kernels are not built, run "
        "`pip install --force-reinstall --no-deps .` in the source tree with a C++ compiler",
    ]
