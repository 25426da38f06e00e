"""The machine code of the CUDA kernels, if they were built. No GPU is needed."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("lumina_kernels._C_cuda") is None, reason="nvcc built no CUDA kernels"
)
CSRC = Path(__file__).parents[2] / "csrc"
ROTATING = {"qk_norm_rope3d_bwd_kernel", "qk_norm_rope3d_pool_kernel"}  # sincosf's slow path


@pytest.fixture(scope="module")
def rows():
    from benchmarks.cuda_code import kernels

    return kernels()


def test_every_kernel_is_built_for_every_architecture(rows):
    names = set()
    for path in CSRC.rglob("*.cu*"):
        names |= set(re.findall(r"(\w+_kernel)\(const", path.read_text()))
    hopper = {name for name in names if "_hopper_" in name}
    archs = {row["arch"] for row in rows if row["kernel"] not in hopper}
    assert len(names) > 20 and archs
    for arch in archs:
        assert {row["kernel"] for row in rows if row["arch"] == arch} - hopper == names - hopper
    made = {(row["arch"], row["kernel"]) for row in rows if row["kernel"] in hopper}
    assert made == ({("90a", name) for name in hopper} if {"90", "90a"} & archs else set())


def test_registers_do_not_spill(rows):
    for row in rows:
        allowed = 32 if row["kernel"] in ROTATING else 0
        assert row["stack"] <= allowed and row["registers"] <= 255, row


def test_attention_at_72_wastes_little():
    from benchmarks.cuda_code import useful_fraction

    assert useful_fraction(72) == pytest.approx(0.947, abs=1e-3)
