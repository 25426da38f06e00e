from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import CPU_LEVELS, without_gpus
from torch._subclasses.fake_tensor import FakeTensorMode

import lumina_kernels
from lumina_kernels import backend, doctor


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that this machine has GPUs of these compute capabilities."""

    def have(*capabilities):
        def properties(i):
            major, minor = capabilities[i]
            name, memory = f"GPU {i}", 80 * 2**30
            return SimpleNamespace(name=name, major=major, minor=minor, total_memory=memory)

        def capability(device):
            return capabilities[getattr(device, "index", device)]

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        for name, replacement in {
            "is_available": lambda: True,
            "device_count": lambda: len(capabilities),
            "get_device_properties": properties,
            "get_device_capability": capability,
        }.items():
            monkeypatch.setattr(torch.cuda, name, replacement)

    backend._unfit.cache_clear()
    with FakeTensorMode():  # or tensors on these devices would need them
        yield have
    backend._unfit.cache_clear()


def section(text, title):
    """Lines of the report below a title, up to an empty one: name -> the rest."""
    lines = text[text.index(title) :].split("\n\n")[0].splitlines()[1:]
    return dict(line.split(maxsplit=1) for line in lines)


@without_gpus
def test_it_says_what_each_op_takes_and_why_not_another(monkeypatch):
    monkeypatch.setattr(backend, "DEFAULT", None)
    monkeypatch.setattr(backend, "EMULATED", set())
    monkeypatch.setattr(backend, "MISSING", {})
    monkeypatch.setattr(backend, "cuda_archs", lambda: ("8.0", "9.0+PTX"))
    text = doctor.report()
    assert f"torch           {torch.__version__}\n" in text
    folder = Path(lumina_kernels.__file__).parent
    assert f"lumina-kernels  {lumina_kernels.__version__} in {folder}\n" in text
    assert "cuda kernels    for 8.0, 9.0+PTX\n" in text
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


@without_gpus
def test_it_compares_each_gpu_with_what_was_built(gpus, monkeypatch):
    monkeypatch.setattr(backend, "DEFAULT", None)
    monkeypatch.setattr(backend, "MISSING", {})
    monkeypatch.setattr(backend, "cuda_archs", lambda: ("9.0",))
    gpus((9, 0), (12, 1), (9, 0), (7, 5))
    text = doctor.report()
    assert "cuda:1          GPU 1, sm_121, 80 GiB, CUDA 13.0\n" in text
    assert "backend=None on cuda:2" not in text  # as cuda:0
    first = section(text, "backend=None on cuda:0 takes")
    assert first["swiglu"] == "cuda, triton from 8388608 values on"
    assert first["cuda"] == "ready, with backend='cuda'"
    second = section(text, "backend=None on cuda:1 takes")
    assert second["swiglu"] == "triton"
    assert second["cuda"] == (
        "backend 'cuda' is not available here: built for 9.0, this GPU has compute capability "
        "12.1: build with TORCH_CUDA_ARCH_LIST=12.1"
    )
    last = section(text, "backend=None on cuda:3 takes")
    assert set(last[op] for op in doctor.OPS) == {"torch"}
    for name in ("triton", "cuda"):
        assert last[name] == (
            f"backend '{name}' is not available here: its kernels need 8.0, this GPU has compute "
            "capability 7.5"
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_takes_its_kernels():
    expected = "triton" if "cuda" in backend.MISSING else "cuda, triton from 8388608 values on"
    assert all(doctor._taken(op, "cuda") == expected for op in doctor.OPS)
