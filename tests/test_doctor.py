import pytest
import torch
from common import CPU_LEVELS

from lumina_kernels import backend, doctor


def test_it_says_what_each_op_takes_and_why_not_another(monkeypatch):
    monkeypatch.setattr(backend, "DEFAULT", None)
    monkeypatch.setattr(backend, "EMULATED", set())
    monkeypatch.setattr(backend, "MISSING", {})
    text = doctor.report()
    assert torch.__version__ in text
    for op in doctor.OPS:
        assert f"\n  {op} " in text
    on_cpu = text[text.index("backend=None on cpu takes") :].splitlines()
    assert on_cpu[1].split() == ["context_drop", "cpu"]
    (line,) = (line for line in on_cpu if line.startswith("  triton "))
    assert "needs tensors on cuda" in line
    missing = {"triton": "triton is not installed", "cpu": "the C++ kernels are not built"}
    monkeypatch.setattr(backend, "MISSING", missing)
    text = doctor.report()
    assert "triton is not installed" in text and "the C++ kernels are not built" in text
    assert "\n  context_drop          torch\n" in text
    monkeypatch.setattr(backend, "DEFAULT", "numpy")
    assert "an error: LUMINA_KERNELS_BACKEND='numpy' is unknown" in doctor.report()


@pytest.mark.skipif("cpu" in backend.MISSING, reason="the C++ kernels are not built")
def test_it_says_which_instructions_the_cpu_kernels_use():
    assert f"cpu kernels     {CPU_LEVELS[-1]}, of {', '.join(CPU_LEVELS)}\n" in doctor.report()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_takes_triton():
    assert all(doctor._taken(op, "cuda") == "triton" for op in doctor.OPS)
