"""swiglu: the gated activation of the feed-forward layer."""

from torch.nn import functional as F

import lumina_kernels as lk
from benchmarks.harness.case import Case, Unavailable, ours
from benchmarks.harness.shapes import BACKWARD_SHAPES, OP_SHAPES

SHAPES = (*OP_SHAPES, *BACKWARD_SHAPES)
PEERS = ("liger",)


def case(shape, device) -> Case:
    B, L, randn = shape.B, shape.L, shape.randn(device)
    a, b = randn(B, L, shape.F), randn(B, L, shape.F)

    def eager(a, b):
        return F.silu(a) * b

    return Case(
        inputs={"a": a, "b": b},
        ours=ours(lk.swiglu, device),
        eager=eager,
        peers={"liger": lambda: liger(device, shape.backward)},
        bytes=None if shape.backward else 3 * B * L * shape.F * a.itemsize,
        backward=shape.backward,
    )


def liger(device, backward):
    if device != "cuda":
        raise Unavailable("Liger's kernels run only on a GPU")
    if backward:
        raise Unavailable("Liger's backward overwrites a and b, which the other variants need")
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction as SiLUMul

    return lambda a, b: SiLUMul.apply(a, b)


def test_swiglu(compare):
    compare(case)
