"""What nvcc makes of some CUDA kernels for Hopper. No GPU is needed, and no built library."""

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.cuda_code import functions, predictions, row_predictions
from benchmarks.cuda_launches import launches
from benchmarks.harness.shapes import LUMINA_NEXT
from lumina_kernels.prediction import hot_loop, waits_per_product

CSRC, NVCC = Path(__file__).parents[1] / "csrc", shutil.which("nvcc")
FLAGS = ("-O3", "-std=c++20", "-Xptxas=-warn-spills")  # as setup.py has them
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
HOPPER = "gqa_attention_hopper_fwd_kernel<72, Dtype::kBFloat16>"
ATTENTION = {
    "gqa_attention.cuh": "gqa_attention_fwd_kernel<72, Dtype::kBFloat16, false, false>",
    "gqa_attention_dq.cuh": "gqa_attention_dq_kernel<72, Dtype::kBFloat16, false>",
    "gqa_attention_dkv.cuh": "gqa_attention_dkv_kernel<72, Dtype::kBFloat16, false>",
}
ROWS = {
    "norm_modulate.cuh": "norm_modulate_fwd_kernel<RowKind::kPlain>",
    "sandwich_norm.cuh": "sandwich_norm_bwd_kernel<RowKind::kPlain, true>",
    "swiglu.cuh": "swiglu_fwd_kernel",
}


def compiled(folder, arch, headers, names):
    """An object with these kernels of csrc/cuda."""
    source, target = folder / "probe.cu", folder / "probe.o"
    lines = [f'#include "cuda/{header}"' for header in headers]
    pointers = ", ".join(f"(const void*){name}" for name in names)
    lines += ["namespace lumina_kernels::cuda {", f"const void* probe[] = {{{pointers}}};", "}"]
    source.write_text("\n".join(lines))
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [NVCC, *FLAGS, code, f"-I{CSRC}", "-c", source, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "spill" not in done.stderr, done.stderr
    return target


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hopper")
    return compiled(folder, "90a", ["gqa_attention_hopper.cuh"], [HOPPER])


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    found = ATTENTION | ROWS
    return compiled(tmp_path_factory.mktemp("others"), "90", found, found.values())


def loop_of(path, arch, kernel):
    """A kernel of attention, and the instructions of its loop over tiles."""
    (code,) = (code for (name, _), code in functions(path, arch).items() if name == kernel)
    return code, code.straight(hot_loop(code, tensor=True))


def launched(kernel):
    (found,) = (x for x in launches(LUMINA_NEXT) if x.names[0] == kernel)
    return found


def test_products_of_the_hopper_kernel_overlap(hopper):
    """ptxas may wait after every product (C7515), and once put the wait for the values' product
    before the exponentials, which are there to hide it."""
    code, loop = loop_of(hopper, "90a", "gqa_attention_hopper_fwd_kernel")
    kinds = ("HGMMA", "WARPGROUP", "MUFU")
    order = [f"{x.opcode} {x.operands}" for x in loop if x.kind in kinds]
    scores, values = (order.index(f"WARPGROUP.DEPBAR.LE gsb0, {n}") for n in ("0x1", "0x0"))
    assert [x.startswith("HGMMA") for x in order].count(True) == 5 + 16  # of keys and of values
    assert not any(x.startswith("HGMMA") for x in order[scores:])
    assert sum(x.startswith("MUFU.EX2") for x in order[scores:values]) >= 64
    assert waits_per_product(code) == pytest.approx(2 / 21)
    # Of a warp: 16 rows, 128 keys.
    useful = 2 * 2 * 16 * 128 * 72 / sum(x.flops for x in loop)
    assert useful == pytest.approx(launched("gqa_attention_hopper_fwd_kernel").useful)
    (row,) = predictions(hopper, "90")
    assert row["stack"] == 0, row
    for found in row["predicted"].values():
        assert found["share"] > 0.4, found


# Rows of a warp and keys, or keys of a warp and rows, in a pass through the loop; products.
@pytest.mark.parametrize("kind, pairs, products", (
    ("fwd", 32 * 64, 2), ("dq", 32 * 16, 3), ("dkv", 32 * 16, 4),
))  # fmt: skip
def test_attention_wastes_little_of_tensor_cores(others, kind, pairs, products):
    """An instruction of 8 columns takes as long as one of 16."""
    _, loop = loop_of(others, "90", f"gqa_attention_{kind}_kernel")
    issued = sum(x.kind == "HMMA" for x in loop)
    useful = 2 * products * pairs * 72 / (issued * 2 * 16 * 8 * 16)
    assert useful == pytest.approx(launched(f"gqa_attention_{kind}_kernel").useful)
    assert useful > 0.93


def test_kernels_that_copy_are_as_fast_as_a_copy(others):
    """Predicted, for 8192 rows."""
    rows = row_predictions(others, "90")
    assert len(rows) == 2 * 2 * 4  # kernels, GPUs, widths
    for row in rows:
        assert row["stack"] == 0
        assert row["share"] >= (0.9 if "fwd" in row["kernel"] else 0.85), row
    (swiglu,) = (row for row in predictions(others, "90") if row["kernel"] == "swiglu_fwd_kernel")
    for gpu, found in swiglu["predicted"].items():
        assert found["share"] >= 0.9, gpu
