import os
import subprocess
import sys

import pytest
import torch

from lumina_kernels import backend, swiglu
from lumina_kernels.backend import resolve

HERE = torch.ones(1, 1, 1)
GPU = type("OnGpu", (), {"device": torch.device("cuda"), "dtype": torch.float32})()  # no GPU needed
DOUBLE_ON_GPU = type("OnGpu", (), {"device": torch.device("cuda"), "dtype": torch.float64})()


@pytest.fixture(autouse=True)
def nothing_is_missing(monkeypatch):
    monkeypatch.setattr(backend, "MISSING", {})


def test_none_takes_the_best_that_takes_the_tensors(monkeypatch):
    assert resolve(None, (), HERE) == "torch"
    assert resolve(None, ("triton",), HERE) == "torch"  # the interpreter only on request
    assert resolve(None, ("triton", "cpu"), HERE) == "cpu"
    assert resolve(None, ("triton", "cuda"), GPU) == "triton"
    assert resolve(None, ("cuda", "triton"), GPU, None, GPU) == "cuda"
    assert resolve(None, ("cuda", "triton"), GPU, None, DOUBLE_ON_GPU) == "torch"
    monkeypatch.setattr(backend, "MISSING", {"cuda": "not built"})
    assert resolve(None, ("cuda", "triton"), GPU) == "triton"


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


def test_triton_on_a_cpu_is_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "EMULATED", {"triton"})
    assert resolve("triton", ("triton",), HERE) == "triton"
    monkeypatch.setattr(backend, "EMULATED", set())
    with pytest.raises(ValueError, match="needs tensors on cuda .or TRITON_INTERPRET=1.*, got cpu"):
        resolve("triton", ("triton",), HERE)


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
        "backend 'triton' is not available here: triton is not installed "
        '(pip install "lumina-kernels[triton]")',
        "LUMINA_KERNELS_BACKEND='cpu' is not available here: the C++ kernels are not built, run "
        "`pip install --force-reinstall --no-deps .` in the source tree with a C++ compiler",
    ]
