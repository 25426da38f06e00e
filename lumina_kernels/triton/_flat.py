"""What elementwise ops share: tensors of any shape as rows that may have gaps between them."""

import triton
import triton.language as tl
from torch import Tensor

from lumina_kernels.triton._arguments import rows_of

# 8 values a lane: 16 bytes in 16 bits.
OPTIONS = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def load_flat(x, row, columns, mask):
    """Values of a row in float32, of rows (pointer, stride)."""
    ptr, stride = x
    return tl.load(ptr + row * stride + columns, mask=mask).to(tl.float32)


@triton.jit
def store_flat(ptr, values, columns, mask):
    """The reverse, of a row that starts at `ptr`."""
    tl.store(ptr + columns, values.to(ptr.dtype.element_ty), mask=mask)


def flat_rows(*tensors: Tensor) -> tuple[list[tuple[Tensor, int]], int, int]:
    """(tensor, stride) of each as rows (rows, F), and both sizes. Tensors without gaps are a single
    row; others keep their last dimension, and are copied if that has gaps itself."""
    if all([tensor.is_contiguous() for tensor in tensors]):
        F = tensors[0].numel()
        return [(tensor, F) for tensor in tensors], 1, F
    F = tensors[0].shape[-1]
    rows = [rows_of(tensor.reshape(-1, F))[:2] for tensor in tensors]
    return rows, rows[0][0].shape[0], F
