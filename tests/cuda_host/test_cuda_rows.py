"""The kernels over rows at every width class, and what only they do: see csrc/cuda/lib/rows.cuh."""

from functools import partial

import pytest
import torch
from common import assert_accurate

import lumina_kernels
from lumina_kernels.examples import Sizes, examples

OPS = ("norm_modulate", "sandwich_norm", "sandwich_norm_chain", "gate_residual_norm")


def assert_rows_accurate(op, B, L, D, dtype):
    """Every example of the op, against its definition."""
    fn = getattr(lumina_kernels, op)
    kernel, definition = (
        partial(getattr(lumina_kernels, op), backend=n) for n in ("cuda", "torch")
    )
    sizes = Sizes(B=B, grid=(1, 1, L), H=1, K=D, dtype=torch.float64)
    for inputs in examples(op, sizes).values():
        assert_accurate(partial(fn, backend="cuda"), partial(fn, backend="torch"), inputs, dtype)


# Plain, whole and wide rows, of a warp and of a block; widths that allow 16-byte accesses and
# widths that do not. A chunk of wide rows adds to its partial sums.
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("D", (72, 73, 264, 511, 1160, 4104, 6160, 8191, 12301))
@pytest.mark.parametrize("op", OPS)
def test_widths(op, D, dtype):
    assert_rows_accurate(op, 2, 2, D, dtype)


# Sums over rows: one sample with many chunks, more samples than slices, chunks of several rows that
# end with an odd one. Rows of 8 and 40 numbers of 16 bits are plain.
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("B, L, D", ((1, 150, 40), (21, 5, 33), (2, 53, 8)))
@pytest.mark.parametrize("op", OPS)
def test_sums_over_rows(op, B, L, D, dtype):
    assert_rows_accurate(op, B, L, D, dtype)
