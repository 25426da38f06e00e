import pytest
import torch

from lumina_kernels import backend, doctor


def test_it_says_what_each_op_takes_and_why_not_another(monkeypatch):
    monkeypatch.setattr(backend, "DEFAULT", None)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(backend, "MISSING", {})
    text = doctor.report()
    assert torch.__version__ in text
    for op in doctor.OPS:
        assert f"\n  {op} " in text
    on_cpu = text[text.index("backend=None on cpu takes") :].splitlines()
    assert on_cpu[1].split() == ["context_drop", "torch"]
    (line,) = (line for line in on_cpu if line.startswith("  triton "))
    assert "needs tensors on cuda" in line
    monkeypatch.setattr(backend, "MISSING", {"triton": "triton is not installed"})
    assert "triton is not installed" in doctor.report()
    monkeypatch.setattr(backend, "DEFAULT", "numpy")
    assert "an error: LUMINA_KERNELS_BACKEND='numpy' is unknown" in doctor.report()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_takes_triton():
    assert all(doctor._taken(op, "cuda") == "triton" for op in doctor.OPS)
