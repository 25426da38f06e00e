"""gelu in its tanh form: the activation of the feed-forward layers of Flux and Wan."""

from functools import partial

from torch.nn import functional as F

import lumina_kernels as lk
from benchmarks.harness.case import Case, ours
from benchmarks.harness.shapes import BACKWARD_SHAPES, OP_SHAPES

SHAPES = (*OP_SHAPES, *BACKWARD_SHAPES)
PEERS = ()


def case(shape, device) -> Case:
    x = shape.randn(device)(shape.B, shape.L, shape.F)
    return Case(
        inputs={"x": x},
        ours=ours(lk.gelu, device, approximate="tanh"),
        eager=partial(F.gelu, approximate="tanh"),
        bytes=None if shape.backward else 2 * x.nbytes,
        backward=shape.backward,
    )


def test_gelu(compare):
    compare(case)
