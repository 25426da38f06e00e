import os
import subprocess
import sys

import pytest
import torch

from lumina_kernels import backend, swiglu
from lumina_kernels.backend import resolve

CPU = torch.device("cpu")


def test_none_and_torch_are_torch():
    assert resolve(None, (), CPU) == "torch"
    assert resolve("torch", (), CPU) == "torch"


@pytest.mark.parametrize("name", ("triton", "cuda", "cpu"))
def test_a_backend_the_op_lacks(name):
    with pytest.raises(
        ValueError, match=f"backend '{name}' is not there yet .* on cpu, .*: torch$"
    ):
        resolve(name, (), CPU)
    assert resolve(name, (name,), CPU) == name


@pytest.mark.parametrize("name", ("numpy", "", "Torch", 1))
def test_an_unknown_backend(name):
    with pytest.raises(ValueError, match="is unknown, it must be one of torch, triton, cuda, cpu"):
        resolve(name, (), CPU)


def test_the_default_is_for_calls_that_name_none(monkeypatch):
    monkeypatch.setattr(backend, "DEFAULT", "triton")
    with pytest.raises(ValueError, match="LUMINA_KERNELS_BACKEND='triton' is not there yet"):
        resolve(None, (), CPU)
    assert resolve("torch", (), CPU) == "torch"
    monkeypatch.setattr(backend, "DEFAULT", "fastest")
    with pytest.raises(ValueError, match="LUMINA_KERNELS_BACKEND='fastest' is unknown"):
        swiglu(torch.ones(1, 1, 1), torch.ones(1, 1, 1))


def test_a_fresh_process_without_triton_reads_the_environment():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, lumina_kernels
from lumina_kernels.backend import DEFAULT
ones = torch.ones(1, 1, 1)
print(DEFAULT, lumina_kernels.swiglu(ones, ones, backend="torch").shape)
try:
    lumina_kernels.swiglu(ones, ones)
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"LUMINA_KERNELS_BACKEND": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "cpu torch.Size([1, 1, 1])",
        "LUMINA_KERNELS_BACKEND='cpu' is not there yet for this op on cpu, it has: torch",
    ]
