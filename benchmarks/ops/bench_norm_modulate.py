"""norm_modulate: the modulated RMSNorm at the head of every sub-layer."""

from torch.nn import functional as F

import lumina_kernels as lk
from benchmarks.harness.case import Case, Unavailable, ours
from benchmarks.harness.shapes import BACKWARD_SHAPES, OP_SHAPES

SHAPES = (*OP_SHAPES, *BACKWARD_SHAPES)
PEERS = ("liger",)


def case(shape, device) -> Case:
    B, L, D, randn = shape.B, shape.L, shape.D, shape.randn(device)
    x = randn(B, L, D)

    def eager(x, weight, scale):
        return F.rms_norm(x, (D,), weight, 1e-5) * (1 + scale[:, None])

    return Case(
        inputs={"x": x, "weight": randn(D), "scale": randn(B, 4 * D).chunk(4, 1)[0]},
        ours=ours(lk.norm_modulate, device),
        eager=eager,
        peers={"liger": lambda: liger(device)},
        bytes=None if shape.backward else (2 * B * L * D + D + B * D) * x.itemsize,
        backward=shape.backward,
    )


def liger(device):
    if device != "cuda":
        raise Unavailable("Liger's kernels run only on a GPU")
    from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction as Norm

    return lambda x, weight, scale: Norm.apply(x, weight, scale, None, 1e-5)


def test_norm_modulate(compare):
    compare(case)
