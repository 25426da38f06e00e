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


def documented():
    """(Kernel, architecture) -> the most registers that the results have for it. Those of
    attention's forward are in a table by head_dim."""
    text = (CSRC.parent / "benchmarks" / "results" / "machine-code.md").read_text()
    found, archs = {}, []
    for line in text[text.index("## CUDA C++\n") :].splitlines():
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            continue
        if first in ("kernel", "K"):
            archs = [cell.removeprefix("sm_") for cell in cells if cell.startswith("sm_")]
        elif re.fullmatch(r"`\w+`.*|\d+", first):
            name = "gqa_attention_fwd" if first.isdigit() else first.split("`")[1]
            for arch, cell in zip(archs, cells[-len(archs) :], strict=True):
                most = max(map(int, re.findall(r"\d+", cell)), default=0)
                found[name, arch] = max(most, found.get((name, arch), 0))
    return found


def test_registers(rows):
    """None spills, and none takes more than the results say, or 8 more, the unit that they are
    allotted in, of another nvcc than theirs: with them blocks that a processor holds would be
    lost."""
    most = documented()
    for row in rows:
        assert row["stack"] <= (32 if row["kernel"] in ROTATING else 0), row
        name = row["kernel"].removesuffix("_kernel"), row["arch"].removesuffix("a")
        assert row["registers"] <= most[name] + 8, row


def test_every_kernel_that_is_predicted_is_there(rows):
    from benchmarks.cuda_code import library, predictions
    from benchmarks.cuda_launches import launches
    from benchmarks.harness.shapes import LUMINA_NEXT

    arch = min(row["arch"].removesuffix("a") for row in rows)
    wanted = {x.names for x in launches(LUMINA_NEXT) if "_hopper_" not in x.kernel}
    found = predictions(library(), arch)
    assert {(row["kernel"], row["arguments"]) for row in found} >= wanted
